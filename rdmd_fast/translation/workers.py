"""A translation on several devices: a process each, chunks dealt out in turn."""

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait

import torch

from rdmd_fast.errors import InputError, describe_system_error
from rdmd_fast.translation.translator import TranslationPlan, work

PATIENCE = 30.0  # seconds that a process has to leave


def work_on(
    job: TranslationPlan,
    devices: Sequence[str],
    chunks: Sequence[Sequence[int]],
    report: Callable[[int, list[str]], None],
    autoencoder=None,
) -> str:
    """``work`` on every device of ``devices`` at once; with one of them, or one chunk, in this process.

    The first error of one ends all. Returns what ``work`` does, of a process that translated something.
    """
    devices = devices[: len(chunks)]
    if not chunks:
        return ""
    if len(devices) == 1:
        return work(job, devices[0], chunks, report, autoencoder)
    # Forks of a process that has done nothing but import: neither CUDA nor OpenMP survives a fork once they are used.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rdmd_fast.translation.translator", "rdmd_fast.model_files.models"])
    job = job._replace(threads=max(1, job.threads // len(devices)))
    workers: dict[Connection, tuple[multiprocessing.Process, str]] = {}
    note = ""
    try:
        for number, device in enumerate(devices):
            receiver, sender = context.Pipe(duplex=False)
            share = chunks[number :: len(devices)]
            process = context.Process(target=_main, args=(job, device, len(devices), share, sender), daemon=True)
            process.start()
            sender.close()  # so that the process's end is the end of what it sends
            workers[receiver] = process, device
        running = dict(workers)
        while running:
            for receiver in wait(list(running)):
                try:
                    message = receiver.recv()
                except EOFError:
                    _check_end(*running.pop(receiver))
                    continue
                if isinstance(message, InputError):
                    raise message
                if isinstance(message, str):
                    note = message or note
                else:
                    report(*message)
    finally:
        _end([process for process, _ in workers.values()])
    return note


def _check_end(process: multiprocessing.Process, device: str) -> None:
    process.join()
    if process.exitcode == 0:
        return
    if process.exitcode < 0:
        name = signal.Signals(-process.exitcode).name
        raise InputError(
            f"--device {device}: its process was ended by {name}; if for memory, lower --batch-size or --workers"
        )
    raise RuntimeError(f"the process on {device} failed, its error stands above")


def _end(processes: list[multiprocessing.Process]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()


def _main(job: TranslationPlan, device: str, count: int, chunks: Sequence[Sequence[int]], sender: Connection) -> None:
    """One process: sends the arguments of ``report``, at the end what ``work`` returns, or an InputError."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends the others
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that files that are half written are removed
    if device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    try:
        try:
            sender.send(work(job, device, chunks, lambda *message: sender.send(message)))
        finally:  # No file is half written now, and exceptions in callbacks of what is freed would only be printed.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    except BrokenPipeError:
        sys.exit(1)  # nobody is there to report to
    except InputError as error:
        sender.send(error)
    except (OSError, MemoryError) as error:
        sender.send(InputError(describe_system_error(error)))
    except Exception:
        traceback.print_exc()
        sys.exit(1)
