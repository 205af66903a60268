"""Installed packages: this one's version; optional ones, imported where they are needed and named where missing."""

import importlib.metadata
import importlib.util
from types import ModuleType

from rdmd_fast.errors import InputError


def own_version() -> str:
    """This package's version as it was installed; "unknown" of a folder on the path."""
    try:
        return importlib.metadata.version("rdmd_fast")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``; raises InputError that names the extra to install when it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing(module, extra) from error


def check_installed(package: str, extra: str) -> None:
    """``require`` of a package that is imported later, if at all: its import takes a second and memory."""
    if importlib.util.find_spec(package) is None:
        raise _missing(package, extra)


def _missing(module: str, extra: str) -> InputError:
    package = "POT" if module == "ot" else module.partition(".")[0]
    return InputError(f"{package} is not installed: run `pip install rdmd_fast[{extra}]`")
