"""Raw networks for vectors: an MLP that reads the noise level, and an affine map."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdmd_fast.errors import InputError
from rdmd_fast.networks.condition_embedding import ConditionEmbedding


class ConditionedLinear(nn.Linear):
    """A linear layer whose bias comes from outside, one row a sample: one fused matrix product."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return torch.addmm(bias, x, self.weight.t())


class MLP(nn.Module):
    """A SiLU multilayer perceptron with the noise level (and a class) added before every hidden activation.

    One matrix product turns the noise features into the biases of all hidden layers, which keeps a forward at
    about ten operations: what counts for small batches on a CPU. Frequencies are fixed, 1/8 to 4 cycles per
    c_noise: for EDM's ln(sigma)/4, periods from 32 down to 1 in ln(sigma). The last layer starts at zero,
    so F = 0 and a denoiser starts at c_skip x.

    The output is scaled by sigma / sqrt(1 + sigma^2), sigma = exp(4 c_noise). Where a density is smooth EDM's F
    falls like sigma, since D = x + sigma^2 score; a network of bounded error there would leave a score whose error
    grows like 1 / sigma, which the uniform weighting of RDMD feels in full.

    Args:
        dim: elements of a sample.
        hidden: width of the hidden layers.
        depth: number of hidden layers, at least 1.
        embedding: number of sinusoidal features of c_noise, even.
        label_dim: length of one-hot class labels; 0 for none.
        conditioned: whether the network is told a further number by sample, which adds to the same biases.
    """

    def __init__(
        self,
        dim: int = 2,
        hidden: int = 256,
        depth: int = 3,
        embedding: int = 64,
        label_dim: int = 0,
        conditioned: bool = False,
    ):
        super().__init__()
        if min(dim, hidden, depth) < 1 or embedding < 2 or embedding % 2 or label_dim < 0:
            raise InputError(
                f"MLP({dim=}, {hidden=}, {depth=}, {embedding=}, {label_dim=}): "
                "use positive sizes and an even embedding of at least 2"
            )
        self.label_dim = label_dim
        frequencies = 2 * math.pi * torch.logspace(-3, 2, embedding // 2, base=2.0)
        self.register_buffer("frequencies", frequencies.repeat(2), persistent=False)
        # sin(a + pi/2) = cos(a): one call serves both halves.
        phases = torch.tensor([0.0, math.pi / 2]).repeat_interleave(embedding // 2)
        self.register_buffer("phases", phases, persistent=False)
        self.conditioning = nn.Linear(embedding + label_dim, depth * hidden)
        widths = [dim] + [hidden] * depth
        self.hidden_layers = nn.ModuleList(map(ConditionedLinear, widths[:-1], widths[1:]))
        self.output_layer = nn.Linear(hidden, dim)
        nn.init.zeros_(self.output_layer.weight)
        nn.init.zeros_(self.output_layer.bias)
        self.map_condition = ConditionEmbedding(depth * hidden) if conditioned else None

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """The raw output F.

        Args:
            x: [N, dim], scaled by c_in.
            c_noise: [N].
            class_labels: [N, label_dim] one-hot; None means no class; ignored if label_dim is 0.
            augment_labels: ignored.
            condition: [N] in [-1, 1], None for 0; ignored by a network built without.

        Returns:
            [N, dim] in x's dtype.
        """
        dtype = self.conditioning.weight.dtype  # DeepSpeed casts parameters alone
        features = torch.sin(torch.addcmul(self.phases, c_noise[:, None], self.frequencies)).to(dtype)
        if self.label_dim:
            if class_labels is None:
                class_labels = features.new_zeros(len(x), self.label_dim)
            features = torch.cat([features, class_labels.to(dtype)], dim=1)
        biases = self.conditioning(features)
        if self.map_condition is not None:
            biases = biases + self.map_condition(condition, c_noise)
        biases = biases.chunk(len(self.hidden_layers), dim=1)
        h = x.to(dtype)
        for layer, bias in zip(self.hidden_layers, biases, strict=True):
            h = F.silu(layer(h, bias))
        gain = torch.sigmoid(8 * c_noise[:, None]).sqrt().to(dtype)
        return (gain * self.output_layer(h)).to(x.dtype)


class AffineMap(nn.Module):
    """x -> A x + b, the generator family with closed-form optima.

    Args:
        dim: elements of a sample.
        scale: A starts at scale times a rotation (the identity unless dim is 2); b starts at 0.
        angle: initial rotation in degrees, anticlockwise; dim must be 2 unless it is 0.
    """

    def __init__(self, dim: int = 2, scale: float = 1.0, angle: float = 0.0):
        super().__init__()
        if angle and dim != 2:
            raise InputError(f"AffineMap: angle={angle} with dim={dim}: a rotation needs dim=2, or use angle=0")
        matrix = torch.eye(dim)
        if angle:
            cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            matrix = torch.tensor([[cos, -sin], [sin, cos]])
        self.weight = nn.Parameter(scale * matrix)
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor | None = None,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Map x [N, dim] to [N, dim] in x's dtype; the other arguments are ignored."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)
