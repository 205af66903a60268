"""Forward and backward of the image networks, ours against the plain PyTorch formulation, in one run.

    python -m benchmarks.networks [--case songunet64 …] [--batch 4] [--json FILE]

Both compute the same function of the same weights: outputs and gradients are compared before anything is timed. Rounds
are taken in turn and each side's best counts, since machines are shared. A row "against plain fp32" sets ours in bf16
beside the plain formulation in fp32, as a user meets it who leaves everything at its default. MFU is of the plain
formulation's FLOPs against a matrix product measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import json
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain_networks import PlainUNet
from benchmarks.timing import CUDA, DEVICE, LARGE
from benchmarks.traffic import network_traffic
from rdmd_fast.engine.gpu_arithmetic import allow_tf32, tf32_allowed
from rdmd_fast.networks.dhariwal_unet import DhariwalUNet
from rdmd_fast.networks.song_unet import SongUNet

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Relative, of the output; gradients get ten times it.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}

CASES: dict[str, Callable[[], nn.Module]] = {
    "songunet64": lambda: SongUNet(64, 3, 3, channel_mult=[1, 2, 2, 2], dropout=0.0),
    "songunet32": lambda: SongUNet(32, 3, 3, model_channels=64, channel_mult=[1, 2, 2], num_blocks=2, dropout=0.0),
    "adm64": lambda: DhariwalUNet(64, 3, 3, dropout=0.0),
    "digits": lambda: SongUNet(
        8, 3, 3, model_channels=32, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], dropout=0.0
    ),
}


class Step:
    """One forward and backward pass of a network on fixed inputs."""

    def __init__(self, network: nn.Module, call: nn.Module, batch: int, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(1)
        size = network.img_resolution
        self.parameters, self.call = list(network.parameters()), call
        self.x = torch.randn(batch, 3, size, size, generator=generator).to(DEVICE, dtype)
        self.c_noise = torch.randn(batch, generator=generator).to(DEVICE)
        self.gradient = torch.randn(batch, 3, size, size, generator=generator).to(DEVICE, dtype)

    def __call__(self) -> Tensor:
        for parameter in self.parameters:
            parameter.grad = None
        output = self.call(self.x, self.c_noise)
        output.backward(self.gradient)
        return output.detach()

    def gradients(self) -> Tensor:
        return torch.cat([parameter.grad.float().flatten() for parameter in self.parameters])


def build(case: str) -> nn.Module:
    """The network in fp32 with weights that make every branch count: as initialised, most begin at zero."""
    torch.manual_seed(0)
    network = CASES[case]()
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 1 + 0.1 * noise)
    return network.train()


def steps(case: str, batch: int, dtype: str) -> tuple[Step, Step]:
    """(ours, plain) of the same weights; ours in channels_last, the plain one contiguous."""
    ours, plain = build(case).to(DEVICE, DTYPES[dtype]), build(case).to(DEVICE, DTYPES[dtype])
    ours.to(memory_format=torch.channels_last)
    return Step(ours, ours, batch, DTYPES[dtype]), Step(plain, PlainUNet(plain), batch, DTYPES[dtype])


def check_equal(case: str, dtype: str) -> None:
    """Outputs and gradients of both agree, or the timing would compare different things.

    Raises:
        RuntimeError: they do not.
    """
    ours, plain = steps(case, 1, dtype)
    with tf32(False):
        outputs = ours().float(), plain().float()
    for name, (mine, reference), tolerance in (
        ("outputs", outputs, TOLERANCE[dtype]),
        ("gradients", (ours.gradients(), plain.gradients()), 10 * TOLERANCE[dtype]),
    ):
        error = float((mine - reference).norm() / reference.norm())
        if not error < tolerance:
            raise RuntimeError(f"{case} {dtype}: {name} differ from the plain formulation's by {error:.2e}")


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether a GPU may round factors in fp32 to eleven bits, for the time of a block."""
    before = tf32_allowed()
    allow_tf32(allowed, allowed)
    try:
        yield
    finally:
        allow_tf32(*before)


def seconds(step: Callable[[], object]) -> float:
    """Of one call, to the end of its work on the device."""
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(step: Step) -> int:
    """Memory that a step needs at its height beyond weights and inputs."""
    for parameter in step.parameters:
        parameter.grad = None
    return peak_of(step)


