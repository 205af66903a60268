"""The picture of a sweep: the same held-out samples by every setting."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rdmd_fast.data.toys import ToyDistribution
from rdmd_fast.monitoring.drawing import toy_picture
from rdmd_fast.monitoring.run_pictures import picture_writer
from rdmd_fast.monitoring.validation import held_out_images
from rdmd_fast.processes.world import World
from rdmd_fast.randomness import Philox, Stream
from rdmd_fast.studies.sweep_jobs import TOY_POINTS, GridSetting, pictured_sources


def draw(grid: Sequence[GridSetting], folders: Sequence[Path], path: Path) -> None:
    """Draw rows of images, a setting each, or a panel of points each; nothing for samples that have no picture."""
    config = grid[0].config
    sources = pictured_sources(config)
    outputs = [torch.from_numpy(np.load(folder / "samples.npy", allow_pickle=False)) for folder in folders]
    names = [f"λ {setting.transport_weight:g}  σ {setting.generator_sigma:g}" for setting in grid]
    if sources.ndim == 2:
        target = None
        if isinstance(config.data.target, ToyDistribution):
            target = config.data.target.sample(Philox(config.seed), Stream.EVALUATION, torch.arange(TOY_POINTS))
        elif config.data.target_holdout:
            target = held_out_images(config.data.target_holdout, TOY_POINTS, config.data.cache_dir)
        if target is None or sources.shape[1] != 2:
            print("no picture: points are drawn in two dimensions, beside a toy target or data.target_holdout")
        else:
            maps = {name: cloud.numpy() for name, cloud in zip(names, outputs, strict=True)}
            toy_picture(sources.numpy(), maps, target.numpy(), path)
        return
    write_grid = picture_writer(config.telemetry.decoder, tuple(sources.shape[1:]), World(0, 1, torch.device("cpu")))
    if write_grid is None:
        print(f"no picture: samples of {sources.shape[1]} channels are drawn where telemetry.decoder names a decoder")
        return
    write_grid([("source x", sources), *zip(names, outputs, strict=True)], path)
