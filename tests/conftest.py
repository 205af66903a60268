import json
import os
import signal
import subprocess
import sys
from pathlib import Path

# One thread per rank and test: the machines that run these have two cores, and sums must not depend on their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # but not torch, which the process that hands out the tests can do without

sys.path.append(str(Path(__file__).parent))  # of material.py


@pytest.fixture(autouse=True)
def nan_filled_empty():
    """Fill ``torch.empty`` and its like with NaN, so that a partial write shows."""
    import torch

    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def idle_machine(monkeypatch):
    """What a run says must not depend on what else the machine does."""
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))


@pytest.fixture(autouse=True, scope="session")
def other_kernels():
    """Tests run in the repository's root, and those that compare with diffusers import it themselves."""
    from rdmd_fast.extras import hide_own_kernels

    hide_own_kernels()


@pytest.fixture(autouse=True, scope="session")
def torch_linear():
    import torch

    torch.set_num_threads(1)
    return torch.nn.functional.linear


@pytest.fixture(autouse=True)
def own_linear(torch_linear):
    """ZeRO-3 leaves its own function in the place of torch's linear, which TorchScript cannot compile."""
    import torch

    torch.nn.functional.linear = torch_linear
    yield
    torch.nn.functional.linear = torch_linear


ROOT = Path(__file__).parent.parent
# Minutes between them: two workers that begin with these end together.
LONGEST = (
    "kernels/test_static.py", "engine/test_distributed.py", "test_trainer.py", "processes/test_signals.py",
    "test_trained_maps.py", "processes/test_hangs.py", "kernels/test_noise_forward.py", "test_fuzz.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    order = {str(ROOT / "tests" / name): place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(str(item.path), len(order)))


class Child:
    """Of a process that a server forked: what tests use of Popen."""

    def __init__(self, server, source, arguments, folder, environment, errors):
        self._server, self._errors, self.returncode = server, errors, None
        (stdin, self._in), (self._out, stdout) = os.pipe(), os.pipe()
        errors.touch()
        files = [*(f"/proc/{os.getpid()}/fd/{file}" for file in (stdin, stdout)), str(errors)]
        self.pid = server.run(source, arguments, folder, environment, files)
        os.close(stdin), os.close(stdout)
        self.stdin, self.stdout = os.fdopen(self._in, "w"), os.fdopen(self._out)

    def wait(self, timeout=60):
        if self.returncode is None:
            [self.returncode] = self._server.wait([self.pid], timeout)
        return self.returncode

    def finish(self) -> tuple[str, str]:
        """What it writes to its end, and its errors."""
        self.stdin.close()
        said = self.stdout.read()
        self.wait()
        return said, self._errors.read_text()

    def kill(self):
        if self.wait(0) is None:
            os.kill(self.pid, signal.SIGKILL)


class RankServer:
    """Starts processes, forked from one: see rank_server.py."""

    def __init__(self, *arguments, **environment):
        script = Path(__file__).parent / "processes/rank_server.py"
        self._process = subprocess.Popen(
            [sys.executable, str(script), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **environment},
        )  # fmt: skip
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

    def run(self, source, arguments, folder, environment, files) -> int:
        """Process id of what is executed as by ``python -c``."""
        argv, environment = [str(each) for each in arguments], {"PYTHONPATH": str(ROOT), **os.environ, **environment}
        request = {"source": source, "argv": argv, "folder": str(folder), "environment": environment, "files": files}
        self._ids.add(process := self._ask(**request))
        return process

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


@pytest.fixture(scope="session")
def fork_python(rank_server, tmp_path_factory):
    """``fork_python(source, *arguments)`` starts what ``python -c`` would, but with all modules imported."""

    def start(source, *arguments, folder=ROOT, **environment):
        return Child(rank_server, source, arguments, folder, environment, tmp_path_factory.mktemp("forks") / "errors")

    return start


@pytest.fixture(scope="session")
def interpreted(tmp_path_factory):
    """``interpreted(source, *arguments)`` runs it in a process whose kernels Triton interprets; returns its output."""
    pytest.importorskip("triton")
    environment = {"TRITON_INTERPRET": "1", "RDMD_KERNELS": "triton"}
    server = RankServer("kernels", **environment)

    def run(source, *arguments):
        child = Child(server, source, arguments, ROOT, environment, tmp_path_factory.mktemp("forks") / "errors")
        said, errors = child.finish()
        assert child.wait(300) == 0, said[-6000:] + errors
        return said

    yield run
    server.close()


@pytest.fixture(scope="session")
def interpreted_cases(interpreted):
    """``interpreted_cases(file)`` runs pytest on a file of tests/kernels with kernels interpreted."""
    source = "import sys, pytest; sys.exit(pytest.main(['-q', '-n', '0', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    return lambda file: interpreted(source, ROOT / "tests/kernels" / file)


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
