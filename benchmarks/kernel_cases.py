"""What is timed: each operation at each shape, as ours and as plain PyTorch on the same inputs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import plain_kernels
from benchmarks.timing import DEVICE, LARGE
from rdmd_fast.diffusion import DiffusionOptions, Reading, coefficients
from rdmd_fast.kernels import philox
from rdmd_fast.kernels.coefficients import Coefficients
from rdmd_fast.kernels.denoising_loss import denoising_gradient
from rdmd_fast.kernels.ema_update import ema_update
from rdmd_fast.kernels.group_norm_silu import group_norm_silu
from rdmd_fast.kernels.image_normalize import image_normalize
from rdmd_fast.kernels.noise_forward import CounterNoise, generator_noise_forward, noise_forward
from rdmd_fast.kernels.rdmd_gradient import generator_gradient

SEED, STREAM = 2**40 + 1, 5
READING, WEIGHT = Reading(0.2, 1.0, 0.4472136, 0.0), 0.05  # the generator's reading and λ

# Samples of the loss-side kernels: 2-D points, small images, latents of 512x512, and 302 MB of fp32 at the end.
SAMPLES = [(1024, 2), (8, 3, 32, 32)]
FEATURES = [(4, 128, 16, 16, torch.float32)]
PARAMETERS = [(20, 2**14)]
if LARGE:
    SAMPLES = [(1024, 2), (256, 3, 32, 32), (64, 4, 64, 64), (16, 3, 256, 256), (16, 3, 512, 512), (96, 3, 512, 512)]
    FEATURES = [(n, c, side, side, torch.bfloat16) for n, c, side in
                ((64, 256, 8), (64, 256, 16), (64, 256, 32), (64, 128, 64), (8, 128, 256), (4, 64, 512))]  # fmt: skip
    PARAMETERS = [(20, 2**14), (400, 2**18), (1, 2**26)]
# Below this many bytes an operation takes as long as its launch: timed through CUDA-graph replay.
LAUNCH_BOUND = 4 * 2**20


@dataclass
class Operation:
    """One operation at one shape.

    Attributes:
        name, case: what and at which shape.
        bytes: the fewest it has to move: each input and output once.
        ours, baseline: no arguments; baseline draws its noise with torch.randn.
        check: asserts that ours is right at this shape, before it is timed.
        compiled: makes the compiled baseline; None: ``torch.compile`` of the baseline itself.
    """

    name: str
    case: str
    bytes: int
    ours: Callable[[], object]
    baseline: Callable[[], object]
    check: Callable[[], None]
    compiled: Callable[[], Callable[[], object]] | None = None

    @property
    def launch_bound(self) -> bool:
        return self.bytes < LAUNCH_BOUND

    def implementation(self, name: str) -> Callable[[], object]:
        """``ours``, ``eager`` or ``compile``."""
        if name == "compile":
            return self.compiled() if self.compiled else torch.compile(self.baseline, dynamic=False)
        return self.ours if name == "ours" else self.baseline


def _tensor(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def _case(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _table_and_noise(n: int) -> tuple[Coefficients, CounterNoise]:
    sigma = torch.logspace(-1.5, 1, n, dtype=torch.float64)
    table = coefficients(sigma, DiffusionOptions(), "sigma2", DEVICE)
    return table, CounterNoise(SEED, STREAM, torch.arange(n, device=DEVICE) + 2**33)


def _close(ours: Tensor, expected: Tensor) -> None:
    """Equal up to the roundings of a few fp32 operations and one of the dtype of ``ours``."""
    assert ours.shape == expected.shape
    expected = expected.float()
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[ours.dtype]
    # Where large terms cancel, an error is to be seen against the tensor's own size.
    torch.testing.assert_close(ours.float(), expected, rtol=tolerance, atol=tolerance * float(expected.std()) / 4)


def normal(shape: tuple[int, ...]) -> Operation:
    n, count = shape[0], math.prod(shape[1:])
    positions = torch.arange(n, device=DEVICE) + 2**33

    def check():
        few = positions[:: max(1, n // 4)]
        expected = philox.normal_reference(SEED, STREAM, few.cpu(), count)
        assert torch.equal(philox.normal(SEED, STREAM, few, count).cpu(), expected)

    return Operation(
        "normal",
        _case(shape),
        4 * n * count,
        lambda: philox.normal(SEED, STREAM, positions, count),
        lambda: torch.randn(n, count, device=DEVICE),
        check,
    )


def noising(shape: tuple[int, ...]) -> Operation:
    table, noise = _table_and_noise(shape[0])
    y, dtype = _tensor(shape, 1), torch.bfloat16
    alpha, sigma, c_in = (table.row(name, y) for name in ("alpha", "sigma", "c_in"))
    return Operation(
        "noise_forward",
        _case(shape),
        6 * y.numel(),
        lambda: noise_forward(y, noise=noise, table=table, dtype=dtype)[0],
        lambda: plain_kernels.noise_forward(y, alpha, sigma, c_in, torch.randn_like(y), dtype),
        lambda: _close(
            noise_forward(y, noise=noise, table=table, dtype=dtype)[0],
            plain_kernels.noise_forward(y, alpha, sigma, c_in, noise.values(y), torch.float32),
        ),
    )


def generator_noising(shape: tuple[int, ...]) -> Operation:
    table, noise = _table_and_noise(shape[0])
    x, dtype = _tensor(shape, 1), torch.bfloat16
    f_generator = _tensor(shape, 2, dtype)
    alpha, sigma, c_in = (table.row(name, x) for name in ("alpha", "sigma", "c_in"))

    def baseline(epsilon=None, out=dtype):
        y = READING.skip * x + READING.scale * f_generator.float()
        epsilon = torch.randn_like(y) if epsilon is None else epsilon
        return plain_kernels.noise_forward(y, alpha, sigma, c_in, epsilon, out), y

    def ours():
        return generator_noise_forward(f_generator, x, reading=READING, noise=noise, table=table, dtype=dtype)

    def check():
        for result, expected in zip(ours(), baseline(noise.values(x), torch.float32), strict=True):
            _close(result, expected)

    return Operation("generator_noise_forward", _case(shape), 12 * x.numel(), ours, baseline, check)


def gradient(shape: tuple[int, ...], weighting: str) -> Operation:
    table, noise = _table_and_noise(shape[0])
    f_real, f_fake, f_generator = (_tensor(shape, seed, torch.bfloat16) for seed in (1, 2, 3))
    x = _tensor(shape, 4)
    dmd = weighting == "dmd"
    y = READING.skip * x + READING.scale * f_generator.float()
    rows = {name: table.row(name, x) for name in ("score_scale", "c_out", "target_clean", "target_noise")}
    # The plain version is given F*, as if stored by whoever drew the noise.
    target = rows["target_clean"] * y + rows["target_noise"] * noise.values(x) if dmd else None

    def ours():
        return generator_gradient(
            f_real=f_real, f_fake=f_fake, f_generator=f_generator, x=x, reading=READING, noise=noise, table=table,
            transport_weight=WEIGHT, weighting=weighting,
        )  # fmt: skip

    def baseline():
        y = READING.skip * x + READING.scale * f_generator.float()
        return plain_kernels.rdmd_gradient(
            f_real, f_fake, y, x, rows["score_scale"], rows["c_out"], target, WEIGHT, READING.scale
        )  # fmt: skip

    def check():
        result, statistics = ours()
        expected = baseline()
        _close(result, expected[0])
        _close(statistics.score_gradient_square, expected[1])
        _close(statistics.transport_cost, expected[2])

    return Operation(
        f"generator_gradient/{weighting}", _case(shape), (18 if dmd else 12) * x.numel(), ours, baseline, check
    )


def denoising(shape: tuple[int, ...]) -> Operation:
    table, noise = _table_and_noise(shape[0])
    output, y = _tensor(shape, 1, torch.bfloat16), _tensor(shape, 2)
    rows = table.row("target_clean", y), table.row("target_noise", y)

    def ours():
        return denoising_gradient(output, y, noise=noise, table=table)

    def baseline(epsilon=None):
        return plain_kernels.denoising_gradient(output, y, *rows, torch.randn_like(y) if epsilon is None else epsilon)

    def check():
        for result, expected in zip(ours(), baseline(noise.values(y)), strict=True):
            _close(result, expected)

    return Operation("denoising_gradient", _case(shape), 8 * y.numel(), ours, baseline, check)


def normalization(n: int, channels: int, height: int, width: int, dtype: torch.dtype) -> Operation:
    """Forward and backward with scale and shift, in channels_last."""
    x, dy = (_tensor((n, channels, height, width), seed, dtype) for seed in (1, 2))
    parameters = _tensor((channels,), 3), _tensor((channels,), 4)
    modulation = _tensor((n, channels), 5, dtype), _tensor((n, channels), 6, dtype)
    inputs = [part.requires_grad_() for part in (x, *parameters, *modulation)]

    def both(function):
        y = function(x, *parameters, min(32, channels // 4), 1e-6, *modulation)
        return y, *torch.autograd.grad(y, inputs, dy)

    def check():
        wide = [part.detach().double().requires_grad_() for part in inputs]
        expected = plain_kernels.group_norm_silu(wide[0], *wide[1:3], min(32, channels // 4), 1e-6, *wide[3:])
        for result, right in zip(
            both(group_norm_silu), (expected, *torch.autograd.grad(expected, wide, dy.double())), strict=True
        ):
            _close(result.detach(), right.detach())

    return Operation(
        "group_norm_silu",
        f"{_case((n, channels, height, width))} {str(dtype).removeprefix('torch.')}",
        5 * x.numel() * x.element_size(),
        lambda: both(group_norm_silu),
        lambda: both(plain_kernels.group_norm_silu),
        check,
        lambda: functools.partial(both, torch.compile(plain_kernels.group_norm_silu, dynamic=False)),
    )


def averaging(tensors: int, elements: int) -> Operation:
    averages, sources = ([_tensor((elements,), seed + i) for i in range(tensors)] for seed in (0, tensors))

    def check():
        pairs = zip(averages, sources, strict=True)
        expected = [average.double().lerp(source.double(), 0.01) for average, source in pairs]
        result = [average.clone() for average in averages]
        ema_update(result, sources, 0.01)
        for one, right in zip(result, expected, strict=True):
            _close(one, right)

    return Operation(
        "ema_update",
        f"{tensors}x{elements}",
        12 * tensors * elements,
        lambda: ema_update(averages, sources, 0.01),
        lambda: plain_kernels.ema_update(averages, sources, 0.01),
        check,
    )


def normalizing(shape: tuple[int, ...], flipped: bool) -> Operation:
    generator = torch.Generator(DEVICE).manual_seed(1)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=DEVICE)
    images = images.contiguous(memory_format=torch.channels_last)
    positions = torch.arange(len(images), device=DEVICE)
    flip = CounterNoise(SEED, STREAM, positions) if flipped else None
    mirrored = (philox.words(SEED, STREAM, positions, 1)[:, 0] & 1).bool() if flipped else None
    dtype = torch.bfloat16
    return Operation(
        "image_normalize" + ("/flip" if flipped else ""),
        _case(shape),
        3 * images.numel(),
        lambda: image_normalize(images, dtype, flip),
        lambda: plain_kernels.image_normalize(images, dtype, mirrored),
        lambda: torch.testing.assert_close(
            image_normalize(images, dtype, flip),
            plain_kernels.image_normalize(images, dtype, mirrored),
            rtol=0,
            atol=2**-8,
        ),
    )


def operations(largest: int | None = None) -> Iterator[tuple[str, Callable[[], Operation]]]:
    """(identifier, constructor) of everything that is timed; inputs are made when the constructor is called.

    Args:
        largest: only so many of each operation's shapes, those with most bytes.
    """
    last = slice(-(largest or 0), None)
    for shape in SAMPLES[last]:
        builders = {"normal": normal, "noise_forward": noising, "generator_noise_forward": generator_noising}
        builders |= {f"gradient-{w}": lambda s, w=w: gradient(s, w) for w in ("sigma2", "dmd")}
        builders |= {"denoising_gradient": denoising}
        if len(shape) == 4 and shape[1] == 3:
            builders |= {f"normalize{'-flip' * f}": lambda s, f=f: normalizing(s, f) for f in (False, True)}
        for name, build in builders.items():
            yield f"{name}-{_case(shape)}", lambda build=build, shape=shape: build(shape)
    for features in FEATURES[last]:
        yield f"group_norm_silu-{_case(features[:4])}", lambda features=features: normalization(*features)
    for tensors in PARAMETERS[last]:
        yield f"ema_update-{_case(tensors)}", lambda tensors=tensors: averaging(*tensors)
