"""The cases of an iteration's benchmark: networks, samples and configurations of the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.networks import CUDA, build
from rdmd_fast.config import Config, load_config
from rdmd_fast.data.packing.shard_writer import ShardWriter
from rdmd_fast.diffusion import DiffusionOptions
from rdmd_fast.model_files.export_format import ExportConfig, write_export
from rdmd_fast.networks.options import DhariwalUNetOptions, SongUNetOptions

ROOT = Path(__file__).parent.parent
IMAGES = 64  # distinct sources
SIZES = {"digits": 8, "songunet32": 32, "songunet64": 64, "adm64": 64}
BATCHES = {
    "toy": 512, "digits": 64, "songunet32": 128 if CUDA else 16, "songunet64": 64 if CUDA else 4,
    "adm64": 32 if CUDA else 2,
}  # fmt: skip


def sample_shape(case: str) -> tuple[int, ...]:
    return (2,) if case == "toy" else (3, SIZES[case], SIZES[case])


def run_config(
    case: str, dtype: str, folder: Path, more: Sequence[str] = (), batch: int | None = None, stage: int = 0
) -> Config:
    """Configure a run of the case at a ZeRO stage; ``more`` overrides."""
    common = [
        f"run_dir={folder}/run", f"train.dtype={dtype}", f"train.global_batch_size={batch or BATCHES[case]}",
        "train.steps=1000000000", f"deepspeed.zero_optimization.stage={stage}", "telemetry.tensorboard=false",
        "telemetry.log_every=1000000", "validation.every=0", "rdmd.fake_updates=1",
    ]  # fmt: skip
    if case == "toy":
        toy = ROOT / "configs/toy/gaussian_to_8gaussians.yaml"
        return load_config(str(toy), [*common, "rdmd.fake_warmup=0", *more])
    # Random weights, with all branches alive.
    overrides = [*common, "rdmd.transport_weight=0.1", *more]
    return distillation(folder, network_options(case), sample_shape(case), build(case), overrides)


def compile_as(mode: str | None) -> list[str]:
    """Override ``train.compile``, unless by None."""
    return [f"train.compile={mode}"] if mode else []


def distillation(folder: Path, options, shape: tuple[int, ...], network: torch.nn.Module, overrides: list[str]):
    """Configure a distillation of ``network``, on random samples that are packed below ``folder``."""
    write_teacher(folder / "teacher", options, shape, network)
    (folder / "config.yaml").write_text("stage: rdmd\n")
    data = [f"data.source={packed(shape, folder)}", f"teacher={folder}/teacher"]
    return load_config(str(folder / "config.yaml"), [*overrides, *data])


def packed(shape: tuple[int, ...], folder: Path) -> Path:
    """Pack random samples as shards: images of three channels, latents of others."""
    random = np.random.default_rng(0)
    with ShardWriter(folder / "shards", {}, "benchmarks", IMAGES) as writer:
        for number in range(IMAGES):
            if shape[0] == 3:
                writer.write(f"{number:03d}", random.integers(0, 256, (*shape[1:], 3), dtype=np.uint8))
            else:
                writer.write(f"{number:03d}", random.standard_normal(shape, dtype=np.float32))
        writer.commit()
    return folder / "shards"


def write_teacher(folder: Path, options, shape: tuple[int, ...], network: torch.nn.Module) -> None:
    """Export ``network`` as a teacher."""
    export = ExportConfig(role="teacher", network=options, sample_shape=list(shape), diffusion=DiffusionOptions())
    write_export(folder, export, network.state_dict())


def network_options(case: str):
    return {
        "songunet64": SongUNetOptions(kind="song_unet", channel_mult=[1, 2, 2, 2], dropout=0.0),
        "songunet32": SongUNetOptions(
            kind="song_unet", model_channels=64, channel_mult=[1, 2, 2], num_blocks=2, dropout=0.0
        ),
        "adm64": DhariwalUNetOptions(kind="dhariwal_unet", dropout=0.0),
        "digits": SongUNetOptions(
            kind="song_unet", model_channels=32, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], dropout=0.0
        ),
    }[case]
