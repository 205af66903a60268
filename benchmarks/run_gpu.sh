#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes: first that the kernels are right on it (noise bit-equal to the
# CPU's, each kernel against its reference), then all benchmarks. JSON and pictures go to benchmarks/results/.
#
#   bash benchmarks/run_gpu.sh            PYTHON=... chooses the interpreter (default: .venv/bin/python, else python)
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
results=benchmarks/results
mkdir -p "$results"
unset RDMD_KERNELS TRITON_INTERPRET
"$PYTHON" -m pytest -q -p no:cacheprovider benchmarks/test_on_gpu.py
"$PYTHON" -m pytest -q -p no:cacheprovider benchmarks/test_kernels.py \
  --benchmark-json "$results/kernels.json" --benchmark-columns=median --benchmark-quiet
"$PYTHON" -m benchmarks.report "$results/kernels.json" --out "$results/kernels.png"
"$PYTHON" -m benchmarks.networks --case songunet64 adm64 --batch 32 --compile --json "$results/networks.json"
