"""Tries the launchers of docs/clusters.md on two nodes of one rank each: two sets of namespaces on one machine, gloo.

usage: python tests/cluster/two_nodes.py [TRIAL …] [--keep FOLDER]

Needs root; sshd and pdsh for `pdsh`, OpenMPI for `openmpi`, Slurm and munge for `srun`: what is missing is skipped.
Each launcher trains a few iterations, whose losses must be those of one node with two ranks; then a long run loses the
ranks of its second node to SIGKILL, and the first must end with an error within a minute. Nothing may be left running.
Exit status: 0 all passed, 1 some failed, 77 nothing could be tried.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import slurm
from nodes import SSH_PORT, Node, refusal, start_sshd, two_nodes, wait_until

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SCRIPT = ROOT / "rdmd_fast/train.py"
PORT = "29517"
STEPS, TOLERANCE = 6, 1e-6
START_SECONDS, FALL_SECONDS = 120, 60
SKIPPED = 77

Commands = list[tuple[Node, list[str]]]


class Skip(Exception):
    """This machine lacks what a trial needs."""


@dataclass
class Place:
    """Where a trial happens: ``folder`` is the disk that both nodes share, ``expected`` one node's losses."""

    nodes: list[Node]
    folder: Path
    expected: list[dict]

    def hostfile(self) -> str:
        path = self.folder / "hostfile"
        path.write_text("".join(f"{node.name} slots=1\n" for node in self.nodes))
        return str(path)


# ---- launchers: which command is typed on which node ----------------------------------------------------------------


def no_ssh(place: Place, job: list[str]) -> Commands:
    launch = [str(BIN / "deepspeed"), "--hostfile", place.hostfile(), "--no_ssh"]
    meet = ["--master_addr", "node-a", "--master_port", PORT]
    return [(node, [*launch, "--node_rank", str(rank), *meet, *job]) for rank, node in enumerate(place.nodes)]


def pdsh(place: Place, job: list[str]) -> Commands:
    _need("pdsh", "sshd")
    _sshd(place)
    (place.folder / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    launch = [str(BIN / "deepspeed"), "--hostfile", place.hostfile(), "--ssh_port", str(SSH_PORT)]
    return [(place.nodes[0], [*launch, "--master_port", PORT, *job])]


def openmpi(place: Place, job: list[str]) -> Commands:
    _need("mpirun", "sshd")
    _sshd(place)
    ssh = ["--mca", "plm_rsh_args", f"-p {SSH_PORT}", "--mca", "btl_tcp_if_include", "eth0"]
    names = ["MASTER_ADDR=node-a", f"MASTER_PORT={PORT}", "PYTHONPATH", "OMP_NUM_THREADS"]
    exported = [word for name in names for word in ("-x", name)]
    hosts = ["-n", "2", "--host", "node-a:1,node-b:1", "--allow-run-as-root"]
    return [(place.nodes[0], ["mpirun", *hosts, *ssh, *exported, sys.executable, *job])]


def torchrun(place: Place, job: list[str]) -> Commands:
    launch = [str(BIN / "torchrun"), "--nnodes", "2", "--nproc_per_node", "1"]
    meet = ["--master_addr", "node-a", "--master_port", PORT]
    return [(node, [*launch, "--node_rank", str(rank), *meet, *job]) for rank, node in enumerate(place.nodes)]


def torchrun_c10d(place: Place, job: list[str]) -> Commands:
    launch = [str(BIN / "torchrun"), "--nnodes", "2", "--nproc_per_node", "1"]
    meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"node-a:{PORT}", "--rdzv_id", "trial"]
    return [(node, [*launch, *meet, *job]) for node in place.nodes]


def srun(place: Place, job: list[str]) -> Commands:
    _slurm(place)
    launch = ["srun", "--nodes", "2", "--ntasks-per-node", "1", "--kill-on-bad-exit=1", sys.executable]
    return [(place.nodes[0], [*launch, *job])]


def deepspeed_slurm(place: Place, job: list[str]) -> Commands:
    _slurm(place)
    launch = [str(BIN / "deepspeed"), "--launcher", "slurm", "--hostfile", place.hostfile(), "--no_ssh_check"]
    spread = ["--launcher_args=--nodes 2 --ntasks-per-node 1 --kill-on-bad-exit=1"]
    return [(place.nodes[0], [*launch, *spread, "--master_addr", "node-a", *job])]


def srun_torchrun(place: Place, job: list[str]) -> Commands:
    _slurm(place)
    launch = ["srun", "--nodes", "2", "--ntasks-per-node", "1", "--kill-on-bad-exit=1", str(BIN / "torchrun")]
    meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"node-a:{PORT}", "--rdzv_id", "trial"]
    return [(place.nodes[0], [*launch, "--nnodes", "2", "--nproc_per_node", "1", *meet, *job])]


LAUNCHERS: dict[str, Callable[[Place, list[str]], Commands]] = {
    launcher.__name__: launcher
    for launcher in (no_ssh, pdsh, openmpi, torchrun, torchrun_c10d, srun, srun_torchrun, deepspeed_slurm)
}


