"""One case of the fuzz in a forked process: time, memory, files, execution and what it says are all watched."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rdmd_fast.data.cache import shared_memory
from rdmd_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
EXECUTED = 99  # status of a case that tried to run or write what it must not
LONGEST_LINE = 1000  # characters: more is no clear line
STOP_AFTER = 12.0  # seconds after which a training is asked to stop

# Libraries compile code of their own; these also have ways to compile what they read.
READERS = (
    "pickle", "yaml", "serialization", "unpickler", "numpy/lib", "multiprocessing", "rdmd_fast", "kernels", "tests",
)  # fmt: skip
RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn", "subprocess.Popen")
REACHES = ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.bind", "urllib.Request")
CHANGES = ("os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod")


@dataclass
class Limits:
    """Of one case: wall seconds, and bytes of address space and of resident memory over the parent's."""

    seconds: float = 20.0
    bytes: int = 2 << 30


@dataclass
class Outcome:
    """How a case ended; ``problem`` is None where it did as it should."""

    status: int
    seconds: float
    bytes: int
    stderr: str
    stdout: str
    problem: str | None = None


@dataclass
class Rules:
    """What is allowed to a case beside ending with 0 or 2.

    Attributes:
        statuses: that are right.
        notes: pattern of stderr's lines that are not the error's, "warning: …" anyway.
        pickles: whether Python's unpickler may run (DeepSpeed's own files).
        stop: whether to ask for a stop by SIGTERM after some seconds.
    """

    statuses: tuple[int, ...] = (0, 2)
    notes: str = r"$."
    pickles: bool = False
    stop: bool = False


def run(action: Callable[[], int], folder: Path, rules: Rules, limits: Limits) -> Outcome:
    """``action()`` in a forked child that works in ``folder``."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, _silence() as silence:
        before, begin = resident(), time.monotonic()
        child = os.fork()
        if child == 0:
            _live(action, folder, rules, limits, out, err, silence)
        status, usage, late = _wait(child, limits, rules)
        seconds = time.monotonic() - begin
        peak = max(0, usage.ru_maxrss * 1024 - before)
        outcome = Outcome(status, seconds, peak, _text(err), _text(out))
    outcome.problem = f"hang: more than {limits.seconds:g} s" if late else _problem(outcome, rules, limits)
    return outcome


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@contextlib.contextmanager
def _silence():
    """A standard input on which nothing ever comes: who reads it hangs."""
    reader, writer = os.pipe()
    try:
        yield reader
    finally:
        os.close(reader)
        os.close(writer)


def _text(file) -> str:
    file.seek(0)
    return file.read(1 << 20).decode(errors="replace")


def _wait(child: int, limits: Limits, rules: Rules):
    """(exit status, negative for a signal; resources; whether the time ran out)."""
    descriptor = os.pidfd_open(child)
    try:
        slowness = max(1.0, os.getloadavg()[0] / os.cpu_count())  # beside other work
        ends = [end * slowness for end in ([STOP_AFTER] if rules.stop else []) + [limits.seconds]]
        late = True
        for number, end in enumerate(ends):
            if select.select([descriptor], [], [], end)[0]:
                late = False
                break
            if number < len(ends) - 1:
                os.kill(child, signal.SIGTERM)
        if late:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
    finally:
        os.close(descriptor)
    return os.waitstatus_to_exitcode(status), usage, late


def _live(action, folder: Path, rules: Rules, limits: Limits, out, err, silence: int) -> None:
    """The child's life."""
    status = 70
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        for source, target in ((silence, 0), (out.fileno(), 1), (err.fileno(), 2)):
            os.dup2(source, target)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
        pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (pages + limits.bytes,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        (folder / "tmp").mkdir()
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder / "tmp")
        shared_memory.SHARED_FOLDER = folder / "tmp"
        _guard(folder, rules)
        try:
            status = action()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 70
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status if isinstance(status, int) and 0 <= status < 256 else 70)


