"""Memory of the three networks, optimizers, EMA and activations by resolution, ZeRO stage and offload.

    python -m benchmarks.memory [--network 64 adm64 128 latent256 256] [--ranks 1 8] [--dtype bf16] [--json FILE]
    python -m benchmarks.memory --network sd15_512 sd15_512_full sdxl_1024 --checkpointing    # text-to-image pipelines
    python -m benchmarks.memory --measure            # on a GPU: runs what fits, and sets the allocator's peak beside it

Predicted by what ``train.py --dry-run`` predicts by (rdmd_fast/planning), for the distillation with an export of the
network as teacher, one micro-batch an update. CUDA context, workspaces and fragmentation are not in it. Pipelines are
those of configs/text, by adapters as its presets have them or (_full) by whole copies, with a guided teacher.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.step_cases import ROOT, distillation
from rdmd_fast.config import load_config
from rdmd_fast.model_files.text_pipeline import guided, read_text_pipeline_config
from rdmd_fast.networks.options import DhariwalUNetOptions, SongUNetOptions
from rdmd_fast.networks.text_options import LoRAOptions, TextUNetOptions
from rdmd_fast.planning.activations import Activations, activations
from rdmd_fast.planning.dry_run import total
from rdmd_fast.planning.planned_networks import PlannedNetwork, PlannedNetworks
from rdmd_fast.planning.zero_memory import ModelStates, ZeroSettings, model_states

GIB = 2**30
HOST = {"device": "cpu"}
WIDTHS = (6, 9, 10, 10, 12, 12, 9, 8, 10)


class Case(NamedTuple):
    """A network and the samples that a GPU has at once."""

    name: str
    options: SongUNetOptions | DhariwalUNetOptions | TextUNetOptions
    shape: tuple[int, int, int]
    micro_batch: int
    lora: LoRAOptions | None = None
    guidance: float = 1.0


def preset(name: str) -> SongUNetOptions:
    return load_config(str(ROOT / "configs" / name)).network


def cases() -> dict[str, Case]:
    # The widths of ADM's network for ImageNet at 256 (arXiv 2105.05233, Table 3).
    adm256 = DhariwalUNetOptions(
        kind="dhariwal_unet", model_channels=256, channel_mult=[1, 1, 2, 2, 4, 4], num_blocks=2,
        attn_resolutions=[32, 16, 8],
    )  # fmt: skip
    return {
        "64": Case("SongUNet 64²", SongUNetOptions(kind="song_unet", channel_mult=[1, 2, 2, 2]), (3, 64, 64), 32),
        "adm64": Case("ADM 64²", DhariwalUNetOptions(kind="dhariwal_unet"), (3, 64, 64), 32),
        "128": Case("SongUNet 128²", preset("celeba/teacher_female_128.yaml"), (3, 128, 128), 16),
        "latent256": Case("SongUNet, latents of 256²", preset("latent/teacher_256.yaml"), (4, 32, 32), 32),
        "256": Case("ADM 256²", adm256, (3, 256, 256), 4),
    }


def text_cases() -> dict[str, Case]:
    """Published U-Nets by adapters and by whole copies; their weights are not needed."""
    found = {}
    for model, micro_batch in (("sd15", 4), ("sdxl", 1)):
        options = read_text_pipeline_config(ROOT / "configs/text" / model).network
        config = load_config(str(ROOT / f"configs/text/{model}_lora.yaml"))
        for side in (512, 1024):
            shape = (options.channels, side // 8, side // 8)
            for suffix, lora in (("", config.lora), ("_full", None)):
                name = f"{model} {side}²{f', adapters of rank {lora.rank}' if lora else ''}"
                found[f"{model}_{side}{suffix}"] = Case(
                    name, options, shape, micro_batch, lora, config.guidance_of(options)
                )
    return found


LAYOUTS: dict[str, dict] = {
    **{f"ZeRO {stage}": {"stage": stage} for stage in range(4)},
    "ZeRO 2, optimizer offloaded": {"stage": 2, "offload_optimizer": HOST},
    "ZeRO 3, all offloaded": {"stage": 3, "offload_optimizer": HOST, "offload_param": HOST},
}


def planned(case: Case) -> PlannedNetworks:
    trained = case.options.model_copy(update={"lora": case.lora}) if case.lora else case.options
    network = PlannedNetwork.of(trained, case.shape, False)
    teacher = PlannedNetwork.of(guided(case.options, case.guidance), case.shape, False)
    return PlannedNetworks({"generator": network, "fake_score": network}, teacher, "generator")


def predict(networks: PlannedNetworks, used: Activations, layout: dict, ranks: int, dtype: str) -> dict[str, float]:
    """Bytes of a GPU by part, of the whole, and in host memory."""
    settings = ZeroSettings.of({"zero_optimization": layout})
    states: ModelStates = model_states(networks, settings, ranks, dtype, 1)
    parts = {part: size for part, size in states.device.items() if part != "update"}
    return {
        **parts, "activations": used.peak, "update": states.device["update"], "total": total(states, used),
        "host": sum(states.host.values()),
    }  # fmt: skip


def measure(key: str, layout: dict, dtype: str, checkpointing: bool) -> int:
    """The allocator's peak over three iterations in a process of its own; -1 where memory ran out."""
    words = [sys.executable, "-m", "benchmarks.memory", "--network", key, "--run", json.dumps(layout), "--dtype", dtype]
    done = subprocess.run(
        [*words, *(["--checkpointing"] if checkpointing else [])], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        if "out of memory" in done.stderr:
            return -1
        raise RuntimeError(f"{key} {layout}: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def run(case: Case, layout: dict, dtype: str, checkpointing: bool, iterations: int = 3) -> int:
    """What ``measure`` starts."""
    from rdmd_fast.networks import build_network
    from rdmd_fast.planning.timing import time_iterations
    from rdmd_fast.processes.world import join_world

    with tempfile.TemporaryDirectory(prefix="rdmd-memory-") as name:
        overrides = [
            f"run_dir={name}/run", f"train.dtype={dtype}", f"train.global_batch_size={case.micro_batch}",
            f"train.activation_checkpointing={str(checkpointing).lower()}", "train.steps=1000",
            f"deepspeed.zero_optimization={json.dumps(layout)}",
        ]  # fmt: skip
        network = build_network(case.options, case.shape)
        config = distillation(Path(name), case.options, case.shape, network, overrides)
        return time_iterations(config, join_world(), iterations).peak_bytes or 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = cases() | text_cases()
    parser.add_argument("--network", nargs="+", choices=known, default=list(cases()), help="(all but pipelines)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8], help="predict for so many GPUs (1 8)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="bf16", help="(bf16)")
    parser.add_argument("--checkpointing", action="store_true", help="with train.activation_checkpointing")
    parser.add_argument("--measure", action="store_true", help="run on this GPU, one rank")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--run", metavar="LAYOUT", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run is not None:
        print(run(known[arguments.network[0]], arguments.run, arguments.dtype, arguments.checkpointing))
        return 0
    if arguments.measure and not torch.cuda.is_available():
        parser.error("--measure: needs a GPU")
    rows = []
    for key in arguments.network:
        case = known[key]
        networks = planned(case)
        used = activations(networks, case.micro_batch, 1, arguments.dtype, arguments.checkpointing, fused=True)
        size = networks.trained["generator"].parameters / 1e6
        print(f"{case.name} ({size:.1f} M a network), {arguments.dtype}, {case.micro_batch} samples a GPU, GiB")
        titles = ("ranks", "weights", "gradients", "optimizer", "EMA", "activations", "total", "host", "measured")
        print(f"  {'':<30}" + "".join(f"{title:>{width}}" for title, width in zip(titles, WIDTHS, strict=True)))
        for name, layout in LAYOUTS.items():
            for ranks in arguments.ranks:
                row = predict(networks, used, layout, ranks, arguments.dtype)
                measured = None
                if arguments.measure and ranks == 1 and key in cases():
                    measured = measure(key, layout, arguments.dtype, arguments.checkpointing)
                numbers = [
                    row["parameters"], row["gradients"] + row["buckets"], row["optimizer"], row["EMA"],
                    row["activations"], row["total"], row["host"],
                ]  # fmt: skip
                cells = [str(ranks), *(f"{number / GIB:.2f}" for number in numbers)]
                cells.append("-" if measured is None else "too large" if measured < 0 else f"{measured / GIB:.2f}")
                print(f"  {name:<30}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True)))
                rows.append(
                    {"network": case.name, "parameters": size * 1e6, "layout": name, "ranks": ranks}
                    | {"dtype": arguments.dtype, "micro_batch": case.micro_batch, "measured": measured, **row}
                )
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
