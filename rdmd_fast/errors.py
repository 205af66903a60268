"""The errors that users cause and can mend."""

import errno
import functools
import os
import re
import unicodedata

LONGEST = 800  # characters of a message


class InputError(Exception):
    """Bad input from outside: a config, a path, a shard, an export or an image.

    The message is one line that says what is wrong, where, and what to do. Command lines print it and exit with 2.
    It often quotes the input: characters that do not print are written as escapes, and a long middle is left out.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """``text`` with escapes for what does not print, no longer than ``LONGEST``: its beginning and its end."""
    if len(text) > 2 * LONGEST:  # the rest would be cut anyway
        text = f"{text[:LONGEST]}{text[-LONGEST:]}"
    if not text.isprintable():
        text = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
    if len(text) <= LONGEST:
        return text
    end = LONGEST // 3
    return f"{text[: LONGEST - end - 3]} … {text[-end:]}"


@functools.lru_cache(1 << 14)  # aliases of a configuration can repeat a long text thousands of times
def is_plain(text: str, besides: str = "") -> bool:
    """Whether ``text`` may be a name: no control characters but those in ``besides``, nothing that is not Unicode."""
    return all(unicodedata.category(each) not in ("Cc", "Cs") for each in text if each not in besides)


def quoted(value: object) -> str:
    """A value from outside as a message shows it, a long one without its middle."""
    try:
        text = repr(value)
    except ValueError:  # a number of thousands of digits
        return "a huge number"
    return text if len(text) <= 100 else f"{text[:60]} … {text[-30:]}"


def describe_system_error(error: OSError | MemoryError) -> str:
    """The line for a file that cannot be read or written, or for memory that is not there."""
    if isinstance(error, OSError):
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return one_line(f"{where}{error.strerror or error}")
    return one_line(f"not enough memory for this input ({error})" if str(error) else "not enough memory for this input")


class WriteError(InputError):
    """A file of the run cannot be written: disk full, quota, read-only, no permission, a failing device."""


EXIT_DONE, EXIT_BAD_INPUT, EXIT_STOPPED = 0, 2, 75


def write_error(error: Exception, what: str | None = None) -> WriteError | None:
    """``error`` as a WriteError, one line, if it says that a file could not be written; else None.

    Args:
        what: names what was to be written; without it the error does.
    """
    number = error.errno if isinstance(error, OSError) else None
    foreign = type(error).__name__ == "SafetensorError"  # of its own, also for what the system says
    if foreign and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    if number is None and not foreign:
        return None
    what = what or getattr(error, "filename", None) or "the run folder"
    reason = os.strerror(number) if number else " ".join(str(error).split())[:120]
    remedy = "free some space" if number in (errno.ENOSPC, errno.EDQUOT) else "make it writable"
    return WriteError(f"{what}: cannot be written ({reason}), {remedy} or change run_dir")
