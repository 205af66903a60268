"""The two numbers of an iteration, FLOPs and bytes, of each configuration of the distillation, and the floor they give.

    python -m benchmarks.roofline [CONFIG.yaml ...] [--tflops 67 494 989 --tbps 3.35] [--json FILE]

FLOPs are those of matrix products and convolutions. Bytes are what moves outside them, counted operation by operation
with the fused kernels as a GPU launches them (``benchmarks.traffic``): of the networks by sample, by running each
forward and backward at two and at four samples; of optimizers and EMA by parameter, by running digits' iterations. The
arithmetic between the networks, a thousandth of theirs, and the embedding of λ are left out. The floor takes matrix
products at the one rate and all other bytes at the other, neither hidden by the other: rates of this machine, measured,
unless given. Products in fp32 go at TF32's rate where the configuration allows it (``train.tf32``).
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.networks import DTYPES, matmul_peak
from benchmarks.step_cases import ROOT, network_options, run_config
from benchmarks.step_sides import Ours
from benchmarks.step_tables import MIB
from benchmarks.timing import copy_bandwidth
from benchmarks.traffic import MATMULS, network_traffic
from rdmd_fast.config import load_config
from rdmd_fast.engine.options import TrainOptions
from rdmd_fast.networks import build_network
from rdmd_fast.networks.flops import distillation_flops, forward_flops

# Shapes of samples follow from the data.
SHAPES = {
    "afhqv2": (3, 64, 64), "celeba/rdmd_male2female_128": (3, 128, 128), "celeba": (3, 64, 64), "digits": (3, 8, 8),
    "images": (3, 64, 64), "latent": (4, 32, 32), "mnist": (3, 32, 32), "toy": (2,),
}  # fmt: skip


class Roofline(NamedTuple):
    """FLOPs and bytes of an iteration.

    Attributes:
        parameters: of one network.
        fixed: bytes whatever the batch.
    """

    parameters: int
    flops_a_sample: float
    bytes_a_sample: float
    fixed: float

    def moved(self, batch: int) -> float:
        """Count bytes."""
        return batch * self.bytes_a_sample + self.fixed

    def floor(self, batch: int, flops_rate: float, bytes_rate: float) -> float:
        """Give seconds."""
        return batch * self.flops_a_sample / flops_rate + self.moved(batch) / bytes_rate


def sample_shape(path: Path) -> tuple[int, ...]:
    name = path.relative_to(ROOT / "configs").as_posix()
    return next(shape for beginning, shape in SHAPES.items() if name.startswith(beginning))


def networks_of(config) -> tuple:
    """Give (options of G's and of the scores' networks, is the teacher a network)."""
    if config.teacher == "analytic":
        return config.generator, config.network, False
    for path in sorted((ROOT / "configs").glob("*/*teacher*.yaml")):
        teacher = load_config(str(path))
        if f"{teacher.run_dir}/export" == config.teacher:
            network = teacher.network or network_options("songunet64")  # EDM's for 64×64, which is downloaded
            return network, network, True
    raise LookupError(f"no configuration trains {config.teacher}")


@functools.cache
def _passes(options: str, shape: tuple[int, ...], dtype: str, kind: type) -> tuple[float, float, int]:
    """Count bytes by sample of a network's forward pass, of forward and backward; its parameters."""
    torch.manual_seed(0)
    network = build_network(kind.model_validate_json(options), shape, dropout=False).to(DTYPES[dtype])
    moved = {}
    for batch in (2, 4):
        x, c_noise = torch.randn(batch, *shape), torch.zeros(batch)

        def forward(x=x, c_noise=c_noise):
            with torch.no_grad():
                network(x, c_noise)

        def both(x=x, c_noise=c_noise):
            output = network(x, c_noise)
            network.zero_grad()
            torch.autograd.backward(output, torch.ones_like(output))

        moved[batch] = [network_traffic(step, MATMULS) for step in (forward, both)]
    once, twice = moved.values()
    return *((b - a) / 2 for a, b in zip(once, twice, strict=True)), sum(p.numel() for p in network.parameters())


def passes(options, shape: tuple[int, ...], dtype: str) -> tuple[float, float, int]:
    return _passes(options.model_dump_json(), shape, dtype, type(options))


