"""What a process makes of its surroundings before anything else: locale, terminal, limits of the system."""

import codecs
import contextlib
import errno
import os
import resource
import sys

from rdmd_fast.errors import InputError, describe_system_error
from rdmd_fast.files import print_any_text


def prepare_process() -> None:
    """Begin a process of a command: it can name and print every file, and open as many as the system grants."""
    _name_any_file()
    print_any_text()
    # Before torch is imported. Threads of a loop wait for the last of them; on cores that other processes use too they
    # would spin for milliseconds, and the last one not get the core: a tenth of the speed. A sixth of libgomp's
    # own count is enough on idle cores, where not to spin at all costs a third of the speed of small networks.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "50000")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:  # a set has a descriptor for each shard
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _name_any_file() -> None:
    """Where names of files are ASCII alone, start again in UTF-8 mode, as Python does in most such locales itself."""
    ascii_alone = codecs.lookup(sys.getfilesystemencoding()).name == "ascii"
    if ascii_alone and sys.executable and os.environ.get("PYTHONUTF8") != "1":
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})


def system_input_error(error: Exception) -> InputError | None:
    """``error`` as bad input, where a path, memory that is asked for, a limit of the system or an option caused it."""
    if isinstance(error, UnicodeEncodeError) and error.encoding == sys.getfilesystemencoding():
        return InputError(f"{error.object}: is no file's name in this locale ({error.encoding}), set LC_ALL=C.UTF-8")
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return InputError(f"{describe_system_error(error)}: raise the limit of {limit} (`ulimit -n`)")
    if isinstance(error, RuntimeError) and "does not have a deterministic implementation" in str(error):
        operation = str(error).split()[0]
        return InputError(
            f"train.deterministic: {operation} has no form that adds in one order: remove the key, or what needs it"
        )
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.filename is not None):
        return InputError(describe_system_error(error))
    return None
