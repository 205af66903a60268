"""Other methods of unpaired translation on the same teachers, each from its paper's equations (see docs/baselines.md).

``translate(options, models, x, philox, positions)`` runs any of them; ``transport`` has the exact and the minibatch
transport maps of 2-D points.
"""

import torch

from rdmd_fast.baselines import cyclediffusion, ddib, egsde, ilvr, sdedit
from rdmd_fast.baselines.options import (
    METHODS,
    NEEDS_SOURCE_TEACHER,
    BaselineOptions,
    CycleDiffusionOptions,
    DDIBOptions,
    EGSDEOptions,
    ILVROptions,
    SDEditOptions,
    parse_options,
)
from rdmd_fast.baselines.solvers import Models, Noise, Translation
from rdmd_fast.errors import InputError
from rdmd_fast.randomness import Philox

__all__ = [
    "METHODS",
    "BaselineOptions",
    "CycleDiffusionOptions",
    "DDIBOptions",
    "EGSDEOptions",
    "ILVROptions",
    "Models",
    "SDEditOptions",
    "Translation",
    "parse_options",
    "translate",
]

_TRANSLATORS = {
    "sdedit": sdedit.translate,
    "ilvr": ilvr.translate,
    "egsde": egsde.translate,
    "ddib": ddib.translate,
    "cyclediffusion": cyclediffusion.translate,
}


@torch.no_grad()
def translate(
    options: BaselineOptions, models: Models, x: torch.Tensor, philox: Philox, positions: torch.Tensor
) -> Translation:
    """Translate a batch by a baseline.

    Args:
        options: of the method, as ``SDEditOptions(sigma0=0.5)``.
        models: on one device, as x is.
        x: sources [N, C, H, W] in [-1, 1], or points [N, D] where the method takes them.
        philox: key of all noise.
        positions: int64 [N] below 2^32, numbers of the samples: with the seed they determine the noise, so that
            outputs do not depend on how samples are batched.

    Raises:
        InputError: a model that the method needs is missing or of another shape, or options do not fit the samples.
    """
    if options.method in NEEDS_SOURCE_TEACHER and models.source is None:
        raise InputError(f"{options.method}: needs a teacher of the source domain too (--source-teacher)")
    if options.method == "egsde" and options.lambda_s and models.energy is None:
        raise InputError("egsde: needs an energy network (--energy, of `rdmd baseline train-energy`), or lambda_s=0")
    _check_shapes(models, x)
    return _TRANSLATORS[options.method](options, models, x, Noise(philox, positions, x))


def _check_shapes(models: Models, x: torch.Tensor) -> None:
    for name, model in models._asdict().items():
        config = getattr(model, "config", None)
        if config is not None and tuple(config.sample_shape) != tuple(x.shape[1:]):
            raise InputError(
                f"{name} network is for samples of shape {tuple(config.sample_shape)}, these are {tuple(x.shape[1:])}"
            )
