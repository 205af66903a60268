"""Bytes that a rank sends in an iteration by ZeRO stage: counted, and by the formula of rdmd_fast/planning.

    python -m benchmarks.communication [--ranks 2] [--json FILE]
    python -m benchmarks.communication --table > docs/…      the formula for many GPUs, as Markdown

The counted runs are the toy and the digits' distillation, on this machine's CPU, with networks as initialised: bytes do
not depend on weights. Rows "as DeepSpeed comes" leave ZeRO-3's prefetching, reuse distance and small parameters at
their defaults, which spare gathers of networks this small; the other rows of stage 3 set them to 0.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.collectives import ITERATIONS
from rdmd_fast import cli
from rdmd_fast.config import load_config, validate_config
from rdmd_fast.engine.batch_layout import BatchLayout
from rdmd_fast.model_files.export_format import ExportConfig, write_export
from rdmd_fast.networks import build_network
from rdmd_fast.networks.options import DhariwalUNetOptions, SongUNetOptions
from rdmd_fast.planning.communication import iteration_payload
from rdmd_fast.planning.planned_networks import PlannedNetwork, PlannedNetworks, planned_networks
from rdmd_fast.planning.zero_memory import ZeroSettings
from rdmd_fast.processes.world import World

ROOT = Path(__file__).parent.parent
EVERY_GATHER = {
    "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
}  # fmt: skip

# Inputs of the table on paper, bytes per second in one direction.
NVLINK = 450e9  # a GPU, among the 8 H100 of a node
INFINIBAND = 400e9 / 8  # a GPU, between nodes: 400 Gb/s
GPUS_A_NODE = 8
EFFICIENCIES = (1.0, 0.7)


# -- counted -----------------------------------------------------------------------------------------------------------


def prepare_digits(folder: Path, **network) -> dict:
    """Packed digits and a teacher as initialised below ``folder``; plain values of the distillation's configuration.

    ``network`` changes keys of configs/digits/teacher_3.yaml's.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        if cli.main(["pack", "digits", "--out", str(folder / "shards"), "--hues", "1"]):
            raise RuntimeError("the digits could not be packed")
    teacher = load_config(str(ROOT / "configs/digits/teacher_3.yaml"))
    options = teacher.network.model_copy(update=network)
    export = ExportConfig(role="teacher", network=options, sample_shape=[3, 8, 8], diffusion=teacher.diffusion or {})
    write_export(folder / "teacher", export, build_network(options, (3, 8, 8)).state_dict())
    return {
        "stage": "rdmd",
        "run_dir": str(folder / "run"),
        "data": {"source": str(folder / "shards/2/train")},
        "teacher": str(folder / "teacher"),
        "train": {"steps": 5, "global_batch_size": 8},
        "telemetry": {"tensorboard": False, "sample_count": 2},
    }


def toy() -> dict:
    """Plain values of the toy's configuration, with two fake-score updates an iteration."""
    config = load_config(str(ROOT / "configs/toy/gaussian_to_8gaussians.yaml"))
    values = config.model_dump(mode="json", exclude_unset=True)
    values["rdmd"] = {**values.get("rdmd", {}), "fake_updates": 2}
    values["train"] = {"steps": 5, "global_batch_size": 16}
    values["telemetry"] = {"tensorboard": False}
    return values


def at_stage(values: dict, stage: int, **zero) -> dict:
    """``values`` with a ZeRO stage and further keys of zero_optimization."""
    values = copy.deepcopy(values)
    values["deepspeed"] = {"zero_optimization": {"stage": stage, **zero}}
    return values


def on_ranks(worker: list[str], cases: list[dict], ranks: int, folder: Path, launch: Callable | None = None) -> list:
    """What ``worker CASES.json RESULTS.json`` finds for each case in one group of ``ranks`` processes on the CPU.

    Args:
        launch: ``launch(command, ranks)`` runs the processes; None for torchrun.

    Raises:
        RuntimeError: the processes failed; holds the end of what they printed.
    """
    listing, results = folder / "cases.json", folder / "results.json"
    listing.write_text(json.dumps(cases))
    (launch or _torchrun)([*worker, str(listing), str(results)], ranks)
    return json.loads(results.read_text())


def _torchrun(command: list[str], ranks: int) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{ranks} ranks failed: {done.stderr[-3000:]}")


def count(cases: list[dict], ranks: int, folder: Path, iterations: int = ITERATIONS, launch=None) -> list[dict]:
    """``collectives.measure`` of each case."""
    return on_ranks(["-m", "benchmarks.collectives", "--iterations", str(iterations)], cases, ranks, folder, launch)


