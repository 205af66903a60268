"""Fused operations of the RDMD iteration, one a file, imported as ``rdmd_fast.kernels``."""

if __name__ != "rdmd_fast.kernels":
    # The top-level name belongs to another package on PyPI; two copies of a kernel would also register twice.
    raise ImportError(
        f"this folder is the package rdmd_fast.kernels, not {__name__}: run `pip install -e .` in the repository "
        "root and write `from rdmd_fast import kernels`"
    )
