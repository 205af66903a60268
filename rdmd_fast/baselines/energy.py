"""EGSDE's energy network: a classifier of noised images into source and target domain (arXiv 2207.06635, Section 3.2).

The encoder half of EDM's DDPM++ with a linear head on its mean features; the paper fine-tunes ADM's ImageNet classifier
and drops the last layer as we do. Trained by cross-entropy on x + σ ε at random σ, half of each batch from each domain.

DIR/config.json            the network, its data shape
DIR/energy.safetensors     weights, fp32
"""

import json
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from rdmd_fast.baselines.options import checked
from rdmd_fast.diffusion import LogUniformSigma, SigmaOptions
from rdmd_fast.errors import InputError
from rdmd_fast.files import read_text
from rdmd_fast.model_files.export_format import MOST_BYTES, read_tensors
from rdmd_fast.model_files.weights import check_weights
from rdmd_fast.networks.options import MOST_CHANNELS, MOST_LEVELS, Multiple
from rdmd_fast.networks.song_unet import SongUNet
from rdmd_fast.networks.unet_layers import GroupNormSiLU, Linear
from rdmd_fast.options import Options
from rdmd_fast.randomness import Philox, Stream

FORMAT = 1
SOURCE, TARGET = 0.0, 1.0  # labels


class ClassifierOptions(Options):
    """The energy network. Resolution and channels follow from the data."""

    model_channels: int = Field(
        32, ge=8, le=MOST_CHANNELS, description="channels at full resolution (ours, for small images; ADM: 128)"
    )
    channel_mult: list[Multiple] = Field(
        [1, 2],
        min_length=1,
        max_length=MOST_LEVELS,
        description="channels by resolution, as multiples (ours, for small images; ADM at 256×256: [1, 1, 2, 2, 4, 4])",
    )
    num_blocks: int = Field(1, ge=1, le=64, description="residual blocks by resolution (ours; ADM: 2)")
    attn_resolutions: list[int] = Field([], description="resolutions with self-attention, pixels (ADM: [32, 16, 8])")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout while it trains (ours)")


class EnergyTrainingOptions(Options):
    """Training of the energy network."""

    network: ClassifierOptions = Field(default_factory=ClassifierOptions)
    sigma: SigmaOptions = Field(default_factory=LogUniformSigma, description="distribution of σ̃ (ours)")
    sigma_data: float = Field(0.5, ge=1e-6, le=1e6, description="standard deviation of the data, data units (EDM: 0.5)")
    steps: int = Field(1000, ge=1, le=10**8, description="updates (ours; paper: 5000)")
    batch_size: int = Field(64, ge=2, le=2**20, multiple_of=2, description="images of both domains (ours; paper: 32)")
    lr: float = Field(3e-4, gt=0, le=1, description="AdamW's step size (paper: 3e-4)")
    weight_decay: float = Field(0.05, ge=0, le=10, description="AdamW's weight decay (paper: 0.05)")


class EnergyConfig(Options):
    """config.json of an energy network."""

    format: Literal[1] = FORMAT
    role: Literal["energy"] = "energy"
    network: ClassifierOptions
    sample_shape: list[Annotated[int, Field(ge=1, le=2**16)]] = Field(min_length=3, max_length=3)
    sigma_data: float = Field(ge=1e-6, le=1e6)
    step: int = Field(ge=0)


