#!/usr/bin/env bash
# Everything that needs a GPU: first that the kernels are right on it (noise bit-equal to the CPU's, each kernel against
# its reference), then benchmarks. JSON and pictures go to benchmarks/results/gpu/.
#
#   bash benchmarks/run_gpu.sh              correctness, kernels, and the steps of the image networks
#   bash benchmarks/run_gpu.sh networks memory small startup
#   bash benchmarks/run_gpu.sh graphs       steps with CUDA graphs by torch.compile
#
# steps: an iteration of SongUNet and ADM at 64x64 in bf16 beside the plain formulation under autocast, both as written
# and under torch.compile. Each case writes its JSON as it ends, so that what is cut off loses only itself.
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
results=benchmarks/results/gpu
mkdir -p "$results"
unset RDMD_KERNELS TRITON_INTERPRET
parts=("$@")
[[ ${#parts[@]} -gt 0 ]] || parts=(correctness kernels steps)
for part in "${parts[@]}"; do
  SECONDS=0
  case "$part" in
    correctness)
      "$PYTHON" -m pytest -q -p no:cacheprovider benchmarks/test_on_gpu.py ;;
    kernels)
      "$PYTHON" -m pytest -q -p no:cacheprovider benchmarks/test_kernels.py \
        --benchmark-json "$results/kernels.json" --benchmark-columns=median --benchmark-quiet
      "$PYTHON" -m benchmarks.report "$results/kernels.json" --out "$results/kernels.png" ;;
    networks)
      "$PYTHON" -m benchmarks.networks --case songunet64 adm64 --batch 32 --json "$results/networks.json" ;;
    steps)
      for case in songunet64 adm64; do
        "$PYTHON" -m benchmarks.step --case "$case" --dtype bf16 --compile default --json "$results/step_$case.json"
      done ;;
    small)
      for case in toy digits; do
        "$PYTHON" -m benchmarks.step --case "$case" --json "$results/step_$case.json"
      done ;;
    graphs)
      for case in songunet64 adm64; do
        "$PYTHON" -m benchmarks.step --case "$case" --dtype bf16 --compile reduce-overhead \
          --json "$results/step_${case}_graphs.json"
      done ;;
    compiled)
      "$PYTHON" -m benchmarks.networks --case songunet64 adm64 --batch 32 --compile --json "$results/networks_compiled.json" ;;
    memory)
      "$PYTHON" -m benchmarks.memory --measure --ranks 1 --json "$results/memory.json" ;;
    startup)
      "$PYTHON" -m benchmarks.startup --launcher python --json "$results/startup.json" ;;
    *)
      echo "run_gpu.sh: no part $part, one of correctness kernels steps networks compiled graphs small memory startup" >&2
      exit 2 ;;
  esac
  echo "== $part: $SECONDS s"
done
