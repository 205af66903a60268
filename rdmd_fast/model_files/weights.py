"""Weights of an export checked and loaded into a network."""

import torch

from rdmd_fast.errors import InputError
from rdmd_fast.model_files.adapted import whole
from rdmd_fast.model_files.export_format import ExportConfig
from rdmd_fast.networks import build_network
from rdmd_fast.networks.condition_embedding import conditioning_weights
from rdmd_fast.networks.text_options import TextOptions


def load_weights(network: torch.nn.Module, weights: dict[str, torch.Tensor], origin: str) -> None:
    """Load a state dict one to one; InputError as ``check_weights``."""
    check_weights(network.state_dict(), weights, origin)
    network.load_state_dict(weights)


def load_teacher_weights(network: torch.nn.Module, weights: dict[str, torch.Tensor], origin: str) -> None:
    """``load_weights`` into a network that may be told a condition: those layers, and no others, stay as they are."""
    load_weights(network, weights | conditioning_weights(network), origin)


def check_weights(own: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], origin: str) -> None:
    """Whether ``weights`` have the keys and shapes of a network's own state dict.

    Raises:
        InputError: names the first key or shape that differs.
    """
    for name, tensor in own.items():
        if name not in weights:
            raise InputError(f"{origin}: has no weight {name}, it is of another network")
        if weights[name].shape != tensor.shape:
            raise InputError(
                f"{origin}: weight {name} has shape {list(weights[name].shape)}, the network needs {list(tensor.shape)}"
            )
    surplus = next((name for name in weights if name not in own), None)
    if surplus:
        raise InputError(f"{origin}: weight {surplus} has no place in the network, it is of another one")


def expected_weights(config: ExportConfig, count: int, origin: str) -> dict[str, torch.Tensor]:
    """State dict, on the meta device, of the network that a configuration describes.

    Args:
        count: weights that are there: a network of many more layers is not even described.

    Raises:
        InputError: there can be no such network.
    """
    options = config.network
    layers = getattr(options, "depth", 0) + len(getattr(options, "channel_mult", ())) * getattr(
        options, "num_blocks", 0
    )
    if options.kind == "diffusers_unet":
        layers = len(options.unet.block_out_channels) * options.unet.layers_per_block
    elif isinstance(options, TextOptions):
        layers = options.layers
    if layers > count:
        raise InputError(f"{origin}: has {count} weights, too few for the layers that its configuration names")
    try:
        with torch.device("meta"):
            return _network_of(config).state_dict()
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None
    except (RuntimeError, OverflowError, TypeError, ValueError):
        raise InputError(f"{origin}: asks for a network of impossible size") from None


def rebuild(config: ExportConfig, weights: dict[str, torch.Tensor], origin: str) -> torch.nn.Module:
    """The raw network of an export, in evaluation mode, on the CPU; InputError where the weights are not its own."""
    config, weights = whole(config, weights, origin)
    check_weights(expected_weights(config, len(weights), origin), weights, origin)  # before it takes any memory
    network = _network_of(config)
    network.load_state_dict(weights)
    # As activations are: each convolution would else copy its weight into that layout, at every call.
    return network.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def _network_of(config: ExportConfig) -> torch.nn.Module:
    conditioned = config.transport_weights is not None
    return build_network(config.network, tuple(config.sample_shape), dropout=False, conditioned=conditioned)