@functools.cache
def bytes_a_parameter(dtype: str) -> tuple[float, float]:
    """That do not depend on the batch, without ZeRO: of the generator's update with EMA, of one of the fake score."""
    fixed = []
    for updates in (1, 2):
        once, twice = (_digits_traffic(dtype, batch, updates) for batch in (8, 16))
        fixed.append(2 * once - twice)
    size = passes(network_options("digits"), (3, 8, 8), dtype)[2]
    fake = fixed[1] - fixed[0]
    return (fixed[0] - fake) / size, fake / size


def _digits_traffic(dtype: str, batch: int, updates: int) -> int:
    """Count bytes of an iteration of the digits."""
    with tempfile.TemporaryDirectory(prefix="rdmd-roofline-") as folder:
        run = Ours(run_config("digits", dtype, Path(folder), [f"rdmd.fake_updates={updates}"], batch))
        try:
            run.iteration()  # what is made once is made
            return network_traffic(run.iteration, MATMULS)
        finally:
            run.experiment.close()


def roofline(config, shape: tuple[int, ...]) -> Roofline:
    """Count an iteration as configured, fake updates before the first one left out."""
    options, score_options, has_teacher = networks_of(config)
    dtype = config.train.dtype
    updates = config.rdmd.fake_updates if config.rdmd.fake_score == "learned" else 0
    main, score = (forward_flops(part, shape) for part in (options, score_options))
    (forward, both, parameters), (score_forward, score_both, _) = (
        passes(part, shape, dtype) for part in (options, score_options)
    )
    rollouts = max(updates - 1, 0)
    generator_update, fake_update = bytes_a_parameter(dtype)
    return Roofline(
        parameters,
        distillation_flops(main, forward_flops(score_options, shape) if has_teacher else 0.0, score, updates),
        both + (has_teacher + (updates > 0)) * score_forward + updates * score_both + rollouts * forward,
        parameters * (generator_update + updates * fake_update),
    )


def product_rate(train: TrainOptions, tflops: Sequence[float] | None) -> float:
    """FLOP/s of matrix products as ``train`` computes them; ``tflops`` are of fp32, TF32 and bf16, or are measured."""
    if tflops is None:
        return matmul_peak(train.dtype, train.tf32)
    fp32, tf32, bf16 = tflops
    return 1e12 * (bf16 if train.dtype != "fp32" else tf32 if train.tf32 else fp32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", type=Path, help="(all of the distillation)")
    rates = {"type": float, "nargs": 3, "metavar": ("FP32", "TF32", "BF16")}
    parser.add_argument("--tflops", **rates, help="10^12 FLOP/s of products (this machine's)")
    parser.add_argument("--tbps", type=float, help="10^12 bytes/s of the memory (this machine's)")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    arguments = parser.parse_args()
    entries = []
    heads = ("M", 7), ("updates", 8), ("GFLOP", 9), ("MiB", 9), ("MiB fixed", 10), ("FLOP/B", 8), ("floor ms", 10)
    print(f"{'configuration':<36}" + "".join(f"{name:>{width}}" for name, width in heads))
    for path in arguments.configs or sorted((ROOT / "configs").glob("*/*.yaml")):
        if path.name == "study.yaml":  # of `rdmd study`, no training's
            continue
        config = load_config(str(path))
        if config.stage != "rdmd":
            continue
        counted, batch = roofline(config, sample_shape(path.resolve())), config.train.global_batch_size
        flops_rate = product_rate(config.train, arguments.tflops)
        bytes_rate = 1e12 * arguments.tbps if arguments.tbps else copy_bandwidth()
        entry = {
            "config": "/".join(path.parts[-2:]), "dtype": config.train.dtype, "batch": batch,
            "fake_updates": config.rdmd.fake_updates, **counted._asdict(),
            "flops_a_byte": batch * counted.flops_a_sample / counted.moved(batch), "flops_rate": flops_rate,
            "bytes_rate": bytes_rate, "floor_seconds": counted.floor(batch, flops_rate, bytes_rate),
        }  # fmt: skip
        entries.append(entry)
        print(
            f"{'/'.join(path.parts[-2:]):<36}{counted.parameters / 1e6:>7.2f}{entry['fake_updates']:>8}"
            f"{counted.flops_a_sample / 1e9:>9.3g}{counted.bytes_a_sample / MIB:>9.3g}{counted.fixed / MIB:>10.3g}"
            f"{entry['flops_a_byte']:>8.0f}{1e3 * entry['floor_seconds']:>10.3g}",
            flush=True,
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(entries, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
