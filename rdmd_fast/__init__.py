"""RDMD: Regularized Distribution Matching Distillation for one-step unpaired image-to-image translation."""

__version__ = "0.1.0"
__all__ = ["load_denoiser", "load_generator"]


def __getattr__(name):
    # torch loads with the first use, not with `rdmd --help`.
    if name in __all__:
        from .networks import exported

        return getattr(exported, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
