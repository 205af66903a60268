"""Paths as people write them: in a configuration, which no shell expands, and behind an option, as ``--out=~/x``."""

import argparse
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from rdmd_fast.errors import one_line

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_FETCHED = re.compile(r"pipe:|[a-z][a-z0-9+.-]+://")  # what data are brought here from
_FOR_A_SHELL = re.compile(r"(\$(?:[A-Za-z_]\w*|\{\w+\}))[^/]*$|^(~[^/]*)$")  # in the last part of a path


class BadPath(ValueError, argparse.ArgumentTypeError):
    """A path that is no place on this machine: one line, before which pydantic and argparse name the option."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def path_to_write(text: str) -> str:
    """``text`` with ``~`` expanded. A link may point to what is not there: that is made.

    Raises:
        BadPath: an address as s3://…, or a ``$NAME`` that no shell has expanded and that no file is called by.
    """
    if scheme := _SCHEME.match(text):
        raise BadPath(f"{text}: {scheme[0]} is no place on this machine, name a folder or file here")
    path = os.path.expanduser(text)
    for part in _beginnings(path):
        name = _FOR_A_SHELL.search(part)
        if name and not os.path.lexists(part):
            raise BadPath(
                f"{text}: only a shell expands {name[1] or name[2]}, outside single quotes and files: write the path "
                "itself"
            )
    return path


def path_to_read(text: str) -> str:
    """As ``path_to_write``, of what may be there already.

    Raises:
        BadPath: also a link to what is not there, as on a disk that is purged or not mounted.
    """
    path = path_to_write(text)
    for part in _beginnings(path):
        if os.path.islink(part) and not os.path.exists(part):
            raise BadPath(f"{part}: is a link to {os.readlink(part)}, which is not there: mount or make it, or relink")
    return path


def data_path(text: str) -> str:
    """As ``path_to_read``, of each piece of a set of shards that is on this machine; URLs and commands stay."""
    return "::".join(piece if _FETCHED.match(piece) else path_to_read(piece) for piece in text.split("::"))


def is_command(text: str) -> bool:
    """Whether a set of shards is what a command writes; such a command may hold keys."""
    return "pipe:" in text.lower()


def without_keys(text: str) -> str | None:
    """An address without user, password, query and fragment; None for what is no address.

    Passwords may hold "/" where nobody has escaped it, so all before the last "@" goes. With an "@" behind a "?" it is
    open which of them is a password's, and nothing is left.
    """
    scheme = re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE)
    if scheme is None:
        return None
    place, _, query = re.sub("[?#]", "?", text[scheme.end() :]).partition("?")
    return scheme[0] + ("…" if "@" in query else place.rpartition("@")[2])


def _beginnings(path: str) -> list[str]:
    """``path`` and the folders above it, the first one first."""
    return [str(each) for each in (*reversed(Path(path).parents), Path(path))]


def with_paths(values: object, readings: Mapping[str, Callable[[str], str]], key: str = "") -> object:
    """Plain nested ``values`` with what ``readings`` make of the texts, or lists of texts, at their dotted keys.

    Raises:
        ValueError: names the key of a path that is none.
    """
    if isinstance(values, dict):
        return {
            name: with_paths(each, readings, f"{key}.{name}" if key else str(name)) for name, each in values.items()
        }
    if isinstance(values, list):
        return [with_paths(each, readings, key) for each in values]
    if not isinstance(values, str) or key not in readings:
        return values
    try:
        return readings[key](values)
    except BadPath as error:
        raise ValueError(f"{key}: {error}") from None
