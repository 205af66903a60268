"""Transport costs c(x, y) between a source image and its translation."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from .kernels.rdmd_gradient import elementwise_cost
from .options import Options


class CostOptions(Options):
    """Which transport cost is paid; every one is a sum over a sample's elements."""

    kind: Literal["squared_l2", "l1", "pseudo_huber"] = Field(
        "squared_l2", description="squared_l2: ‖x - y‖² (paper); l1 and pseudo_huber act elementwise (ours)"
    )
    delta: float = Field(
        0.1, gt=0, description="pseudo_huber only: where it turns from squared to absolute, data units (ours)"
    )


def transport_cost(x: torch.Tensor, y: torch.Tensor, options: CostOptions) -> torch.Tensor:
    """c(x, y) of each pair.

    Args:
        x, y: [N, ...] of one shape, data units.

    Returns:
        float32 [N]: sums over the elements; divide by their number for the form per element.
    """
    value, _ = elementwise_cost(y.float() - x.float(), options.kind, options.delta)
    return value.flatten(1).sum(1)
