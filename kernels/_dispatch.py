"""Which implementation of a kernel runs: Triton on a GPU, the torch reference elsewhere.

``RDMD_KERNELS`` decides: ``auto`` (default), ``triton`` or ``reference``. What is asked for and not there is
an error, never a silent fallback. A third, ``shapes``, is had through ``using`` alone: it makes an operation's results
and computes nothing, which plans memory on the meta device.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # the references need no Triton
    triton = None
    tl = SimpleNamespace(constexpr=int)  # what modules mention outside the bodies of kernels

# Triton chooses the interpreter when a kernel is defined, so the setting is read once, at import.
INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)
if INTERPRETED and triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    raise RuntimeError(  # it makes numbers of arrays of one element, which NumPy then refuses inside a kernel
        f"Triton {triton.__version__} cannot interpret kernels with NumPy {np.__version__}: "
        "install numpy<2.4 or triton>=3.7, or unset TRITON_INTERPRET"
    )


def jit(function=None, **options):
    """``triton.jit`` where Triton is installed; elsewhere the function is left as it is and never called."""
    if function is None:
        return lambda decorated: jit(decorated, **options)
    return function if triton is None else triton.jit(function, **options)


def source_digest() -> str:
    """Of this package's files: for caches of compiled graphs, whose own keys leave out what our operations do."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


_used: str | None = None  # what ``using`` asks for


@contextlib.contextmanager
def using(implementation: str) -> Iterator[None]:
    """Have ``reference`` or ``shapes`` stand for every operation, on any device and whatever ``RDMD_KERNELS`` says."""
    global _used
    before, _used = _used, implementation
    try:
        yield
    finally:
        _used = before


def computes() -> bool:
    """Tell whether results are wanted, and not their shapes alone: the cheap question of each launch."""
    return _used != "shapes"


def backend(device: torch.device | str) -> str:
    """Name the implementation for tensors on ``device``: ``"triton"``, ``"reference"`` or ``"shapes"``.

    The interpreter (``TRITON_INTERPRET=1``) runs on CPU tensors, but only if ``RDMD_KERNELS=triton`` asks for
    it.

    Raises:
        RuntimeError: ``RDMD_KERNELS`` has an unknown value, or Triton is wanted where it cannot run.
    """
    if _used is not None:
        return _used
    choice = os.environ.get("RDMD_KERNELS", "auto").strip().lower()
    if choice not in ("auto", "triton", "reference"):
        raise RuntimeError(f"RDMD_KERNELS={choice!r} is unknown; set it to auto, triton or reference")
    kind = torch.device(device).type
    if choice == "reference" or (choice == "auto" and kind != "cuda"):
        return "reference"
    if triton is None:
        raise RuntimeError(f"no Triton for tensors on {kind}; install triton or set RDMD_KERNELS=reference")
    if kind != "cuda" and not (kind == "cpu" and INTERPRETED):
        raise RuntimeError(
            f"Triton cannot run on {kind} tensors; unset RDMD_KERNELS, or set TRITON_INTERPRET=1 for the CPU"
        )
    return "triton"
