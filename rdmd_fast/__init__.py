"""RDMD: Regularized Distribution Matching Distillation for one-step unpaired image-to-image translation."""

__all__ = ["load_denoiser", "load_generator"]


def __getattr__(name):
    if name == "__version__":
        from rdmd_fast.extras import own_version

        return own_version()
    # torch loads with the first use, not with `rdmd --help`.
    if name in __all__:
        from rdmd_fast.model_files import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
