"""The algorithm's randomness, a function of seed, stream and position (Philox4x32-10, ``kernels/philox.py``).

A position is a sample's place in its stream, counted from the run's start, never its index in the data set.
"""

import enum
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rdmd_fast.errors import InputError
from rdmd_fast.kernels import philox


@enum.unique
class Stream(enum.IntEnum):
    """What a random number is for. The values are part of every result: add some, never change one."""

    SOURCE_ORDER = 0
    TARGET_ORDER = 1
    SOURCE_POINTS = 2
    TARGET_POINTS = 3
    GENERATOR_SIGMA = 4
    GENERATOR_NOISE = 5
    FAKE_SIGMA = 6
    FAKE_NOISE = 7
    TEACHER_SIGMA = 8
    TEACHER_NOISE = 9
    SOURCE_FLIP = 10
    HUE = 11
    SAMPLER = 12
    VALIDATION_SIGMA = 13
    VALIDATION_NOISE = 14
    EVALUATION = 15
    SPLIT = 16
    TARGET_FLIP = 17
    SAMPLER_CHURN = 18
    SAMPLER_CLASS = 19
    TRANSPORT_WEIGHT = 20
    METRIC_SUBSET = 30
    METRIC_SAMPLES = 31
    BASELINE_START = 32
    BASELINE_STEP = 33
    BASELINE_REFERENCE = 34
    ENERGY_SIGMA = 35
    ENERGY_NOISE = 36
    MINIBATCH_PAIRS = 37


class Philox:
    """Random numbers of one seed.

    ``positions`` is int64 [N] throughout, a tensor or any sequence of integers. Numbers depend on nothing but
    seed, stream, position and element, so a batch may be split in any way, over any devices.

    Raises:
        InputError: ``seed`` is outside [0, 2**64).
    """

    def __init__(self, seed: int):
        if not 0 <= seed < 1 << 64:
            raise InputError(f"seed {seed} is outside [0, 2**64); choose a smaller, non-negative one")
        self.seed = int(seed)

    def normal(
        self,
        stream: int,
        positions: Tensor | Sequence[int],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Standard normals, float32 [N, *shape].

        A shape of three is (C, H, W): its elements count in (h, w, c) order and the result lies in
        channels_last. Other shapes count in row-major order.
        """
        positions = torch.as_tensor(positions, dtype=torch.int64).to(device, non_blocking=True)
        flat = philox.normal(self.seed, int(stream), positions, math.prod(shape))
        if len(shape) != 3:
            return flat.view(len(flat), *shape)
        channels, height, width = shape
        return flat.view(len(flat), height, width, channels).permute(0, 3, 1, 2)

    def uniform(self, stream: int, positions: Tensor | Sequence[int], count: int = 1) -> Tensor:
        """Uniform numbers in the open interval (0, 1), float64 [N, count], always drawn on the CPU."""
        positions = torch.as_tensor(positions, dtype=torch.int64, device="cpu")
        return philox.uniform64(self.seed, int(stream), positions, count)

    def permutation(self, stream: int, epoch: int, n: int) -> Tensor:
        """A random order of 0 .. n - 1, int64 [n] on the CPU: the stable argsort of n keys of 64 bits.

        It takes the stream's words at position ``epoch``, so a stream of orders serves for nothing else.
        """
        words = philox.words(self.seed, int(stream), torch.tensor([epoch]), 2 * n).view(n, 2)
        return torch.argsort((words[:, 0] << 32) | words[:, 1], stable=True)


class DrawnAhead:
    """Draws for batches that follow each other, many iterations in one call where that is cheaper.

    Args:
        stride: positions from one draw to the next one in the same slot.
        draw_block: (first position, count) -> the draws of ``count`` samples at it and at every ``stride`` after it.
    """

    def __init__(self, stride: int, draw_block: Callable[[int, int], list]):
        self.stride, self.draw_block = stride, draw_block
        self._blocks: dict[int, tuple[int, int, list]] = {}

    def draw(self, positions: Tensor, slot: int = 0):
        """The draw for the samples at ``positions`` (int64 [n], a range); ``slot`` tells micro-batches apart."""
        first, count = int(positions[0]), len(positions)
        block_first, block_count, draws = self._blocks.get(slot, (0, 0, []))
        ahead, offset = divmod(first - block_first, self.stride)
        if offset or count != block_count or not 0 <= ahead < len(draws):
            ahead, draws = 0, self.draw_block(first, count)
            self._blocks[slot] = first, count, draws
        return draws[ahead]