def peak_of(call: Callable[[], object]) -> int:
    """Measure a call's memory at its height beyond what was held: the allocator's on a GPU, resident set on Linux."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak of the resident set
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))


_best_matmul: dict[tuple[str, bool], float] = {}


def matmul_peak(dtype: str, in_tf32: bool = True) -> float:
    """FLOP/s of the best large square matrix product of this process so far, also as 1×1 convolution.

    In fp32 a GPU's is TF32's unless told otherwise, as with ``train.tf32``. Each call tries a few: what a machine can
    do is seen when others leave it alone.
    """
    for size in (8192,) if LARGE else (512, 2048):
        a, b = (torch.randn(size, size, device=DEVICE).to(DTYPES[dtype]) for _ in range(2))
        ways = [functools.partial(torch.matmul, a, b)]
        if not CUDA:  # there products come from another library than convolutions, which may be the faster one
            image, kernel = a.T[None, :, :, None].contiguous(memory_format=torch.channels_last), b[:, :, None, None]
            ways.append(functools.partial(torch.nn.functional.conv2d, image, kernel))
        with tf32(in_tf32):
            best = min(seconds(way) for _ in range(3) for way in ways)
        key = dtype, in_tf32
        _best_matmul[key] = max(_best_matmul.get(key, 0.0), 2 * size**3 / best)
        if best > 0.01:  # a CPU without 16-bit products: larger ones would take seconds and tell the same
            break
    return _best_matmul[dtype, in_tf32]


@functools.cache
def flops_per_image(case: str) -> int:
    """Of the plain formulation's forward and backward pass, so that both sides are credited with the same work."""
    step = steps(case, 1, "fp32")[1]
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def measure(case: str, batch: int, rounds: int, compiled: bool) -> Iterator[dict]:
    """A row for each dtype, and one of bf16 against plain fp32."""
    plain_fp32 = None
    for dtype in DTYPES:
        check_equal(case, dtype)
        ours, plain = steps(case, batch, dtype)
        if compiled:
            ours.call, plain.call = torch.compile(ours.call), torch.compile(plain.call)
        sides = [ours, plain]
        if plain_fp32 is None:
            plain_fp32 = plain
        else:
            sides.append(plain_fp32)
        peaks = [peak_bytes(side) for side in sides if side() is not None]
        times = [
            min(column) for column in zip(*([seconds(side) for side in sides] for _ in range(rounds)), strict=True)
        ]
        name = f"{case}, batch {batch}" + (", compiled" if compiled else "")
        for other, suffix, other_dtype in ((1, "", dtype), (2, ", against plain fp32", "fp32"))[: len(sides) - 1]:
            pair = [(times[side], peaks[side]) for side in (0, other)]
            yield row(case, name + suffix, (dtype, other_dtype), batch, *pair)
        del ours, plain, sides


def row(case: str, name: str, dtypes: tuple[str, str], batch: int, ours: tuple, plain: tuple) -> dict:
    """One line of the results from (seconds, peak bytes) of both sides."""
    entry = {"case": name, "dtype": dtypes[0], "device": torch.cuda.get_device_name() if CUDA else "cpu"}
    for prefix, dtype, (duration, peak) in (("", dtypes[0], ours), ("plain_", dtypes[1], plain)):
        entry[f"{prefix}seconds"], entry[f"{prefix}peak_bytes"] = duration, peak
        entry[f"{prefix}images_per_second"] = batch / duration
        entry[f"{prefix}mfu"] = batch * flops_per_image(case) / duration / matmul_peak(dtype)
    return entry | {"ratio": plain[0] / ours[0]}


def traffic_rows(case: str) -> dict:
    """Bytes of one image's forward and backward pass outside convolutions, in bf16."""
    batch = 4
    mine, reference = (network_traffic(step) // batch for step in steps(case, batch, "bf16"))
    return {
        "case": f"{case}, bytes outside convolutions", "dtype": "bf16", "device": "counted",
        "bytes_per_image": mine, "plain_bytes_per_image": reference, "ratio": reference / mine,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=["songunet64"], help="networks (songunet64)")
    parser.add_argument("--batch", type=int, default=64 if CUDA else 4, help="images a step (4; on a GPU 64)")
    parser.add_argument("--rounds", type=int, default=20 if CUDA else 5, help="timed rounds of each (5; on a GPU 20)")
    parser.add_argument("--compile", action="store_true", help="time both under torch.compile as well")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    arguments = parser.parse_args()
    rows = []
    for case in arguments.case:
        for compiled in (False, True) if arguments.compile else (False,):
            for entry in measure(case, arguments.batch, arguments.rounds, compiled):
                rows.append(entry)
                print(format_row(entry), flush=True)
        if not CUDA:
            rows.append(traffic_rows(case))
            print(format_row(rows[-1]), flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)


def format_row(entry: dict) -> str:
    if "seconds" not in entry:
        mine, plain = entry["bytes_per_image"] / 2**20, entry["plain_bytes_per_image"] / 2**20
        return (
            f"{entry['case']:<48} {entry['dtype']}  {mine:9.1f} MiB  plain {plain:9.1f} MiB  ratio {entry['ratio']:.2f}"
        )
    mebi = entry["peak_bytes"] / 2**20, entry["plain_peak_bytes"] / 2**20
    return (
        f"{entry['case']:<48} {entry['dtype']}  {entry['seconds']:9.4f} s    plain {entry['plain_seconds']:9.4f} s    "
        f"ratio {entry['ratio']:.2f}  images/s {entry['images_per_second']:.1f}, plain "
        f"{entry['plain_images_per_second']:.1f}  MFU {entry['mfu']:.0%}, plain {entry['plain_mfu']:.0%}  "
        f"peak {mebi[0]:.0f} MiB, plain {mebi[1]:.0f} MiB"
    )


if __name__ == "__main__":
    main()
