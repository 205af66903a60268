"""Transport costs c(x, y) between a source image and its translation."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator

from rdmd_fast.errors import InputError
from rdmd_fast.kernels.rdmd_gradient import elementwise_cost
from rdmd_fast.networks.feature_networks import LPIPS, FeatureNetwork, PerceptualDistance, PixelInput, naming
from rdmd_fast.options import Options


class CostOptions(Options):
    """Which transport cost is paid: an elementwise one, one in a network's features, or the sum of both.

    c(x, y) = elementwise cost + feature_weight ‖φ(x) - φ(y)‖²; all are sums over elements or features.
    """

    kind: Literal["squared_l2", "l1", "pseudo_huber", "features"] = Field(
        "squared_l2",
        description="squared_l2: ‖x - y‖² (paper); l1 and pseudo_huber act elementwise; features: no elementwise cost, "
        "that of `features` alone (ours)",
    )
    delta: float = Field(
        0.1, gt=0, description="pseudo_huber only: where it turns from squared to absolute, data units (ours)"
    )
    features: str | None = Field(
        None,
        description="adds ‖φ(x) - φ(y)‖² in the features of a TorchScript file, a program that is run, or the distance "
        "of `lpips` (ours)",
    )
    feature_weight: float = Field(
        1.0, gt=0, description="factor of the features' cost beside the elementwise one (ours)"
    )
    feature_input: PixelInput = Field(
        "auto",
        description="how the file takes images: uint8 0 to 255 (FID's Inception), float [-1, 1]; auto: uint8 if its "
        "forward has an argument return_features (ours)",
    )

    @model_validator(mode="after")
    def _consistent(self):
        if self.features is None:
            if self.kind == "features":
                raise ValueError("features: missing, name a TorchScript file or lpips")
            if self.feature_weight != 1 or self.feature_input != "auto":
                raise ValueError("feature_weight and feature_input: say nothing without features, name a file or lpips")
        return self

    @property
    def elementwise(self) -> str:
        """The elementwise part, one of kernels.rdmd_gradient.COSTS."""
        return "none" if self.kind == "features" else self.kind


def transport_cost(x: torch.Tensor, y: torch.Tensor, options: CostOptions) -> torch.Tensor:
    """The elementwise part of c(x, y) of each pair.

    Args:
        x, y: [N, ...] of one shape, data units.

    Returns:
        float32 [N]: sums over the elements; divide by their number for the form per element.
    """
    value, _ = elementwise_cost(y.float() - x.float(), options.elementwise, options.delta)
    return value.flatten(1).sum(1)


class FeatureCost:
    """‖φ(x) - φ(y)‖² summed over all features of a frozen network, or LPIPS's distance of x and y.

    ``feature_cost(x, y)`` of samples [N, ...] in data units gives the cost [N] and its derivative with respect to y
    [N, ...], both in fp32 (in fp64 for a network in fp64). No gradient reaches anything else.

    Args:
        network: a FeatureNetwork or PerceptualDistance.
    """

    def __init__(self, network: FeatureNetwork | PerceptualDistance):
        self.network = network

    @classmethod
    def of(cls, options: CostOptions, shape: tuple[int, ...], device: torch.device) -> FeatureCost | None:
        """What the options ask for, tried on samples of ``shape``; None if that is no features.

        Raises:
            InputError: no such network, or one that does not take the samples or lets no gradient through.
        """
        if options.features is None:
            return None
        try:
            if options.features == LPIPS:
                cost = cls(PerceptualDistance(device))
            else:
                cost = cls(FeatureNetwork(options.features, options.feature_input, device))
        except InputError as error:
            raise InputError(f"rdmd.cost.features: {error}") from None
        cost._try(shape, device, f"rdmd.cost.features {options.features}")
        return cost

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            variable = y.detach().requires_grad_()
            cost = self._distance(x.detach(), variable)
            (derivative,) = torch.autograd.grad(cost.sum(), variable)
        return cost.detach(), derivative

    def _distance(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if isinstance(self.network, PerceptualDistance):
            return self.network(x.float(), y)
        with torch.no_grad():
            features = self.network(x)
        difference = self.network(y) - features
        if difference.dtype not in (torch.float32, torch.float64):
            difference = difference.float()
        return difference.square().flatten(1).sum(1)

    def _try(self, shape: tuple[int, ...], device: torch.device, what: str) -> None:
        """Whether it takes samples of ``shape`` and lets gradients through, ahead of a training."""
        ramp = torch.linspace(-1, 1, 2 * math.prod(shape), device=device).view(2, *shape)
        with naming(what, (2, *shape), device, "train.micro_batch_size"):
            probe = self._distance(ramp, ramp.flip(0).requires_grad_())
        if probe.shape != (2,):
            raise InputError(f"{what}: gives features of {len(probe)} samples for 2, name a network of single samples")
        if not probe.requires_grad:
            raise InputError(f"{what}: lets no gradient through, save the network without no_grad and detach")
        with naming(what, (2, *shape), device, "train.micro_batch_size"):
            cost, derivative = self(ramp, ramp.flip(0))
        if not (cost.isfinite().all() and derivative.isfinite().all()):
            raise InputError(f"{what}: gives values or gradients that are not finite for samples in [-1, 1]")
