"""Exports that are an adapter over a text-to-image pipeline's weights, which stay where they are."""

from pathlib import Path

import torch

from rdmd_fast.errors import InputError
from rdmd_fast.model_files.export_format import ExportConfig, network_sha256
from rdmd_fast.model_files.text_pipeline import INDEX, read_text_pipeline
from rdmd_fast.networks.adapters import adapter_of, file_weights, merged
from rdmd_fast.networks.text_options import LoRAOptions


def whole(
    config: ExportConfig, weights: dict[str, torch.Tensor], origin: str
) -> tuple[ExportConfig, dict[str, torch.Tensor]]:
    """An export with the pipeline's weights in it, the adapter merged into them; others as they are.

    Raises:
        InputError: the pipeline is not there or not the one that was trained on, or the adapter does not fit it.
    """
    if config.base_sha256 is None:
        return config, weights
    if not (Path(config.pipeline) / INDEX).is_file():
        raise InputError(
            f"{origin}: is an adapter over the pipeline {config.pipeline}, which is not there: put it back, or write "
            "where it is into `pipeline` of config.json"
        )
    base_config, base = read_text_pipeline(config.pipeline)
    if network_sha256(base_config, base) != config.base_sha256:
        raise InputError(
            f"{origin}: is an adapter over another pipeline than {config.pipeline} is now (their hashes differ), name "
            "that one in `pipeline` of config.json"
        )
    adapter = adapter_of(weights)
    rest = {name: tensor for name, tensor in weights.items() if name not in adapter}
    return config.model_copy(update={"base_sha256": None}), merged(base, adapter, origin) | rest


def exported(
    state: dict[str, torch.Tensor], lora: LoRAOptions | None, beneath: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Weights of an export from the state dict of a network in training.

    Args:
        lora: None for a network without adapters, whose state dict it is.
        beneath: the adapter of what it was trained on.
    """
    return state if lora is None else file_weights(state, lora.scale, beneath)