def _guard(folder: Path, rules: Rules) -> None:
    """End the process at the first sign that something of the input runs, or is written elsewhere."""
    inside = (str(folder.resolve()) + "/", str(folder) + "/")

    def allowed(path) -> bool:
        if isinstance(path, int):
            return True
        path = os.path.abspath(os.fsdecode(path))
        return path == "/dev/null" or path in (inside[0][:-1], inside[1][:-1]) or path.startswith(inside)

    told = os.dup(2)  # libraries send the standard error elsewhere while they try things

    def refuse(event: str, what) -> None:
        os.write(told, f"executed: {event} {str(what)[:200]!r}\n".encode(errors="replace"))
        os._exit(EXECUTED)

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            if isinstance(flags, int) and flags & writes and not allowed(path):
                refuse(event, path)
        elif event in RUNS or event in REACHES:
            refuse(event, arguments)
        elif event in CHANGES:
            # Relative to a folder's descriptor: that folder has been looked at when it was opened.
            paths = [path for path in arguments[:2] if isinstance(path, str | bytes | os.PathLike)]
            if not isinstance(arguments[-1], int) or arguments[-1] < 0 or event in ("os.mkdir", "os.chmod"):
                for path in paths[-1:] if event in ("os.link", "os.symlink") else paths:
                    if not allowed(path) and not (event == "os.mkdir" and os.path.isdir(path)):
                        refuse(event, path)
        elif event == "pickle.find_class" and not rules.pickles:
            refuse(event, arguments)
        elif event in ("exec", "compile"):
            name = arguments[0].co_filename if event == "exec" else arguments[1]
            name = os.fsdecode(name) if isinstance(name, str | bytes) else str(name)
            if name.startswith("<frozen") or (os.path.isabs(name) and not name.startswith(inside)):
                return
            caller = sys._getframe(1).f_code.co_filename
            if any(part in caller for part in READERS):
                refuse(event, (name, caller))
        elif event == "ctypes.dlopen" and str(arguments[0]).startswith(inside):
            refuse(event, arguments)

    sys.addaudithook(hook)


def _problem(outcome: Outcome, rules: Rules, limits: Limits) -> str | None:
    """What is wrong with an end, in a line that is equal for equal defects."""
    lines = outcome.stderr.splitlines()
    if outcome.status == EXECUTED:
        return next((line for line in lines if line.startswith("executed: ")), "executed something")
    if "Traceback (most recent call last)" in outcome.stderr:
        return _signature(outcome.stderr)
    if outcome.status < 0:
        return f"killed by {signal.Signals(-outcome.status).name}"
    if outcome.status not in rules.statuses:
        return f"exit status {outcome.status}"
    if outcome.bytes > limits.bytes:
        return f"memory: more than {limits.bytes >> 20} MiB"
    others = [
        line for line in lines if not line.startswith(("error: ", "warning: ")) and not re.match(rules.notes, line)
    ]
    if others:
        return f"stderr: {re.sub(r'[0-9]+', '#', others[0])[:150]}"
    errors = [line for line in lines if line.startswith("error: ")]
    if outcome.status == 2 and len(errors) != 1:
        return f"{len(errors)} error lines instead of one"
    if outcome.status != 2 and errors:
        return "an error line without exit status 2"
    for line in (line for line in lines if line.startswith(("error: ", "warning: "))):
        if len(line) > LONGEST_LINE:
            return f"a line of {len(line) // 1000},000 characters or more"
        if not line.isprintable():
            return "a line with control characters"
    return None


def _signature(text: str) -> str:
    """The exception and the innermost place in this project."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', text)
    ours = [frame for frame in frames if "rdmd_fast/" in frame[0] or "/kernels/" in frame[0]]
    path, line, function = (ours or frames or [("?", "0", "?")])[-1]
    last = [line for line in text.splitlines() if re.match(r"[A-Za-z_][\w.]*(: |$)", line)]
    name = last[-1].partition(":")[0] if last else "?"
    return f"traceback: {name} in {Path(path).name}:{line} {function}"


def as_command(action: Callable, *arguments) -> int:
    """Exit status of ``action``, whose refusals are told as a command tells them."""
    try:
        return action(*arguments) or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def save_json(path: Path, values) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=True) + "\n")
