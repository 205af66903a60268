#!/usr/bin/env bash
# Everything that needs a GPU: first that the kernels are right on it (noise bit-equal to the CPU's, each kernel against
# its reference), then benchmarks. JSON and pictures go to benchmarks/results/gpu/, or to $RESULTS.
#
#   bash benchmarks/run_gpu.sh              correctness, kernels, and the steps of the image networks
#   bash benchmarks/run_gpu.sh networks memory small startup
#   bash benchmarks/run_gpu.sh graphs       steps with CUDA graphs by torch.compile
#
# steps: an iteration of SongUNet and ADM at 64x64 in bf16 beside the plain formulation under autocast, both as written
# and under torch.compile. Each case writes its JSON as it ends, so that what is cut off loses only itself; a part that
# fails does not keep the next ones from running, and the script then ends with 1.
#
# PYTHON=... chooses the interpreter (default: .venv/bin/python, else python).
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python
  [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
# Without an installed package the link makes the kernels importable as rdmd_fast.kernels.
if ! "$PYTHON" -c 'import rdmd_fast.kernels' 2>/dev/null; then
  [[ -e rdmd_fast/kernels ]] || ln -s ../kernels rdmd_fast/kernels
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi
"$PYTHON" - <<'PY'
import torch, triton
assert torch.cuda.is_available(), "benchmarks/run_gpu.sh needs a CUDA device"
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
PY
results=${RESULTS:-benchmarks/results/gpu}
mkdir -p "$results"
unset RDMD_KERNELS TRITON_INTERPRET
parts=("$@")
[[ ${#parts[@]} -gt 0 ]] || parts=(correctness kernels steps)
workers=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then
  workers=(-n 8)  # hundreds of variants of kernels are compiled
fi

step() {  # name of the results, arguments of benchmarks.step
  "$PYTHON" -m benchmarks.step "${@:2}" --json "$results/step_$1.json"
}

run_part() {
  local failed=0
  case "$1" in
    correctness)
      "$PYTHON" -m pytest -q -p no:cacheprovider ${workers[@]+"${workers[@]}"} tests/kernels/test_on_gpu.py || failed=1 ;;
    kernels)
      "$PYTHON" -m pytest -q -p no:cacheprovider benchmarks/test_kernels.py \
        --benchmark-json "$results/kernels.json" --benchmark-columns=median --benchmark-quiet || failed=1
      "$PYTHON" -m benchmarks.report "$results/kernels.json" --out "$results/kernels.png" || failed=1 ;;
    steps)
      # Five sides lie on the device at once: ADM's fit 80 GB at 16 samples.
      step songunet64 --case songunet64 --dtype bf16 --compile default || failed=1
      step adm64 --case adm64 --batch 16 --dtype bf16 --compile default || failed=1 ;;
    graphs)
      step songunet64_graphs --case songunet64 --dtype bf16 --compile reduce-overhead || failed=1
      step adm64_graphs --case adm64 --batch 16 --dtype bf16 --compile reduce-overhead || failed=1 ;;
    small)
      step toy --case toy || failed=1
      step digits --case digits || failed=1 ;;
    networks)
      "$PYTHON" -m benchmarks.networks --case songunet64 adm64 --batch 32 --json "$results/networks.json" || failed=1 ;;
    compiled)
      "$PYTHON" -m benchmarks.networks --case songunet64 adm64 --batch 32 --compile \
        --json "$results/networks_compiled.json" || failed=1 ;;
    memory)
      "$PYTHON" -m benchmarks.memory --measure --ranks 1 --network 64 adm64 --json "$results/memory.json" || failed=1 ;;
    startup)
      "$PYTHON" -m benchmarks.startup --launcher python --json "$results/startup.json" || failed=1 ;;
    *)
      echo "run_gpu.sh: no part $1, one of correctness kernels steps graphs small networks compiled memory startup" >&2
      exit 2 ;;
  esac
  return $failed
}

status=0
for part in "${parts[@]}"; do
  SECONDS=0
  outcome=""
  run_part "$part" || { status=1; outcome=", FAILED"; }
  echo "== $part: $SECONDS s$outcome"
done
exit $status
