"""The algorithm's randomness, a function of seed, stream and position (Philox4x32-10, ``kernels/philox.py``).

A position is a sample's place in its stream, counted from the run's start, never its index in the data set.
"""

import enum
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rdmd_fast.errors import InputError
from rdmd_fast.kernels import philox


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
    FLIP = 10
    HUE = 11
    SAMPLER = 12
    VALIDATION_SIGMA = 13
    VALIDATION_NOISE = 14
    EVALUATION = 15
    SPLIT = 16


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


class DrawAhead:
    """Draws for many iterations in one call, since a small draw on the CPU costs mostly the call.

    ``draw(positions)`` returns exactly what ``Philox.normal`` or ``Philox.uniform`` would. A request that was
    not foreseen is drawn together with those expected to follow it, the same positions moved on by one
    ``stride``, two and so on, up to ``budget`` elements. Jumps and new batch sizes only cost such a call.
    Several requests an iteration (micro-batches) are foreseen each on its own.

    Args:
        philox: where the numbers come from.
        stream: as there.
        kind: ``"normal"``, or ``"uniform"``, which takes the shape (count,).
        shape: of one sample.
        stride: positions between one iteration and the next.
        budget: elements to draw at once; a request that exceeds half of it is drawn alone.
        device: of the normals; uniform numbers are on the CPU.
    """

    _REQUESTS = 32  # kinds of request kept at once; more than that in one iteration is no longer foreseen

    def __init__(
        self,
        philox: Philox,
        stream: int,
        kind: str = "normal",
        shape: Sequence[int] = (1,),
        stride: int = 1,
        budget: int = 2**16,
        device: torch.device | str = "cpu",
    ):
        if kind not in ("normal", "uniform") or (kind == "uniform" and len(shape) != 1):
            raise ValueError(f"kind {kind!r} with shape {tuple(shape)}: want normal, or uniform with (count,)")
        if stride < 1:
            raise ValueError(f"stride {stride} must be at least 1")
        self._philox, self._stream, self._kind, self._shape = philox, stream, kind, tuple(shape)
        self._stride, self._budget, self._device = stride, budget, device
        self._foreseen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def draw(self, positions: Tensor | Sequence[int]) -> Tensor:
        """Numbers at ``positions`` (int64 [N]): normals float32 [N, *shape], uniform float64 [N, count]."""
        positions = torch.as_tensor(positions, dtype=torch.int64, device="cpu")
        iterations = self._budget // max(1, positions.numel() * math.prod(self._shape))
        if iterations < 2 or not positions.numel():
            return self._direct(positions)
        first = int(positions[0])
        request = (first % self._stride, positions.numel())
        if request in self._foreseen:
            base, values = self._foreseen[request]
            ahead = (first - int(base[0])) // self._stride
            if 0 <= ahead < len(values) and torch.equal(base + ahead * self._stride, positions):
                return values[ahead].clone()  # the caller may write into what it gets
        if len(self._foreseen) >= self._REQUESTS:
            self._foreseen.clear()
        values = self._draw_iterations(positions, iterations)
        self._foreseen[request] = positions.clone(), values
        return values[0].clone()

    def _direct(self, positions: Tensor) -> Tensor:
        if self._kind == "uniform":
            return self._philox.uniform(self._stream, positions, *self._shape)
        return self._philox.normal(self._stream, positions, self._shape, self._device)

    def _draw_iterations(self, positions: Tensor, iterations: int) -> Tensor:
        shifts = torch.arange(iterations) * self._stride
        values = self._direct((positions + shifts[:, None]).flatten())
        return values.unflatten(0, (iterations, positions.numel()))
