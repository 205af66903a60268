"""Says in one line what run_gpu.sh lacks, before anything is compiled: modules, a CUDA device.

    python -m benchmarks.preflight

Imports torch and Triton alone, and those only where every module is there. Without an installed package it links
kernels/ to where it is imported from. Exit status 2 if something is missing.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

# What a run imports, what that imports in turn, and what only benchmarks do. PyTorch comes with what it needs.
MODULES = (
    "torch", "triton", "numpy", "deepspeed", "einops", "hjson", "msgpack", "ninja", "packaging", "psutil", "cpuinfo",
    "pydantic", "pydantic_core", "annotated_types", "typing_inspection", "typing_extensions", "webdataset",
    "braceexpand", "safetensors", "yaml", "PIL", "jinja2", "fsspec", "filelock", "tqdm", "setuptools", "matplotlib",
    "pytest", "pytest_benchmark",
)  # fmt: skip
PACKAGES = {"cpuinfo": "py-cpuinfo", "yaml": "pyyaml", "PIL": "pillow"}  # where pip knows them by another name
HOW = "pip install --no-index --no-deps --target SITE WHEELS/*.whl, and SITE on PYTHONPATH (benchmarks/README.md)"


def missing() -> str | None:
    """What this machine lacks, None if nothing."""
    absent = [PACKAGES.get(name, name.replace("_", "-")) for name in MODULES if find_spec(name) is None]
    if absent:
        return f"no {', '.join(absent)}: {HOW}"
    import torch

    if not torch.cuda.is_available():
        return f"no CUDA device that torch {torch.__version__} can use"
    return None


def main() -> int:
    if lacking := missing():
        print(f"run_gpu.sh: {lacking}", file=sys.stderr)
        return 2
    if find_spec("rdmd_fast.kernels") is None:
        (Path(__file__).parents[1] / "rdmd_fast/kernels").symlink_to("../kernels")
    import torch
    import triton

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
