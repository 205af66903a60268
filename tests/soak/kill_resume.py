"""Kills training with SIGKILL again and again, lets it go on, and compares its end with an unbroken run's bit by bit.

    python tests/soak/kill_resume.py --kills 100 --in-saves 20 --groups 5 --stages 0 1 2 3

Each ZeRO stage trains a small RDMD problem once unbroken. Then the same command is started again and again in a second
folder, and killed in one of these ways:

inside a save     all ranks or one, while a checkpoint's folder has not got its name yet (they are halted to see that)
launcher's group  the process group of `torchrun` or `deepspeed`, near a save; ranks elsewhere must end by themselves
all ranks         at a random time after the start, start-up included
one rank          likewise

A run that reaches its end is compared (parameters, optimizers, EMA, random states, counters, export, metrics but for
times), and another begun until all kills are spent. Exit status 1 if a run differs, or does not go on from the newest
checkpoint that was there when it was killed.

Without a launcher, ranks are forked from this process, which has imported everything and opened nothing: a start costs
no imports.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
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

SAVE, GROUP, ALL, ONE = KINDS = "inside a save", "launcher's group", "all ranks", "one rank"
TRAIN = str(Path(__file__).resolve().parents[2] / "rdmd_fast/train.py")
LAUNCHERS = itertools.cycle(
    [["torch.distributed.run", "--nproc-per-node"], ["deepspeed.launcher.runner", "--num_gpus"]]
)
RANKS, STEPS, EVERY = 2, 36, 4
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
GRACE_SECONDS = 10.0  # for ranks to notice that another one, or their launcher, died
LIMIT_SECONDS = 120.0  # a start that takes longer hangs


@dataclass
class Job:
    """The processes of one start, each in a group of its own: all ranks, or their launcher."""

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
        """Whether all processes have ended within ``seconds``."""
        return wait_until(lambda: not self.running(), seconds)

    def send(self, number: int, pids: list[int]) -> None:
        for pid in pids:
            os.killpg(pid, number)  # not yet waited for: the number is still this process's

    def halt(self) -> None:
        """Stop all processes; returns when they stand still."""
        alive = self.running()
        self.send(signal.SIGSTOP, alive)
        for pid in alive:
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def clear(self) -> None:
        """Kill what is left."""
        self.send(signal.SIGKILL, self.running())
        self.wait(LIMIT_SECONDS)

    def tail(self) -> str:
        return " | ".join(self.log.read_text(errors="replace").splitlines()[-8:])


def wait_until(true, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.002)
    return true()


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


def start(run_dir: Path, stage: int, launched: bool = False) -> Job:
    """The same training command as ever, on new processes."""
    config, log = run_dir.with_name("config.json"), run_dir.with_name(f"{run_dir.name}.log")
    config.write_text(json.dumps(VALUES))
    log.unlink(missing_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    arguments = ["--config", str(config), f"run_dir={run_dir}", f"deepspeed.zero_optimization.stage={stage}"]
    if launched:
        command = [sys.executable, "-m", *next(LAUNCHERS), str(RANKS), "--master_port", port, TRAIN, *arguments]
        return Job([fork(log, os.execv, command[0], command)], log)
    return Job([fork(log, _rank, arguments, rank, port) for rank in range(RANKS)], log)


def fork(log: Path, action, *arguments) -> int:
    """A process, in a process group of its own, that ends with the status that ``action`` returns."""
    pid, status = os.fork(), 1
    if pid:
        with contextlib.suppress(PermissionError):  # it runs a launcher already
            os.setpgid(pid, pid)
        return pid
    try:
        os.setpgid(0, 0)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = action(*arguments)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _rank(arguments: list[str], rank: int, port: str) -> int:
    from rdmd_fast.trainer import main

    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(RANKS))
    return main(arguments)


# -- one kill ----------------------------------------------------------------------------------------------------------


def await_moment(job: Job, kind: str, checkpoints: Path, chance: random.Random, seconds: float) -> bool:
    """Wait for the moment of a kill; returns whether it came before the job's end. Halts the job inside a save."""
    if kind in (ALL, ONE):
        return not job.wait(chance.random() * seconds)
    seen, stale, saves = set(), unfinished(checkpoints), chance.randint(1, STEPS // EVERY // 2)
    deadline = time.monotonic() + LIMIT_SECONDS
    while job.running() and time.monotonic() < deadline:
        new = unfinished(checkpoints) - stale - seen
        seen |= new
        if new and len(seen) >= saves:
            time.sleep(chance.random() * (0.1 if kind == GROUP else 0.01))
            if kind == SAVE:
                job.halt()
            if kind == GROUP or new & unfinished(checkpoints):
                return bool(job.running())
            job.send(signal.SIGCONT, job.running())
        time.sleep(0.0005)
    return False


def unfinished(checkpoints: Path) -> set[str]:
    """Folders of checkpoints that are being written, or were when a job was killed."""
    newest = newest_step(checkpoints)
    with contextlib.suppress(FileNotFoundError):
        found = [re.fullmatch(r"\.step_(\d+)\..*partial", name) for name in os.listdir(checkpoints)]
        return {match[0] for match in found if match and (newest is None or int(match[1]) > newest)}
    return set()


def newest_step(checkpoints: Path) -> int | None:
    """Of the checkpoints that bear their names, or get them back at the next start."""
    names = [*checkpoints.glob("step_*"), *checkpoints.glob(".step_*.retired")]
    return max((int(re.search(r"step_(\d+)", path.name)[1]) for path in names), default=None)


def strike(job: Job, kind: str, chance: random.Random) -> None:
    """Kill all or one of the processes, and see the others end."""
    alive = job.running()
    one = kind == ONE or (kind == SAVE and chance.random() < 0.4)
    victims = [chance.choice(alive)] if one else alive
    job.send(signal.SIGKILL, victims)
    job.send(signal.SIGCONT, [pid for pid in alive if pid not in victims])
    job.wait(GRACE_SECONDS)


def trained_by(run_dir: Path) -> list[int]:
    """Processes, of a launcher or left by one, that were started to train there."""
    found, told = [], f"run_dir={run_dir}\0".encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [int(path.parent.name)] if told in path.read_bytes() else []
    return found


@dataclass
class Run:
    """One run from its first start to its end.

    Attributes:
        kills: (kind, seconds of the start that ended by it).
    """

    stage: int
    kills: list[tuple[str, float]] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kills = ", ".join(kind for kind, _ in self.kills)
        resumed = " ".join(map(str, self.resumed_at))
        return f"ZeRO {self.stage}: {kills}; resumed at {resumed or '-'}; {'; '.join(self.problems) or 'equal'}"


def broken_run(run_dir: Path, stage: int, kinds: list[str], chance: random.Random, seconds: float) -> Run:
    """Start, kill and start again until the run ends; takes the kills that it comes to off the end of ``kinds``."""
    run, before, statuses = Run(stage), None, [1]
    while any(statuses) and not run.problems:
        kind, begin = kinds[-1] if kinds else None, time.monotonic()
        job = start(run_dir, stage, launched=kind == GROUP)
        try:
            killed = bool(kind) and await_moment(job, kind, run_dir / "checkpoints", chance, seconds)
            if killed:
                strike(job, kind, chance)
            elif not job.wait(LIMIT_SECONDS):
                run.problems.append(f"no end within {LIMIT_SECONDS:.0f} s: {job.tail()}")
        finally:
            job.clear()
        if not wait_until(lambda: not trained_by(run_dir), GRACE_SECONDS):
            run.problems.append(f"{trained_by(run_dir)} live {GRACE_SECONDS:.0f} s after their launcher")
        statuses = list(job.statuses.values())
        if killed and any(statuses):
            run.kills.append((kinds.pop(), time.monotonic() - begin))
        elif any(statuses):
            run.problems.append(f"exit statuses {statuses}: {job.tail()}")
        for at in re.findall(r"resumed \S+ at step (\d+)", job.log.read_text(errors="replace"))[:1]:
            run.resumed_at.append(int(at))
            run.problems += [f"resumed at {at}, not at {before}"] if int(at) != before else []
        before = newest_step(run_dir / "checkpoints")
    return run


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


def soak(folder: Path, kills: dict[int, list[str]], seed: int) -> list[Run]:
    """Spend the ``kills`` of each stage; prints each run as it ends, and stops at a problem."""
    chance, runs = random.Random(seed), []
    preload()
    for stage, kinds in kills.items():
        whole, begin = folder / f"zero{stage}/whole", time.monotonic()
        whole.parent.mkdir()
        job = start(whole, stage)
        job.wait(LIMIT_SECONDS)
        job.clear()
        if any(job.statuses.values()):
            raise RuntimeError(f"the unbroken run at ZeRO {stage} fails: {job.tail()}")
        seconds = time.monotonic() - begin
        chance.shuffle(kinds)
        while kinds:
            broken = whole.with_name(f"broken_{len(runs)}")
            run = broken_run(broken, stage, kinds, chance, seconds)
            run.problems += run.problems or differences(whole, broken)
            runs.append(run)
            print(run, flush=True)
            if run.problems:
                return runs
    return runs


def spread(kills: int, in_saves: int, groups: int, stages: list[int], seed: int) -> dict[int, list[str]]:
    """Kinds of kills by stage, each kind in equal shares."""
    others = random.Random(seed).choices([ALL, ONE], [0.6, 0.4], k=kills - in_saves - groups)
    kinds = [SAVE] * in_saves + [GROUP] * groups + sorted(others)
    return {stage: kinds[index :: len(stages)] for index, stage in enumerate(stages)}


def table(runs: list[Run]) -> str:
    lines = [f"{'kind':<16}  ZeRO  kills  bit for bit  seconds"]
    for kind, stage in itertools.product(KINDS, sorted({run.stage for run in runs})):
        those = [
            (not run.problems, took) for run in runs if run.stage == stage for name, took in run.kills if name == kind
        ]
        equal, seconds = (sum(column) for column in zip(*those, strict=True)) if those else (0, 0)
        lines.append(f"{kind:<16}  {stage:>4}  {len(those):>5}  {equal:>11}  {seconds:>7.1f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="all stages and kinds together (50)")
    parser.add_argument("--in-saves", type=int, default=10, help="of them inside a save (10)")
    parser.add_argument("--groups", type=int, default=0, help="of them of a launcher's process group (0)")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], choices=range(4), help="of ZeRO")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which it kills")
    given = parser.parse_args(argv)
    if given.in_saves + given.groups > given.kills:
        parser.error("--in-saves and --groups are more than --kills")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rdmd_kill_resume_") as folder:
        planned = spread(given.kills, given.in_saves, given.groups, given.stages, given.seed)
        runs = soak(Path(folder), planned, given.seed)
    kinds = [kind for run in runs for kind, _ in run.kills]
    equal = not any(run.problems for run in runs)
    print(table(runs))
    print(
        f"{len(kinds)} kills, {kinds.count(SAVE)} of them inside a save, in {len(runs)} runs: "
        f"{'all equal to the unbroken ones bit for bit' if equal else 'NOT equal'} "
        f"({time.monotonic() - begin:.0f} s, seed {given.seed})"
    )
    return 0 if equal and len(kinds) == given.kills else 1


if __name__ == "__main__":
    sys.exit(main())
