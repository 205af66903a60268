"""Cached jobs: each computed once, keyed by its kind and settings, some in parallel.

A job is a function of plain settings. Its folder is FOLDER/NAME-DIGEST, the digest being that of kind and settings: a
job of other settings stands beside it, and a study that was stopped goes on where it was. What a training needs of its
own (checkpoints, logs) lies there too, so that a job that was stopped inside a training resumes that as well.
"""

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
from rdmd_fast.files import print_any_text, read_text, strict_json, write_atomically
from rdmd_fast.processes.launchers import granted_cores

FORMAT = 1
MOST_BYTES = 1 << 22  # of a job's result
SECONDS_TO_SAVE = 60  # for a training whose command was killed
Work = Callable[[Path, dict], dict]


@dataclass(frozen=True)
class Job:
    """One computation of a study.

    Attributes:
        name: what it is, for people: the beginning of its folder's name.
        kind: what ``work`` does, in a word that outlives its name and module: part of the key.
        work: a function of a module, ``work(folder, settings) -> result``; settings and result are plain JSON values
            (of NaN and infinities, null remains). What it prints goes to folder/log.txt. It may be called again for a
            folder in which it was interrupted.
        settings: all that the result depends on, hashes of files too.
    """

    name: str
    kind: str
    work: Work
    settings: dict

    def folder(self, study: Path) -> Path:
        text = json.dumps([self.kind, self.settings], sort_keys=True)
        return Path(study) / f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def run_jobs(jobs: Sequence[Job], study: Path, at_once: int | None = None, say: Callable = print) -> list[dict]:
    """Results of ``jobs`` in their order, each with ``seconds`` that it took; those that are stored are read.

    Args:
        study: folder of the study.
        at_once: how many in parallel; unset, one for each GPU, or for each core without one.
        say: told of every job that is done.

    Raises:
        InputError: of a job's work, with its name; a job that ended without one is told with its log.
    """
    at_once = default_jobs() if at_once is None else at_once
    if at_once < 1:
        raise InputError(f"--jobs {at_once}: must be at least 1")
    folders = [job.folder(study) for job in jobs]
    results = [read_result(folder) for folder in folders]
    todo = {folder: job for folder, job, result in zip(folders, jobs, results, strict=True) if result is None}
    if todo:
        say(f"{study}: {len(todo)} of {len(jobs)} points to compute, {min(at_once, len(todo))} at a time")
        _compute(todo, min(at_once, len(todo)), say)
    return [read_result(folder) for folder in folders]


def read_result(folder: Path) -> dict | None:
    """The result of a job, or None while there is none."""
    try:
        record = json.loads(read_text(folder / "point.json", MOST_BYTES))
    except (OSError, ValueError):
        return None
    return {**record["result"], "seconds": record["seconds"]} if record.get("format") == FORMAT else None


def default_jobs() -> int:
    import torch

    return torch.cuda.device_count() or granted_cores()


# -- workers -----------------------------------------------------------------------------------------------------------


def _compute(todo: dict[Path, Job], at_once: int, say: Callable) -> None:
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in an unknown state
    threads = max(1, granted_cores() // at_once)
    names, devices = _devices() or [None], context.Queue()
    for number in range(at_once):
        devices.put(names[number % len(names)])
    pool = ProcessPoolExecutor(at_once, context, _settle, (devices,))
    with _environment(OMP_NUM_THREADS=str(threads)):
        waiting: dict[Future, Job] = {pool.submit(_work, job, folder): job for folder, job in todo.items()}
        try:
            done_before = 0
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    job = waiting.pop(future)
                    seconds = _outcome(future, todo, job)
                    done_before += 1
                    say(f"[{done_before}/{len(todo)}] {job.name}: {seconds:.0f} s")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()  # a training saves first
            raise
        pool.shutdown()


def _outcome(future: Future, todo: dict[Path, Job], job: Job) -> float:
    try:
        return future.result()
    except InputError as error:
        raise InputError(f"{job.name}: {error}") from None
    except BrokenProcessPool:
        # All that was under way has ended with the one that was killed: nobody tells which.
        begun = [str(folder / "log.txt") for folder in todo if folder.is_dir() and read_result(folder) is None]
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
    print_any_text()
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


def _work(job: Job, folder: Path) -> float:
    """Compute one job and store its result; returns the seconds that it took."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with _output_to(folder / "log.txt"):
        try:
            result = job.work(folder, job.settings)
        except InputError:
            raise
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"broke ({reason}), see {folder}/log.txt") from None
        except KeyboardInterrupt:
            os._exit(1)  # a training has saved; this process must not begin another job
    seconds = time.perf_counter() - start
    record = {
        "format": FORMAT, "name": job.name, "settings": job.settings, "result": strict_json(result),
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
        InputError: the run ended as bad input or broke (its line is in the job's log).
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
