"""Options of the baselines. Levels are σ̃ = σ/α in data units, of images in [-1, 1]."""

from typing import Annotated, Literal

from pydantic import Field

from rdmd_fast.errors import InputError
from rdmd_fast.options import Options


class LevelOptions(Options):
    """The noise levels that a method steps through: EDM's (arXiv 2206.00364, Equation 5), falling to 0."""

    steps: int = Field(50, ge=1, le=10_000, description="noise levels above 0 (ours)")
    sigma_min: float | None = Field(
        None, gt=0, le=1e6, description="lowest of them; unset: EDM's 0.002, scaled by σ_data / 0.5"
    )
    rho: float = Field(7.0, ge=0.1, le=100, description="curvature of the levels (EDM: 7)")


class SDEditOptions(LevelOptions):
    """SDEdit (arXiv 2108.01073)."""

    method: Literal["sdedit"] = "sdedit"
    sigma0: float = Field(1.0, gt=0, le=1e6, description="level to which the source is noised: more is less faithful")
    solver: Literal["sde", "ancestral", "ode"] = Field(
        "sde",
        description="sde: Euler-Maruyama for the reverse SDE (paper); ancestral: the same with the posterior's "
        "variance (DDPM), better in few steps; ode: Heun's rule for the probability-flow ODE (EDM)",
    )


class ILVROptions(LevelOptions):
    """ILVR (arXiv 2108.02938)."""

    method: Literal["ilvr"] = "ilvr"
    factor: int = Field(4, ge=1, le=2**16, description="N of the low-pass φ_N: more is less faithful (paper: 2 to 64)")
    stop: float = Field(
        0.0, ge=0, le=1e6, description="level below which nothing is substituted: more is less faithful (paper: 0)"
    )
    sigma0: float | None = Field(
        None, gt=0, le=1e6, description="start from the source noised to this level; unset: from pure noise (paper)"
    )


class EGSDEOptions(LevelOptions):
    """EGSDE (arXiv 2207.06635)."""

    method: Literal["egsde"] = "egsde"
    sigma0: float = Field(1.0, gt=0, le=1e6, description="level to which the source is noised: more is less faithful")
    solver: Literal["sde", "ancestral"] = Field("sde", description="as SDEdit's (paper: sde)")
    lambda_s: float = Field(
        500.0, ge=0, le=1e9, description="weight of the realism expert, on the paper's scale (paper: 500)"
    )
    lambda_i: float = Field(
        2.0, ge=0, le=1e9, description="weight of the faithful expert, on the paper's scale: more is more faithful "
        "(paper: 2)"
    )  # fmt: skip
    factor: int = Field(
        4, ge=1, le=2**16, description="N of the faithful expert's low-pass (paper's code: 32 at 256×256)"
    )


class DDIBOptions(LevelOptions):
    """DDIB (arXiv 2203.08382)."""

    method: Literal["ddib"] = "ddib"
    sigma0: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="level of the latents that the domains share: less is more faithful; unset: EDM's 80, scaled by "
        "σ_data / 0.5 (paper: the noisiest)",
    )


class CycleDiffusionOptions(LevelOptions):
    """CycleDiffusion (arXiv 2210.05559)."""

    method: Literal["cyclediffusion"] = "cyclediffusion"
    sigma0: float = Field(
        1.0, gt=0, le=1e6, description="level at which the chains start (T_es): more is less faithful"
    )
    eta: float = Field(
        1.0, ge=0, le=1, description="noise of a step over the posterior's: 1 as DDPM, 0 as DDIM (paper: 0.1 and 1)"
    )


BaselineOptions = Annotated[
    SDEditOptions | ILVROptions | EGSDEOptions | DDIBOptions | CycleDiffusionOptions, Field(discriminator="method")
]
METHODS: dict[str, type[LevelOptions]] = {
    kind.model_fields["method"].default: kind
    for kind in (SDEditOptions, ILVROptions, EGSDEOptions, DDIBOptions, CycleDiffusionOptions)
}
NEEDS_SOURCE_TEACHER = ("ddib", "cyclediffusion")


def parse_options(values: dict) -> BaselineOptions:
    """Options of a method from plain values, as ``{"method": "sdedit", "sigma0": 0.5}``.

    Raises:
        InputError: no such method, an unknown key, or a value of another type or out of range.
    """
    method = values.get("method")
    if not isinstance(method, str) or method not in METHODS:
        raise InputError(f"baseline method {method!r}: name one of {', '.join(METHODS)}")
    return checked(METHODS[method], values, method)


def checked(kind: type[Options], values: dict, where: str) -> Options:
    """Read ``values`` as options of ``kind``; an InputError begins with ``where``."""
    known = ", ".join(name for name in kind.model_fields if name != "method")
    return kind.parse(values, where, f"unknown option {{}}, it takes {known}")