class DomainClassifier(SongUNet):
    """forward(x [N, C, H, W] scaled by c_in, c_noise [N]) -> logits of the target domain [N]."""

    def build_decoder(self, widths: list[int], num_blocks: int) -> torch.nn.ModuleDict:
        return torch.nn.ModuleDict({"norm": GroupNormSiLU(widths[-1], eps=1e-6), "head": Linear(widths[-1], 1)})

    def features(self, x: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
        """[N, channels, h, w]: all but the last layer."""
        embedding = self.embed(c_noise, None, None)
        h = x.to(embedding.dtype, memory_format=torch.channels_last)
        return self.dec["norm"](self.encode(h, self.modulations(embedding))[0])

    def forward(self, x: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
        return self.dec["head"](self.features(x, c_noise).mean((2, 3)))[:, 0]


class Energy(torch.nn.Module):
    """``energy(state, sigma)`` and ``energy.features(state, sigma)`` of states x + σ ε, σ a number or [N]."""

    def __init__(self, network: DomainClassifier, config: EnergyConfig):
        super().__init__()
        self.model, self.config = network, config

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dec["head"].weight.dtype

    def features(self, state: torch.Tensor, sigma) -> torch.Tensor:
        """[N, channels, h, w], differentiable in ``state``."""
        return self.model.features(*self._scaled(state, sigma))

    def forward(self, state: torch.Tensor, sigma) -> torch.Tensor:
        """Logits of the target domain, [N]."""
        return self.model(*self._scaled(state, sigma))

    def _scaled(self, state: torch.Tensor, sigma) -> tuple[torch.Tensor, torch.Tensor]:
        sigma = torch.as_tensor(sigma, dtype=torch.float64).expand(len(state))
        numbers = torch.stack([(sigma**2 + self.config.sigma_data**2).rsqrt(), sigma.log() / 4])
        scale, c_noise = numbers.to(state.device, self.dtype, non_blocking=True)
        return scale[:, None, None, None] * state.to(self.dtype), c_noise


def build_energy(config: EnergyConfig, dropout: bool = True) -> Energy:
    """An energy network, freshly initialised; InputError if it does not fit the samples."""
    channels, height, width = config.sample_shape
    halvings = 2 ** (len(config.network.channel_mult) - 1)
    if height != width or height % halvings:
        raise InputError(
            f"the energy network needs square images whose side divides by {halvings}, these are {height}×{width}: "
            "set network.channel_mult"
        )
    arguments = config.network.model_dump()
    if not dropout:
        arguments["dropout"] = 0.0
    network = DomainClassifier(img_resolution=height, in_channels=channels, out_channels=channels, **arguments)
    return Energy(network, config)


def load_energy(folder: str | Path) -> Energy:
    """The energy network of a folder of ``rdmd baseline train-energy``, on the CPU, in evaluation mode.

    Raises:
        InputError: there is none, or a damaged one.
    """
    folder = Path(folder)
    path, remedy = folder / "config.json", "train it again"
    if not path.is_file():
        raise InputError(f"{folder}: no energy network there (no config.json), `rdmd baseline train-energy` makes one")
    try:
        values = json.loads(read_text(path, MOST_BYTES))
        if not isinstance(values, dict):
            raise ValueError
    except (OSError, ValueError, RecursionError):
        raise InputError(f"{path}: not readable as JSON, {remedy}") from None
    if values.get("role") != "energy":
        raise InputError(f"{folder}: holds a {str(values.get('role'))[:40]}, an energy network is needed")
    config = checked(EnergyConfig, values, str(path))
    weights = read_tensors(folder / "energy.safetensors", remedy)
    _check_fits(config, weights, str(folder))
    energy = build_energy(config, dropout=False)
    energy.model.load_state_dict(weights)
    return energy.eval().requires_grad_(False)


def _check_fits(config: EnergyConfig, weights: dict[str, torch.Tensor], origin: str) -> None:
    """Before the network takes any memory."""
    if len(config.network.channel_mult) * config.network.num_blocks > len(weights):
        raise InputError(f"{origin}: has {len(weights)} weights, too few for the layers that its configuration names")
    try:
        with torch.device("meta"):
            own = build_energy(config).model.state_dict()
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None
    except (RuntimeError, OverflowError, TypeError, ValueError):
        raise InputError(f"{origin}: asks for a network of impossible size") from None
    check_weights(own, weights, origin)


def train_energy(
    options: EnergyTrainingOptions, source, target, seed: int, device: torch.device, progress=None
) -> tuple[Energy, float]:
    """Train a classifier of two domains.

    Args:
        source, target: streams with ``shape`` and ``batch(positions)``, as ``data.stream.SampleStream``.
        seed: of weights, dropout and all draws; samples, levels and noise are functions of seed and position.
        device: where it trains.
        progress: called after each update.

    Returns:
        The network, in evaluation mode, and its accuracy over the last tenth of the updates, each ahead of its update.

    Raises:
        InputError: the domains' samples differ in shape, or do not fit the network; or the weights diverged.
    """
    if tuple(source.shape) != tuple(target.shape) or len(source.shape) != 3:
        raise InputError(
            f"source and target hold samples of shape {tuple(source.shape)} and {tuple(target.shape)}: give images, or "
            "latents, of one shape"
        )
    philox = Philox(seed)
    config = EnergyConfig(
        network=options.network, sample_shape=list(source.shape), sigma_data=options.sigma_data, step=options.steps
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        energy = build_energy(config).to(device).train()
        optimizer = torch.optim.AdamW(energy.parameters(), options.lr, weight_decay=options.weight_decay)
        right = []
        for step in range(options.steps):
            state, sigma, labels = noised_batch(options, source, target, philox, step, device)
            logits = energy(state, sigma)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step >= options.steps - max(1, options.steps // 10):
                right.append(((logits > 0) == (labels > 0)).double().mean())
            if progress:
                progress()
    if not all(torch.isfinite(parameter).all() for parameter in energy.parameters()):
        raise InputError(f"the energy network diverged within {options.steps} updates: lower lr={options.lr:g}")
    accuracy = float(torch.stack(right).mean())
    trained = build_energy(config, dropout=False)
    trained.load_state_dict(energy.state_dict())
    return trained.to(device).eval().requires_grad_(False), accuracy


def train_on_shards(
    options: EnergyTrainingOptions, source: str, target: str, seed: int, device: torch.device, progress=None
) -> tuple[Energy, float]:
    """``train_energy`` on the packed sets of two domains, in an order of the seed; on the CPU afterwards."""
    from rdmd_fast.data.shards.shard_set import ShardSet
    from rdmd_fast.data.stream import SampleStream

    philox = Philox(seed)
    streams = [
        SampleStream(ShardSet(folder), philox, order)
        for folder, order in ((source, Stream.SOURCE_ORDER), (target, Stream.TARGET_ORDER))
    ]
    energy, accuracy = train_energy(options, *streams, seed, device, progress)
    return energy.cpu(), accuracy


def noised_batch(options: EnergyTrainingOptions, source, target, philox: Philox, step: int, device):
    """States x + σ ε [B, C, H, W], σ float64 [B] and labels [B]: the first half is of the source."""
    half = options.batch_size // 2
    drawn = step * half + torch.arange(half)
    positions = step * options.batch_size + torch.arange(options.batch_size)
    clean = torch.cat([in_data_units(each.batch(drawn).to(device, non_blocking=True)) for each in (source, target)])
    sigma = options.sigma.quantile(philox.uniform(Stream.ENERGY_SIGMA, positions)[:, 0])
    noise = philox.normal(Stream.ENERGY_NOISE, positions, tuple(clean.shape[1:]), device)
    labels = torch.tensor([SOURCE, TARGET]).repeat_interleave(half).to(device, non_blocking=True)
    return clean + sigma.float().to(device, non_blocking=True)[:, None, None, None] * noise, sigma, labels


def in_data_units(samples: torch.Tensor) -> torch.Tensor:
    """uint8 images as float32 in [-1, 1]; latents as they are."""
    from rdmd_fast.kernels.image_normalize import image_normalize

    return image_normalize(samples, torch.float32) if samples.dtype == torch.uint8 else samples