def _need(*programs: str) -> None:
    missing = [name for name in programs if not shutil.which(name) and not Path("/usr/sbin", name).exists()]
    if missing:
        raise Skip(f"{', '.join(missing)} not installed")


def _sshd(place: Place) -> None:
    if not (place.folder / "ssh").exists():
        start_sshd(place.nodes, place.folder)


def _slurm(place: Place) -> None:
    _need(*slurm.PROGRAMS)
    if not (place.folder / "slurm").exists():
        slurm.start(place.nodes, place.folder)


# ---- trials ---------------------------------------------------------------------------------------------------------


def job(run_dir: Path | str, steps: int, *overrides: str) -> list[str]:
    toy = [
        "--config",
        str(ROOT / "configs/toy/gaussian_to_gaussian.yaml"),
        f"run_dir={run_dir}",
        f"train.steps={steps}",
    ]
    quick = ["validation.every=0", "validation.count=50", "rdmd.fake_warmup=0", "telemetry.tensorboard=false"]
    return [str(SCRIPT), *toy, *quick, "telemetry.log_every=1", *overrides]


def trains(place: Place, name: str) -> str:
    """A short run on both nodes; its losses are the baseline's."""
    run_dir = place.folder / f"{name}_trains"
    statuses = launch(place, name, job(run_dir, STEPS))
    if any(statuses):
        raise AssertionError(f"exit statuses {statuses}")
    worst = difference(place.expected, losses(run_dir))
    if worst > TOLERANCE:
        raise AssertionError(f"losses differ by {worst:.1e}")
    if not (run_dir / "export/generator.safetensors").exists():
        raise AssertionError("no export")
    gone = wait_until(lambda: not left(place), 20, lambda: f"left running: {left(place)}")
    return f"losses differ by {worst:.1e} from one node's, exit {statuses}, nothing left after {gone:.0f} s"


def loses_a_node(place: Place, name: str) -> str:
    """SIGKILL to the second node's ranks: nothing of the job is left within a minute, and it says that it failed."""
    run_dir = place.folder / f"{name}_killed"
    log = place.folder / f"{name}_killed.log"
    started = start(place, name, job(run_dir, 10**6, "checkpoint.every=0"), log)
    metrics = run_dir / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size, START_SECONDS, f"no iteration, see {log}")
    victims = place.nodes[1].ranks()
    if len(victims) != 1:
        raise AssertionError(f"ranks on node-b: {victims}")
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    rank = wait_until(lambda: not place.nodes[0].ranks(), FALL_SECONDS, lambda: f"left running: {left(place)}")
    rest = wait_until(lambda: not left(place), FALL_SECONDS - rank, lambda: f"left running: {left(place)}")
    statuses = [process.wait(timeout=FALL_SECONDS) for process in started]
    if not any(statuses):
        raise AssertionError(f"exit statuses {statuses} after a rank was killed")
    return f"the other node's rank gone after {rank:.0f} s, all after {rank + rest:.0f} s, exit {statuses}"


def unshared(place: Place, name: str) -> str:
    """The run folder is a disk of its own on each node: one line, exit 2 of the ranks."""
    run_dir = place.folder / f"{name}_unshared"
    run_dir.mkdir()
    place.nodes[1].run("mount", "-t", "tmpfs", "tmpfs", run_dir)
    statuses = launch(place, name, job(run_dir, STEPS), seconds=START_SECONDS + 60)
    output = (place.folder / f"{name}_unshared.log").read_text()
    lines = [line for line in output.splitlines() if "is not the same folder on" in line]
    if len(lines) != 1 or "node-a" not in lines[0] or "node-b" not in lines[0] or "Traceback" in output:
        raise AssertionError(f"output: {output[-2000:]}")
    if list(run_dir.glob("checkpoints/*")) or statuses != [2, 2]:
        raise AssertionError(f"exit statuses {statuses}, {list(run_dir.iterdir())}")
    return f"exit {statuses}: {lines[0]}"


def loopback_names(place: Place, name: str) -> str:
    """Each node's own name means 127.0.1.1 there, as Debian's and Ubuntu's /etc/hosts have it."""
    for node in place.nodes:
        others = [f"{other.address} {other.name}" for other in place.nodes if other is not node]
        hosts = place.folder / f"hosts_{node.name}"
        hosts.write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {node.name}", *others]) + "\n")
        node.run("mount", "--bind", hosts, "/etc/hosts")
    run_dir = place.folder / f"{name}_loopback"
    statuses = launch(place, name, job(run_dir, STEPS))
    if any(statuses) or not (run_dir / "export/generator.safetensors").exists():
        raise AssertionError(f"exit statuses {statuses}")
    return f"exit {statuses}"


