"""Kills training with SIGKILL at random moments, lets it go on, and compares its end with an unbroken run's bit by bit.

    python tests/soak/kill_resume.py --kills 50 --ranks 2 --stages 0 1 2 3 --seed 0

Each ZeRO stage trains a small RDMD problem once unbroken. Then the same command is started again and again in a second
folder, and all its ranks or one of them are killed: half of the kills wait for a checkpoint that is being written, half
come at a random time after the start, start-up included. A run that reaches its end is compared (parameters,
optimizers, EMA, random states, counters, export, metrics but for times), and another begun until all kills are spent.
Exit status 1 if a run differs, or does not go on from the newest checkpoint that was there when it was killed.

Ranks are forked from this process, which has imported everything and opened nothing: a start costs no imports.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).resolve().parents[1]))
from material import toy_rdmd

STEPS, EVERY = 36, 4
VALUES = toy_rdmd(
    network={"kind": "mlp", "hidden": 32, "depth": 1},
    generator={"kind": "mlp", "hidden": 32, "depth": 1},
    rdmd={
        "weighting": "uniform",
        "fake_warmup": 3,
        "generator_optimizer": {"lr": 1e-3, "warmup": 5},
        "fake_optimizer": {"lr": 1e-3, "grad_clip": 10.0},
        "ema": {"half_life": 100.0},
    },
    train={"steps": STEPS, "global_batch_size": 16},
    # A line averages over five iterations, a checkpoint comes every four: unfinished means are in it, too.
    telemetry={"log_every": 5, "sample_every": 0, "tensorboard": False},
    validation={"count": 16, "every": 10},
    checkpoint={"every": EVERY},
)
GRACE_SECONDS = 10.0  # for ranks to notice that another one died
LIMIT_SECONDS = 120.0  # a start that takes longer hangs


@dataclass
class Job:
    """The ranks of one start, each in a session of its own."""

    pids: list[int]
    log: Path
    statuses: dict[int, int] = field(default_factory=dict)

    def running(self) -> list[int]:
        for pid in self.pids:
            if pid not in self.statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.statuses[pid] = os.waitstatus_to_exitcode(status)
        return [pid for pid in self.pids if pid not in self.statuses]

    def wait(self, seconds: float) -> bool:
        """Whether all ranks have ended within ``seconds``."""
        deadline = time.monotonic() + seconds
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.002)
        return not self.running()

    def kill(self, pids: list[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)  # not yet waited for: the number is still this process's

    def clear(self) -> int:
        """Kill what is left; returns how many ranks that were."""
        left = self.running()
        self.kill(left)
        self.wait(LIMIT_SECONDS)
        return len(left)

    def resumed_at(self) -> int | None:
        found = re.search(r"resumed \S+ at step (\d+)", self.log.read_text(errors="replace"))
        return int(found[1]) if found else None


def preload() -> None:
    """Import what a rank needs, without opening threads, sockets or process groups."""
    import deepspeed  # noqa: F401
    import matplotlib.backends.backend_agg  # noqa: F401
    import ot  # noqa: F401
    import scipy.optimize  # noqa: F401
    import torch._dynamo  # with the first optimizer, else seconds of each start
    import torch._inductor.compile_fx  # with the first ZeRO optimizer
    import torch.utils.flop_counter

    import rdmd_fast.experiment
    import rdmd_fast.monitoring.drawing
    import rdmd_fast.trainer  # noqa: F401
    from rdmd_fast.diffusion import ForwardProcess

    # Noise for thousands of such iterations would be drawn ahead at every start; the numbers are the same.
    ForwardProcess.BLOCK_ELEMENTS = 2**10
    torch.set_num_threads(1)
    assert len(os.listdir("/proc/self/task")) == 1, "threads do not live on in a fork"


def start(run_dir: Path, stage: int, ranks: int) -> Job:
    """The same training command as ever, on ``ranks`` new processes."""
    config = run_dir.with_name("config.json")
    config.write_text(json.dumps(VALUES))
    arguments = ["--config", str(config), f"run_dir={run_dir}", f"deepspeed.zero_optimization.stage={stage}"]
    log = run_dir.with_name(f"{run_dir.name}.log")
    log.unlink(missing_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _rank(arguments, log, rank, ranks, port)
        pids.append(pid)
    return Job(pids, log)


def _rank(arguments: list[str], log: Path, rank: int, ranks: int, port: int) -> None:
    status = 1
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        from rdmd_fast.trainer import main

        status = main(arguments)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


# -- one kill ----------------------------------------------------------------------------------------------------------


def await_moment(job: Job, checkpoints: Path, chance: random.Random, seconds: float) -> None:
    """Wait for a random moment: while a checkpoint is written, or any until ``seconds`` after the start."""
    if chance.random() < 0.5:
        deadline = time.monotonic() + chance.random() * seconds
        while job.running() and time.monotonic() < deadline:
            time.sleep(0.001)
        return
    ordinal, seen, stale = chance.randint(1, STEPS // EVERY // 2), set(), unpublished(checkpoints)
    while job.running() and len(seen) < ordinal:
        seen |= {name for name in unpublished(checkpoints) - stale if not name.endswith(".old.partial")}
        time.sleep(0.0005)
    time.sleep(chance.random() * 0.02)


def unpublished(checkpoints: Path) -> set[str]:
    """Names of folders that are being written, replaced or removed, or were when a job was killed."""
    with contextlib.suppress(FileNotFoundError):
        return {name for name in os.listdir(checkpoints) if name.startswith(".step_")}
    return set()


def newest_step(checkpoints: Path) -> int | None:
    """Of the checkpoints that bear their names."""
    steps = [int(path.name.removeprefix("step_")) for path in checkpoints.glob("step_*")]
    # One that was about to be replaced gets its name back at the next start.
    steps += [int(path.name.split(".")[1].removeprefix("step_")) for path in checkpoints.glob(".step_*.retired")]
    return max(steps, default=None)


@dataclass
class Row:
    """One run from its first start to its end."""

    stage: int
    kills: int = 0
    one_rank: int = 0
    inside_writing: int = 0
    lingered: int = 0
    resumed_at: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def cells(self) -> list[str]:
        resumed = " ".join(map(str, self.resumed_at))
        verdict = "yes" if not self.problems else "NO"
        numbers = self.stage, self.kills, self.one_rank, self.inside_writing, self.lingered
        return [*map(str, numbers), verdict, resumed]


HEADER = ["ZeRO", "kills", "of one rank", "inside writing", "ranks that lingered", "equal", "resumed at"]


def broken_run(folder: Path, stage: int, ranks: int, kills: int, chance: random.Random, seconds: float) -> Row:
    """Start, kill and start again until the run ends; at most ``kills`` times."""
    row, run_dir = Row(stage), folder / "broken"
    checkpoints, before = run_dir / "checkpoints", None
    while True:
        stale = unpublished(checkpoints)
        job = start(run_dir, stage, ranks)
        try:
            killing = row.kills < kills
            if killing:
                await_moment(job, checkpoints, chance, seconds)
            else:
                job.wait(LIMIT_SECONDS)
            alive = job.running()
            if killing and alive:
                victims = alive if chance.random() < 0.6 else [chance.choice(alive)]
                job.kill(victims)
                row.kills += 1
                row.one_rank += len(victims) < ranks
                job.wait(GRACE_SECONDS)
                row.lingered += len(job.running())
            elif alive:
                row.problems.append(f"no end within {LIMIT_SECONDS:.0f} s: {tail(job.log)}")
        finally:
            job.clear()
        at = job.resumed_at()
        if at is not None:
            row.resumed_at.append(at)
            if at != before:
                row.problems.append(f"resumed at {at}, the newest checkpoint was of step {before}")
        if not any(job.statuses.values()):
            return row
        if row.problems or (not killing or not alive):
            row.problems.append(f"exit statuses {list(job.statuses.values())}: {tail(job.log)}")
            return row
        row.inside_writing += bool(unpublished(checkpoints) - stale)
        before = newest_step(checkpoints)


def tail(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").splitlines()[-8:])


# -- comparison --------------------------------------------------------------------------------------------------------


def differences(one: Path, other: Path) -> list[str]:
    """What two finished run folders do not have in common, bit for bit, but for times."""
    from rdmd_fast.checkpoints.manifest import check_hashes, checkpoint_folders, read_manifest

    found = []
    for what, read in (("metrics", metrics), ("export", lambda run: tensors(run / "export"))):
        found += [f"{what} differ"] if read(one) != read(other) else []
    newest = [checkpoint_folders(run / "checkpoints")[0] for run in (one, other)]
    manifests = [read_manifest(folder) for folder in newest]
    for folder, manifest in zip(newest, manifests, strict=True):
        check_hashes(folder, manifest["files"])
    for key in ("step", "counters", "world_size", "zero_stage"):
        found += [f"{key} differs"] if manifests[0].get(key) != manifests[1].get(key) else []
    left, right = (tensors(folder) for folder in newest)
    if left.keys() != right.keys():
        found.append(f"tensors are others: {sorted(left.keys() ^ right.keys())[:4]}")
    unequal = [name for name in left.keys() & right.keys() if left[name] != right[name]]
    if unequal:
        found.append(f"{len(unequal)} of {len(left)} tensors differ: {sorted(unequal)[:4]}")
    return found


def metrics(run_dir: Path) -> list[dict]:
    """Lines of metrics.jsonl without what may differ between two runs of the same bits."""
    from rdmd_fast.monitoring.telemetry import TIME_KEYS

    lines = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIME_KEYS} for line in lines]


def tensors(folder: Path) -> dict[str, tuple]:
    """Every tensor in every file below ``folder``: {file and place in it: (dtype, shape, bytes)}."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        for key, value in load_file(path).items():
            content = value.view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
            found[f"{path.relative_to(folder)}:{key}"] = value.dtype, tuple(value.shape), content
    assert found, f"no tensors in {folder}"
    return found


