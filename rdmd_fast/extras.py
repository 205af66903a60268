"""Installed packages: this one's version; optional ones, imported where they are needed and named where missing."""

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from types import ModuleType

from rdmd_fast.errors import InputError


def own_version() -> str:
    """This package's version as it was installed; "unknown" of a folder on the path."""
    try:
        return importlib.metadata.version("rdmd_fast")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``; InputError names the extra to install where it is missing, else why it cannot be imported."""
    check_installed(module.partition(".")[0], extra)
    hide_own_kernels()
    try:
        return importlib.import_module(module)
    except Exception as error:  # of whatever it needs itself
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"{module} is installed but cannot be imported ({reason}), mend its installation") from error


def check_installed(package: str, extra: str) -> None:
    """``require`` of a package that is imported later, if at all: its import takes a second and memory."""
    if sys.modules.get(package) is None and importlib.util.find_spec(package) is None:
        name = "POT" if package == "ot" else package
        raise InputError(f"{name} is not installed: run `pip install rdmd_fast[{extra}]`")


@contextlib.contextmanager
def quiet(*libraries: ModuleType) -> Iterator[None]:
    """diffusers and transformers without warnings and progress bars of their own: what matters is said by us."""
    with contextlib.ExitStack() as stack:
        for library in libraries:
            log = library.utils.logging
            stack.callback(log.set_verbosity, log.get_verbosity())
            log.set_verbosity_error()
            if log.is_progress_bar_enabled():
                stack.callback(log.enable_progress_bar)
                log.disable_progress_bar()
        yield


def hide_own_kernels() -> None:
    """transformers imports what the top-level name `kernels` finds: in the repository's root our folder, which refuses.

    The name is left to another package where that is installed.
    """
    if "kernels" in sys.modules:
        return
    found, own = importlib.util.find_spec("kernels"), importlib.util.find_spec("rdmd_fast.kernels")
    if found and own and found.origin and own.origin and os.path.samefile(found.origin, own.origin):
        sys.modules["kernels"] = None
