"""FLOPs of networks and of a distillation's iteration, counted on shapes alone."""

import torch

from rdmd_fast.networks import build_network

_counted: dict[tuple, float] = {}  # a run's networks are mostly of one kind


def training_passes(adapters: bool) -> int:
    """Forward passes that a training pass costs: its backward pass counts as two, as one if adapters alone are trained.

    Frozen weights get no gradient; what adapters take themselves is left out.
    """
    return 2 if adapters else 3


def distillation_flops(
    generator: float, teacher: float, score: float, fake_updates: int, adapters: bool = False
) -> float:
    """Of an iteration, by those of forward passes: the first fake update shares the generator's rollout."""
    trained = training_passes(adapters) * (generator + fake_updates * score)
    return trained + teacher + score + max(fake_updates - 1, 0) * generator


def forward_flops(options, sample_shape: tuple[int, ...], conditioned: bool = False) -> float:
    """FLOPs of one sample's forward pass, counted on shapes alone."""
    from torch.utils.flop_counter import FlopCounterMode

    key = options.model_dump_json(), tuple(sample_shape), conditioned
    if key in _counted:
        return _counted[key]
    with torch.device("meta"):
        network = build_network(options, sample_shape, dropout=False, conditioned=conditioned)
        sample, c_noise = torch.empty(1, *sample_shape), torch.empty(1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(sample, c_noise)
    return _counted.setdefault(key, float(counter.get_total_flops()))


def count_parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