# -- the whole ---------------------------------------------------------------------------------------------------------


def soak(folder: Path, kills: int, ranks: int, stages: list[int], seed: int) -> list[Row]:
    """Spread ``kills`` over the stages; prints a row for each run as it ends."""
    chance, rows = random.Random(seed), []
    preload()
    print("  ".join(HEADER), flush=True)
    for index, stage in enumerate(stages):
        place = folder / f"zero{stage}"
        place.mkdir()
        begin = time.monotonic()
        job = start(place / "whole", stage, ranks)
        whole_ended = job.wait(LIMIT_SECONDS)
        job.clear()
        if not whole_ended or any(job.statuses.values()):
            raise RuntimeError(f"the unbroken run at ZeRO {stage} fails: {tail(job.log)}")
        seconds = time.monotonic() - begin
        left = kills // len(stages) + (index < kills % len(stages))
        while left:
            broken = place / f"after_{left}"
            broken.mkdir()
            row = broken_run(broken, stage, ranks, left, chance, seconds)
            left -= row.kills
            row.problems += row.problems or differences(place / "whole", broken / "broken")
            rows.append(row)
            cells = [cell.ljust(len(name)) for cell, name in zip(row.cells(), HEADER, strict=True)]
            print("  ".join(cells), flush=True)
            for problem in row.problems:
                print(f"    {problem}", flush=True)
            if row.problems:
                return rows
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="all stages together (50)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], choices=range(4), help="of ZeRO")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which it kills")
    arguments = parser.parse_args(argv)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rdmd_kill_resume_") as folder:
        rows = soak(Path(folder), arguments.kills, arguments.ranks, arguments.stages, arguments.seed)
    kills, inside = sum(row.kills for row in rows), sum(row.inside_writing for row in rows)
    equal = not any(row.problems for row in rows)
    print(
        f"{kills} kills, {inside} of them inside the writing of a checkpoint, in {len(rows)} runs: "
        f"{'all equal to the unbroken ones bit for bit' if equal else 'NOT equal'} "
        f"({time.monotonic() - begin:.0f} s, seed {arguments.seed})"
    )
    return 0 if equal and kills == arguments.kills else 1


if __name__ == "__main__":
    sys.exit(main())