def requeues(place: Place, name: str) -> str:
    """docs/train.sbatch: signalled as before its time limit, it saves, is queued again and goes on."""
    _slurm(place)
    first, run_dir, log = place.nodes[0], place.folder / "requeued", place.folder / "rdmd-1.log"
    script = place.folder / "train.sbatch"
    script.write_text((ROOT / "docs/train.sbatch").read_text().replace("#SBATCH --gpus-per-node=8\n", ""))
    here = ["--ntasks-per-node=1", "--cpus-per-task=1", f"--output={place.folder}/%x-%j.log"]
    first.run("sbatch", *here, script, *job(run_dir, 10**6)[1:], cwd=ROOT)

    def lines(word: str) -> list[str]:
        return [line for line in log.read_text().splitlines() if word in line] if log.exists() else []

    metrics = run_dir / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size, START_SECONDS, f"no iteration, see {log}")
    first.run("scancel", "--signal=USR1", "1")
    wait_until(lambda: lines("state saved"), 60, f"not stopped, see {log}")
    wait_until(lambda: "Restarts=1" in first.run("scontrol", "show", "job", "1"), 60, f"not queued again, see {log}")
    # Slurm starts it again after two minutes: before that the node's daemon may refuse the job.
    wait_until(lambda: lines("resumed"), START_SECONDS + 150, f"not resumed, see {log}")
    first.run("scancel", "1")
    wait_until(lambda: not left(place), FALL_SECONDS, lambda: f"left running: {left(place)}")
    return f"{lines('state saved')[0].strip()}; {lines('resumed')[0].strip()}"


PARTS = {part.__name__: part for part in (trains, loses_a_node, unshared, loopback_names, requeues)}
TRIALS = [f"{name}:{part}" for name in LAUNCHERS for part in ("trains", "loses_a_node")]
TRIALS += ["no_ssh:unshared", "no_ssh:loopback_names", "sbatch:requeues"]


def launch(place: Place, name: str, job: list[str], seconds: float = START_SECONDS) -> list[int]:
    """Exit statuses of the commands; the output goes to a log beside the run folder."""
    run_dir = next(word for word in job if word.startswith("run_dir=")).removeprefix("run_dir=")
    log = Path(f"{run_dir}.log")
    started = start(place, name, job, log)
    deadline = time.monotonic() + seconds
    try:
        statuses = [process.wait(timeout=max(1, deadline - time.monotonic())) for process in started]
    except subprocess.TimeoutExpired:
        raise AssertionError(f"not done in {seconds} s: {log.read_text()[-3000:]}") from None
    return statuses


def start(place: Place, name: str, job: list[str], log: Path) -> list[subprocess.Popen]:
    return [node.start(command, place.folder, log) for node, command in LAUNCHERS[name](place, job)]


def left(place: Place) -> list[str]:
    return [f"{node.name}: {' '.join(words)}" for node in place.nodes for words in node.processes().values()]


def losses(run_dir: Path) -> list[dict]:
    lines = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: line[key] for key in ("step", "fake_loss", "transport_cost")} for line in lines if "fake_loss" in line
    ]


def difference(expected: list[dict], found: list[dict]) -> float:
    """The largest difference, relative above 1; infinite if the lines are not the same ones."""
    if len(expected) != STEPS or [line["step"] for line in expected] != [line["step"] for line in found]:
        return float("inf")
    pairs = [(a[key], b[key]) for a, b in zip(expected, found, strict=True) for key in a]
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in pairs)


def baseline(folder: Path, environment: dict[str, str]) -> list[dict]:
    """The same training on one node with two ranks."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [*launch, *job(folder / "baseline", STEPS)], cwd=folder, env=environment, check=True, capture_output=True
    )
    return losses(folder / "baseline")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", nargs="*", default=TRIALS, metavar="TRIAL", help=f"of {', '.join(TRIALS)}")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work there and leave logs and runs")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.trials) - set(TRIALS))
    if unknown:
        parser.error(f"no trial {', '.join(unknown)}: choose from {', '.join(TRIALS)}")
    reason = refusal()
    if reason:
        print(f"skipped: {reason}")
        return SKIPPED
    with tempfile.TemporaryDirectory(prefix="two_nodes_") as temporary:
        folder = arguments.keep.resolve() if arguments.keep else Path(temporary)
        folder.mkdir(exist_ok=True)
        return try_all(arguments.trials, folder)


def try_all(trials: list[str], folder: Path) -> int:
    path = f"{BIN}:{os.environ['PATH']}:/usr/sbin:/sbin"
    environment = {"PATH": path, "HOME": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    expected = baseline(folder, environment) if any(trial.endswith(":trains") for trial in trials) else []
    results = []
    for trial in trials:
        name, part = trial.split(":")
        place_folder = Path(tempfile.mkdtemp(prefix=f"{name}_{part}_", dir=folder))
        try:
            with two_nodes(place_folder, environment) as nodes:
                results.append(("passed", PARTS[part](Place(nodes, place_folder, expected), name)))
        except Skip as reason:
            results.append(("skipped", str(reason)))
        except (AssertionError, TimeoutError, RuntimeError) as error:
            results.append(("FAILED", "".join(traceback.format_exception_only(error)).strip()))
        print(f"{trial:28} {results[-1][0]}: {results[-1][1]}", flush=True)
    verdicts = {verdict for verdict, _ in results}
    return 1 if "FAILED" in verdicts else 0 if "passed" in verdicts else SKIPPED


if __name__ == "__main__":
    sys.exit(main())
