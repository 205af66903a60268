import json
import os
import signal
import subprocess
import sys
from pathlib import Path

# One thread per rank and test: the machines that run these have two cores, and sums must not depend on their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
sys.path.append(str(Path(__file__).parent))  # of material.py


@pytest.fixture(autouse=True)
def nan_filled_empty():
    """Fill ``torch.empty`` and its like with NaN, so that a partial write shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


LINEAR = torch.nn.functional.linear


@pytest.fixture(autouse=True)
def own_linear():
    """ZeRO-3 leaves its own function in the place of torch's linear, which TorchScript cannot compile."""
    torch.nn.functional.linear = LINEAR
    yield
    torch.nn.functional.linear = LINEAR


ROOT = Path(__file__).parent.parent


class RankServer:
    """Starts ranks of the trainer, forked from one process: see rank_server.py."""

    def __init__(self):
        script = Path(__file__).parent / "processes/rank_server.py"
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._ids: set[int] = set()
        assert self._process.stdout.readline() == "ready\n"

    def _ask(self, **request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, argv, ranks, log, before="") -> list[int]:
        """Process ids of ``ranks`` ranks; ``before`` is Python that each executes first."""
        ids = self._ask(argv=[str(each) for each in argv], ranks=ranks, log=str(log), before=before)
        self._ids |= set(ids)
        return ids

    def wait(self, ids, seconds=60.0) -> list[int | None]:
        """Exit statuses; None for a rank that still runs."""
        statuses = self._ask(wait=ids, seconds=seconds)
        self._ids -= {process for process, status in zip(ids, statuses, strict=True) if status is not None}
        return statuses

    def close(self) -> None:
        for process in self._ids:  # those whose status nobody has asked for are not reaped: the ids are still theirs
            os.kill(process, signal.SIGKILL)
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="session")
def rank_server():
    server = RankServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def launch_ranks(rank_server, tmp_path_factory):
    """``launch_ranks(command, ranks, folder)`` runs ``[script or -m, module, arguments …]`` as torchrun would."""

    def launch(command, ranks, folder="."):
        run = "runpy.run_module" if command[0] == "-m" else "runpy.run_path"
        words = command[command[0] == "-m" :]
        before = (
            f"import os, runpy, sys; os.chdir({str(folder)!r}); sys.path.insert(0, {str(ROOT)!r}); "
            f"sys.argv = {list(map(str, words))!r}; {run}({str(words[0])!r}, run_name='__main__'); sys.exit(0)"
        )
        log = tmp_path_factory.mktemp("ranks") / "log"
        ids = rank_server.start([], ranks, log, before)
        assert rank_server.wait(ids, 600) == [0] * ranks, log.read_text()[-6000:]
        return log.read_text()

    return launch


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Packed 8x8 digits of one hue, which no test may change."""
    from material import pack

    folder = tmp_path_factory.mktemp("digits")
    assert pack("digits", "--out", folder, "--hues", 1) == 0
    return folder


@pytest.fixture
def computed(monkeypatch):
    """Names of the points that were computed, in this process: starting another takes seconds."""
    from rdmd_fast.studies import jobs as points

    names = []

    def compute(todo, jobs, say):
        for folder, point in todo.items():
            names.append(point.name)
            points._work(point, folder)

    monkeypatch.setattr(points, "_compute", compute)
    return names


@pytest.fixture
def small_disk(tmp_path):
    """``small_disk(KiB)`` mounts a tmpfs of that size, or resizes it, and returns its folder."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def resize(kib: int):
        mounted = os.path.ismount(disk)
        options = f"{'remount,' * mounted}size={kib}k"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True)
        if not mounted and done.returncode:
            pytest.skip("mounting is not permitted here")
        assert done.returncode == 0, done.stderr
        return disk

    yield resize
    if os.path.ismount(disk):
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def step_run(tmp_path):
    """Builds runs of a case of benchmarks.step_cases, batch 8; closes them."""
    from benchmarks.step_cases import run_config
    from benchmarks.step_sides import Ours

    runs = []

    def build(case, dtype, *overrides, stage=0):
        runs.append(Ours(run_config(case, dtype, tmp_path, overrides, 8, stage)))
        return runs[-1]

    yield build
    for run in runs:
        run.experiment.close()