def formula(values: dict, ranks: int) -> float:
    """Bytes that a rank sends in an iteration of the run that ``values`` configure, by the formula."""
    config = validate_config(values, "case")
    layout = BatchLayout.of(config.train, World(0, ranks, None))
    payloads = iteration_payload(
        planned_networks(config), ZeroSettings.of(config.deepspeed), ranks, config.train.dtype, layout.accumulation,
        config.rdmd.fake_updates, config.train.activation_checkpointing,
    )  # fmt: skip
    return sum(payload.sent(ranks) for payload in payloads.values())


def rows(ranks: int, folder: Path) -> list[dict]:
    """Counted and formula of the toy and the digits at every stage."""
    named = []
    for name, values in (("toy, k = 2", toy()), ("digits, k = 1", prepare_digits(folder))):
        named += [(name, at_stage(values, stage)) for stage in range(3)]
        named.append((f"{name}, reduced to owners", at_stage(values, 2, use_multi_rank_bucket_allreduce=False)))
        named.append((name, at_stage(values, 3, **EVERY_GATHER)))
        named.append((f"{name}, as DeepSpeed comes", at_stage(values, 3)))
    counted = count([values for _, values in named], ranks, folder)
    table = []
    for (name, values), result in zip(named, counted, strict=True):
        expected = formula(values, ranks)
        stage = values["deepspeed"]["zero_optimization"]["stage"]
        table.append(
            {"case": name, "stage": stage, "ranks": ranks, "formula": expected, **result}
            | {"ratio": result["sent"] / expected if expected else None}
        )
    return table


def format_row(row: dict) -> str:
    ratio = "-" if row["ratio"] is None else f"{row['ratio']:.4f}"
    return (
        f"{row['case']:<36} ZeRO {row['stage']}  counted {row['sent']:12.0f} B  formula {row['formula']:12.0f} B  "
        f"ratio {ratio}  votes {row['votes']:.0f} B  {row['calls']} calls"
    )


# -- on paper ----------------------------------------------------------------------------------------------------------


def seconds(sent: float, ranks: int, efficiency: float) -> float:
    """Time of ``sent`` bytes a rank. Across nodes eight rings leave a node, one through each GPU's adapter, so that a
    ring's eighth of the bytes crosses there; inside all of them pass each GPU's NVLink."""
    slowest = NVLINK if ranks <= GPUS_A_NODE else min(NVLINK, GPUS_A_NODE * INFINIBAND)
    return sent / (slowest * efficiency)


def on_paper() -> str:
    """The Markdown table for two published networks in bf16, one micro-batch an update, k = 1."""
    shapes = {
        "SongUNet 64×64": SongUNetOptions(kind="song_unet", channel_mult=[1, 2, 2, 2]),
        "ADM 64×64": DhariwalUNetOptions(kind="dhariwal_unet", label_dim=1000),
    }
    sizes = (8, 64, 512)
    lines = [
        "| network | ZeRO | sent a GPU and iteration, 8 / 64 / 512 GPUs | time at full bandwidth | at 70 % |",
        "|---|---|---|---|---|",
    ]
    for name, options in shapes.items():
        network = PlannedNetwork.of(options, (3, 64, 64), False)
        networks = PlannedNetworks({"generator": network, "fake_score": network}, network, "generator")
        for stage in range(4):
            settings = ZeroSettings.of({"zero_optimization": {"stage": stage}})
            sent = [
                sum(load.sent(n) for load in iteration_payload(networks, settings, n, "bf16", 1, 1, False).values())
                for n in sizes
            ]
            cells = [" / ".join(f"{size / 1e6:.0f}" for size in sent) + " MB"]
            for efficiency in EFFICIENCIES:
                times = (1e3 * seconds(size, n, efficiency) for size, n in zip(sent, sizes, strict=True))
                cells.append(" / ".join(f"{time:.2f}" for time in times) + " ms")
            label = f"{name} ({network.parameters / 1e6:.1f} M)" if stage == 0 else ""
            lines.append(f"| {label} | {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes on this machine's CPU (2)")
    parser.add_argument("--table", action="store_true", help="count nothing, print the table for 8 to 512 GPUs")
    parser.add_argument("--json", metavar="FILE", help="write the counted rows there")
    arguments = parser.parse_args()
    if arguments.table:
        print(on_paper())
        return
    with tempfile.TemporaryDirectory() as folder:
        table = rows(arguments.ranks, Path(folder))
    for row in table:
        print(format_row(row))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
