"""The comparisons of NOTES.md: what was kept against what it replaced, and what was dropped. On a CPU, in turn.

    python -m benchmarks.ablations [norms attention layouts convolutions weights masters reduction memory blocks
                                compile]

Milliseconds, best of several rounds. ``compile`` takes four minutes, ``memory`` two, the others less than one each.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks.host_syncs import count_host
from benchmarks.networks import build, seconds
from benchmarks.step_cases import compile_as, run_config
from benchmarks.step_sides import Ours
from rdmd_fast.engine import engine as distributed
from rdmd_fast.engine import update_guard
from rdmd_fast.networks.unet_layers import attention
from rdmd_fast.processes.host_memory import LARGEST_MMAP_THRESHOLD, keep_freed_memory

LAST = torch.channels_last


def best(call: Callable[[], object], rounds: int = 21) -> float:
    """Milliseconds of the fastest call, three ahead of it."""
    for _ in range(3):
        call()
    return 1e3 * min(seconds(call) for _ in range(rounds))


def norms() -> None:
    """GroupNorm of channels_last images: PyTorch's, contiguous, and in fp32; forward and backward."""
    for shape in [(64, 32, 8, 8), (64, 64, 4, 4), (4, 256, 16, 16), (4, 256, 32, 32), (4, 128, 64, 64)]:
        for dtype in (torch.float32, torch.bfloat16):
            line(f"norm {list(shape)} {str(dtype)[6:]}", norm_times(shape, dtype))


