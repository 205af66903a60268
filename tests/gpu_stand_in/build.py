"""Builds device.cpp, once for each version of it, of PyTorch and of Python; kept in the user's cache."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

NAME = "gpu_stand_in_device"
SOURCE = Path(__file__).with_name("device.cpp")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rdmd_fast" / "gpu_stand_in"


def obstacle() -> str | None:
    """Say what this machine lacks for a build, None if nothing."""
    if _compiler() is None:
        return "the GPU stand-in needs a C++ compiler: install g++ or clang++, or name one in CXX"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "the GPU stand-in needs the headers of Python: install its development package"
    import torch

    if torch.version.cuda or torch.version.hip:
        return "the GPU stand-in needs a CPU build of PyTorch: in another one CUDA has its own kernels"
    return None


def load() -> ModuleType:
    """Build the library unless that has been done, and import it."""
    library = _library()
    if not library.exists():
        _build(library)
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(library))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(NAME, loader))
    loader.exec_module(module)
    return module


def _compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def _library() -> Path:
    import torch

    made_of = [SOURCE.read_bytes(), Path(__file__).read_bytes(), torch.__version__.encode(), sys.version.encode()]
    digest = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]
    return CACHE / f"{NAME}_{digest}.so"


def _build(library: Path) -> None:
    """Compile to a file of this process, then rename: others that build the same at once lose nothing but time.

    Raises:
        RuntimeError: the compiler refused.
    """
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    library.parent.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}.so")
    command = [_compiler(), str(SOURCE), "-o", str(unfinished), "-shared", "-fPIC", "-std=c++20", "-O1", "-w"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += [f"-I{folder}" for folder in (*include_paths(), sysconfig.get_path("include"))]
    command += [f"-L{folder}" for folder in library_paths()] + ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    compiled = subprocess.run(command, capture_output=True, text=True)
    if compiled.returncode:
        raise RuntimeError(f"cannot build the GPU stand-in:\n{' '.join(command)}\n{compiled.stderr[-4000:]}")
    unfinished.replace(library)
