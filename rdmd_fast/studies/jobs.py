"""A study: many points, each computed once and stored, some at a time.

A point is a function of plain settings. Its folder is FOLDER/NAME-DIGEST, the digest being that of its settings: a
point of other settings stands beside it, and a study that was stopped goes on where it was. What a training needs of
its own (checkpoints, logs) lies there, too, so that a point that was stopped inside a training resumes that as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from rdmd_fast.errors import InputError
from rdmd_fast.files import read_text, strict_json, write_atomically

FORMAT = 1
MOST_BYTES = 1 << 22  # of a point's result
SECONDS_TO_SAVE = 60  # for a training whose command was killed
Work = Callable[[Path, dict], dict]


@dataclass(frozen=True)
class Point:
    """One computation of a study.

    Attributes:
        name: what it is, for people: the beginning of its folder's name.
        work: a function of a module, ``work(folder, settings) -> result``; settings and result are plain JSON values
            (of NaN and infinities, null remains). What it prints goes to folder/log.txt. It may be called again for a
            folder in which it was interrupted.
        settings: all that the result depends on, hashes of files too.
    """

    name: str
    work: Work
    settings: dict

    def folder(self, study: Path) -> Path:
        text = json.dumps([f"{self.work.__module__}.{self.work.__qualname__}", self.settings], sort_keys=True)
        return Path(study) / f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def run_points(points: Sequence[Point], study: Path, jobs: int | None = None, say: Callable = print) -> list[dict]:
    """Results of ``points`` in their order, each with ``seconds`` that it took; those that are stored are read.

    Args:
        study: folder of the study.
        jobs: how many at a time; unset, one for each GPU, or for each core without one.
        say: told of every point that is done.

    Raises:
        InputError: of a point's work, with its name; a point that ended without one is told with its log.
    """
    jobs = default_jobs() if jobs is None else jobs
    if jobs < 1:
        raise InputError(f"--jobs {jobs}: must be at least 1")
    folders = [point.folder(study) for point in points]
    results = [stored(folder) for folder in folders]
    todo = {folder: point for folder, point, result in zip(folders, points, results, strict=True) if result is None}
    if todo:
        say(f"{study}: {len(todo)} of {len(points)} points to compute, {min(jobs, len(todo))} at a time")
        _compute(todo, min(jobs, len(todo)), say)
    return [stored(folder) for folder in folders]


def stored(folder: Path) -> dict | None:
    """The result of a point, or None while there is none."""
    try:
        record = json.loads(read_text(folder / "point.json", MOST_BYTES))
    except (OSError, ValueError):
        return None
    return {**record["result"], "seconds": record["seconds"]} if record.get("format") == FORMAT else None


def default_jobs() -> int:
    import torch

    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


# -- workers -----------------------------------------------------------------------------------------------------------


def _compute(todo: dict[Path, Point], jobs: int, say: Callable) -> None:
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in an unknown state
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    names, devices = _devices() or [None], context.Queue()
    for job in range(jobs):
        devices.put(names[job % len(names)])
    pool = ProcessPoolExecutor(jobs, context, _settle, (devices,))
    with _environment(OMP_NUM_THREADS=str(threads)):
        waiting: dict[Future, Point] = {pool.submit(_work, point, folder): point for folder, point in todo.items()}
        try:
            done_before = 0
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    point = waiting.pop(future)
                    seconds = _outcome(future, todo, point)
                    done_before += 1
                    say(f"[{done_before}/{len(todo)}] {point.name}: {seconds:.0f} s")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()  # a training saves first
            raise
        pool.shutdown()


def _outcome(future: Future, todo: dict[Path, Point], point: Point) -> float:
    try:
        return future.result()
    except InputError as error:
        raise InputError(f"{point.name}: {error}") from None
    except BrokenProcessPool:
        # All that was under way has ended with the one that was killed: nobody tells which.
        begun = [str(folder / "log.txt") for folder in todo if folder.is_dir() and stored(folder) is None]
        raise InputError(
            f"a process of the study was killed (out of memory?), see {', '.join(begun)}; run the command again"
        ) from None


@contextlib.contextmanager
def _environment(**variables: str):
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _devices() -> list[str]:
    """Names of the GPUs that CUDA_VISIBLE_DEVICES may choose from."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _settle(devices) -> None:
    """A worker's start: a GPU of its own where there are several, and nothing that outlives the command."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # of those that wait, no traceback; trainings have their own
    threading.Thread(target=_end_with_parent, daemon=True).start()
    name = devices.get()
    if name is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = name


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)  # a training saves first
    time.sleep(SECONDS_TO_SAVE)
    os._exit(1)


def _work(point: Point, folder: Path) -> float:
    """Compute one point and store it; returns the seconds that it took."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with _output_to(folder / "log.txt"):
        try:
            result = point.work(folder, point.settings)
        except InputError:
            raise
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"broke ({reason}), see {folder}/log.txt") from None
        except KeyboardInterrupt:
            os._exit(1)  # a training has saved; this process shall not begin another point
    seconds = time.perf_counter() - start
    record = {
        "format": FORMAT, "name": point.name, "settings": point.settings, "result": strict_json(result),
        "seconds": seconds,
    }  # fmt: skip
    write_atomically(folder / "point.json", json.dumps(record, indent=1) + "\n")
    return seconds


@contextlib.contextmanager
def _output_to(path: Path):
    """Standard output and errors, those of libraries too, into a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    try:
        with open(path, "ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, number in zip(kept, (1, 2), strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


# -- work that trains --------------------------------------------------------------------------------------------------


def train_run(config: str, overrides: Sequence[str], run_dir: Path) -> float:
    """Train (or go on, or find done) one run in this process, as ``train.py`` does; returns seconds of this call.

    Raises:
        InputError: the run ended as bad input or broke (its line is in the point's log).
        KeyboardInterrupt: it was stopped by a signal, after saving.
    """
    from rdmd_fast.errors import EXIT_DONE, EXIT_STOPPED
    from rdmd_fast.trainer import main

    start = time.perf_counter()
    status = main(["--config", config, *overrides, f"run_dir={run_dir}", "telemetry.tensorboard=false"])
    if status == EXIT_STOPPED:
        raise KeyboardInterrupt
    if status != EXIT_DONE:
        raise InputError(f"training of {run_dir} ended with status {status}, see {Path(run_dir).parent}/log.txt")
    return time.perf_counter() - start
