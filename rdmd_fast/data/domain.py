"""Batches on the device in data units, with the horizontal flips of data augmentation."""

import sys
from typing import Literal

import torch

from rdmd_fast.data.file_walk import tell_left_out
from rdmd_fast.data.options import DataOptions
from rdmd_fast.data.stream import SampleStream, ToyStream, open_stream
from rdmd_fast.errors import InputError
from rdmd_fast.kernels.image_normalize import image_normalize
from rdmd_fast.kernels.noise_forward import CounterNoise
from rdmd_fast.kernels.philox import words
from rdmd_fast.processes.launchers import cores_of_rank, place
from rdmd_fast.randomness import Philox, Stream


class DeviceStream:
    """A stream whose batches arrive on the device as float32 in data units.

    Args:
        stream: the samples.
        device: where batches go.
        flips: (seed, stream) of the counters by which samples are mirrored left to right, each position with
            probability 1/2; None mirrors none. To mirror an autoencoder's latents is to mirror the images only
            approximately.

    Attributes:
        shape: of one sample.
    """

    def __init__(self, stream: SampleStream | ToyStream, device: torch.device, flips: tuple[int, int] | None = None):
        self.stream, self.device, self.flips, self.shape = stream, device, flips, tuple(stream.shape)

    def batch(self, positions: torch.Tensor) -> torch.Tensor:
        """The samples at ``positions``, int64 [N] on the CPU: float32 [N, ...]."""
        samples = self._to_device(self.stream.batch(positions))
        counters = None if self.flips is None else CounterNoise(*self.flips, self._to_device(positions))
        if samples.dtype == torch.uint8:
            return image_normalize(samples, torch.float32, counters)
        return samples if counters is None else flip_where_drawn(samples, counters)

    @property
    def own_labels(self):
        """Class of every sample of a packed set, an integer array; None where it has none."""
        return getattr(getattr(self.stream, "shards", None), "labels", None)

    def labels(self, positions: torch.Tensor) -> torch.Tensor:
        """Classes of the samples at ``positions``: int64 [N] on the CPU; InputError if the set has none."""
        return self.stream.labels(positions)

    def close(self) -> None:
        """End what reads the samples; no more batches."""
        self.stream.close()

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


def flip_where_drawn(samples: torch.Tensor, counters: CounterNoise) -> torch.Tensor:
    """Mirror the samples [N, C, H, W] that ``image_normalize`` would mirror by the same counters."""
    drawn = words(counters.seed, counters.stream, counters.positions, 1)[:, 0] & 1 == 1
    return torch.where(drawn[:, None, None, None], samples.flip(3), samples)


def open_domain(
    options: DataOptions, role: Literal["source", "target"], philox: Philox, device: torch.device
) -> DeviceStream:
    """The source's or the target's training stream.

    Raises:
        InputError: no data there, or flips of something that has no left and right.
    """
    if options.workers is None:
        options = options.model_copy(update={"workers": default_workers(device)})
    stream = open_stream(getattr(options, role), philox, role, options)
    if isinstance(stream, SampleStream):
        _warn_of_crowding(role, len(stream.shards.shards), options.workers)
        if place()[0] == 0:
            tell_left_out(f"data.{role} {stream.shards.path}", stream.shards.left_out)
    if not options.flip:
        return DeviceStream(stream, device)
    if len(stream.shape) != 3:
        raise InputError(f"data.flip: mirrors images, data.{role} has samples of shape {tuple(stream.shape)}")
    number = {"source": Stream.SOURCE_FLIP, "target": Stream.TARGET_FLIP}[role]
    return DeviceStream(stream, device, (philox.seed, int(number)))


def default_workers(device: torch.device) -> int:
    """One where a GPU's host has a core to spare for each of its ranks; steps on the CPU want the cores themselves."""
    return int(device.type == "cuda" and cores_of_rank() >= 2)


def _warn_of_crowding(role: str, shards: int, workers: int) -> None:
    rank, ranks = place()
    if max(ranks, workers) > shards and rank == 0:
        crowd = f"{ranks} ranks of {workers} workers" if workers else f"{ranks} ranks"
        print(
            f"warning: data.{role}: {crowd} read {shards} shards; the samples are the same, but they read the same "
            "files: smaller shards spread that (rdmd pack --shard-size)",
            file=sys.stderr,
        )
