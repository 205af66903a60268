"""A number that networks are told beside the noise level: how a sample's λ reaches generator and fake score."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdmd_fast.networks.unet_layers import ExactTables, Linear

NAME = "map_condition"  # the attribute that holds it, in every network: a teacher's weights have nothing there


class ConditionEmbedding(ExactTables):
    """[N] conditions in [-1, 1] -> [N, width], zero before training: a network of a teacher's weights is the teacher.

    Sines and cosines of 1/4 to 2 cycles over the interval, a layer, SiLU, a layer.
    """

    FEATURES, HIDDEN = 16, 128
    # Adam moves a weight by its learning rate whatever the gradient, and these begin at zero: the gain lets them catch
    # up with weights that a teacher has.
    GAIN = 3.0
    tables = ("frequencies",)

    def __init__(self, width: int):
        super().__init__()
        frequencies = math.pi / 4 * torch.arange(1, self.FEATURES // 2 + 1)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.layer0, self.layer1 = Linear(self.FEATURES, self.HIDDEN), Linear(self.HIDDEN, width)
        nn.init.zeros_(self.layer1.weight)
        nn.init.zeros_(self.layer1.bias)

    def forward(self, condition: Tensor | None, c_noise: Tensor) -> Tensor:
        """None stands for 0, the middle, for each of the samples of ``c_noise`` [N]."""
        if condition is None:
            condition = torch.zeros_like(c_noise)
        phase = condition.to(torch.promote_types(condition.dtype, torch.float32)).outer(self.frequencies)
        features = torch.cat([phase.sin(), phase.cos()], dim=1)
        return self.GAIN * self.layer1(F.silu(self.layer0(features)))


def conditioning_weights(network: nn.Module) -> dict[str, Tensor]:
    """Of a state dict, those that tell the network its condition; none in a network that has none."""
    return {name: value for name, value in network.state_dict().items() if name.startswith(f"{NAME}.")}