def norm_times(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, float]:
    sizes = (*shape[:2], shape[2] * shape[3], min(32, shape[1] // 4))
    x, dy = (torch.randn(shape, dtype=dtype).to(memory_format=LAST) for _ in range(2))
    weight, bias = torch.randn(2, shape[1], dtype=dtype)
    _, mean, rstd = torch.native_group_norm(x, weight, bias, *sizes, 1e-6)

    def forward(x, weight, bias):
        return torch.native_group_norm(x, weight, bias, *sizes, 1e-6)[0].to(dtype).contiguous(memory_format=LAST)

    def backward(dy, x, mean, rstd, weight):
        dx, *rest = torch.ops.aten.native_group_norm_backward(dy, x, mean, rstd, weight, *sizes, [True] * 3)
        return dx.to(dtype).contiguous(memory_format=LAST), [part.to(dtype) for part in rest]

    def wide(*parts):
        return [part.float() for part in parts]

    return {
        "forward": best(lambda: forward(x, weight, bias)),
        "contiguous": best(lambda: forward(x.contiguous(), weight, bias)),
        "fp32": best(lambda: forward(*wide(x, weight, bias))),
        "backward": best(lambda: backward(dy, x, mean, rstd, weight)),
        "backward contiguous": best(lambda: backward(dy.contiguous(), x.contiguous(), mean, rstd, weight)),
        "backward fp32": best(lambda: backward(*wide(dy, x, mean, rstd, weight))),
    }


def attentions() -> None:
    """Attention forward and backward: PyTorch's, and ours."""
    for shape in [(64, 1, 16, 64), (4, 1, 256, 256), (2, 9, 64, 64)]:
        for dtype in (torch.float32, torch.bfloat16):
            line(f"attention {list(shape)} {str(dtype)[6:]}", attention_times(shape, dtype))


def attention_times(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, float]:
    n, heads, tokens, width = shape
    q, k, v = (torch.randn(n, tokens, heads, width, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    gradient = torch.randn(shape, dtype=dtype)
    ways = {"PyTorch's": F.scaled_dot_product_attention, "ours": attention}
    return {
        name: best(lambda way=way: torch.autograd.grad(way(q, k, v), (q, k, v), gradient)) for name, way in ways.items()
    }


def layouts() -> None:
    """A 3×3 convolution, and GroupNorm, of channels_last and of contiguous images in fp32."""
    for shape in [(64, 32, 8, 8), (64, 64, 8, 8)]:
        for layout in (LAST, torch.contiguous_format):
            line(f"{list(shape)} {str(layout)[6:]}", layout_times(shape, layout))


def layout_times(shape: tuple[int, ...], layout: torch.memory_format) -> dict[str, float]:
    channels = shape[1]
    weight = torch.randn(channels, channels, 3, 3)
    x, dy = (torch.randn(shape).to(memory_format=layout) for _ in range(2))
    arguments = [channels], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True] * 3
    return {
        "convolution": best(lambda: F.conv2d(x, weight, padding=1)),
        "its backward": best(lambda: torch.ops.aten.convolution_backward(dy, x, weight, *arguments)),
        "norm": best(lambda: F.group_norm(x, min(32, channels // 4))),
    }


def convolutions() -> None:
    """3×3 convolutions in fp32: PyTorch's, NNPACK's Winograd; the weight's gradient, whole and in halves."""
    for inputs, outputs, size in [(128, 128, 64), (256, 128, 64), (256, 256, 32), (512, 256, 32), (256, 256, 16)]:
        line(f"[4, {inputs}, {size}, {size}] -> {outputs}", convolution_times(inputs, outputs, size))


def convolution_times(inputs: int, outputs: int, size: int) -> dict[str, float]:
    x, dy = torch.randn(4, inputs, size, size), torch.randn(4, outputs, size, size).to(memory_format=LAST)
    last, weight = x.to(memory_format=LAST), torch.randn(outputs, inputs, 3, 3)

    def weight_gradient(parts: int):
        for part in dy.chunk(parts, 1):
            channels = outputs // parts
            arguments = weight[:channels], [channels], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
            torch.ops.aten.convolution_backward(part.contiguous(memory_format=LAST), last, *arguments)

    return {
        "PyTorch's": best(lambda: F.conv2d(last, weight, padding=1), 9),
        "Winograd": best(lambda: torch._nnpack_spatial_convolution(x, weight, None, 1), 9),
        "weight's gradient": best(lambda: weight_gradient(1), 9),
        "in halves": best(lambda: weight_gradient(2), 9),
    }


def weights() -> None:
    """A forward pass of SongUNet with contiguous weights, which every convolution copies, and with channels_last."""
    for dtype in (torch.float32, torch.bfloat16):
        network = build("songunet64").to(dtype).requires_grad_(False)
        ways = {"contiguous": network, "channels_last": copy.deepcopy(network).to(memory_format=LAST)}
        for batch in (1, 4):
            line(f"songunet64 {str(dtype)[6:]}, batch {batch}", weight_times(ways, batch))


def weight_times(ways: dict[str, torch.nn.Module], batch: int) -> dict[str, float]:
    x, c_noise = torch.randn(batch, 3, 64, 64), torch.zeros(batch)
    rounds = [[1e3 * seconds(lambda way=way: way(x, c_noise)) for way in ways.values()] for _ in range(8)]
    return {name: min(column) for name, column in zip(ways, zip(*rounds, strict=True), strict=True)}


# -- iterations --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def run_of(case: str, dtype: str, compiled: str | None = None) -> Iterator[Ours]:
    with tempfile.TemporaryDirectory(prefix="rdmd-ablations-") as folder:
        run = Ours(run_config(case, dtype, Path(folder), compile_as(compiled)))
        try:
            yield run
        finally:
            run.experiment.close()


def counted(run: Ours) -> dict:
    counts = count_host(run)
    return {"host synchronisations": counts["host_syncs"], "launches": counts["launches"]}


@contextlib.contextmanager
def deepspeeds_optimizer() -> Iterator[None]:
    """DeepSpeed's own bf16 optimizer at ZeRO 0."""
    initialize = update_guard.UpdateGuard.__init__

    def initialized(self, options, engine, *rest):
        initialize(self, options, engine, *rest)
        self._plain = self._plain and not engine.bfloat16_enabled()

    with (
        mock.patch.object(distributed, "_has_master_adam", lambda *_: False),
        mock.patch.object(update_guard.UpdateGuard, "__init__", initialized),
    ):
        yield


def masters() -> None:
    """Digits in bf16 with our masters, and with DeepSpeed's optimizer."""
    for _ in range(2):
        for name, way in (("ours", contextlib.nullcontext()), ("DeepSpeed's", deepspeeds_optimizer())):
            with way, run_of("digits", "bf16") as run:
                line(f"digits bf16, {name}", {"iteration": best(run.iteration, 12)} | counted(run))


def reduction() -> None:
    """Digits at one rank, with and without DeepSpeed's reduction of gradients among one."""
    for _ in range(2):
        for reduced in (False, True):
            with run_of("digits", "fp32") as run:
                for engine in run.state.engines.values():
                    engine.enable_backward_allreduce = reduced
                line(f"digits fp32, reduced: {reduced}", {"iteration": best(run.iteration, 12)} | counted(run))


def memory() -> None:
    """SongUNet in fp32 where freed memory is kept, and where glibc gives it back."""
    with run_of("songunet64", "fp32") as run:
        run.iteration()
        for name, threshold in (("given back", (2 * LARGEST_MMAP_THRESHOLD,)), ("kept", ())):
            keep_freed_memory(*threshold)
            run.iteration()
            before = resource.getrusage(resource.RUSAGE_SELF)
            duration = 1e3 * seconds(run.iteration)
            after = resource.getrusage(resource.RUSAGE_SELF)
            system = 1e3 * (after.ru_stime - before.ru_stime)
            faults = after.ru_minflt - before.ru_minflt
            line(f"songunet64 fp32, {name}", {"iteration": duration, "system": system, "page faults": faults})


def blocks() -> None:
    """The toy by normals that are drawn at once."""
    torch.set_num_threads(1)
    with run_of("toy", "fp32") as run:
        for _ in range(3):
            for exponent in (13, 15, 17):
                for process in (run.stage.generator_process, run.stage.fake_process):
                    process.BLOCK_ELEMENTS = 2**exponent
                for _ in range(140):  # what was drawn before is used up
                    run.iteration()
                each = seconds(lambda: [run.iteration() for _ in range(256)]) / 256
                line(f"toy, 2^{exponent} normals", {"iteration": 1e3 * each})


def compiling() -> None:
    """Digits as written and under torch.compile."""
    for dtype in ("fp32", "bf16"):
        for mode in (None, "default"):
            torch._dynamo.reset()
            with run_of("digits", dtype, mode) as run:
                first = seconds(run.iteration)
                line(f"digits {dtype}, compile: {mode}", {"iteration": best(run.iteration, 12), "first": 1e3 * first})


def line(name: str, values: dict[str, float]) -> None:
    cells = "  ".join(f"{key} {value:.3g}" if value < 100 else f"{key} {value:,.0f}" for key, value in values.items())
    print(f"{name:<34} {cells}", flush=True)


PARTS = {
    "norms": norms, "attention": attentions, "layouts": layouts, "convolutions": convolutions, "weights": weights,
    "masters": masters, "reduction": reduction, "memory": memory, "blocks": blocks, "compile": compiling,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=PARTS, help="(all)")
    for part in parser.parse_args().parts or PARTS:
        PARTS[part]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
