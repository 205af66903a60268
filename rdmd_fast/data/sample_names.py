"""Names: of samples by their files, and of the files that results become."""

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath

from rdmd_fast.errors import InputError

LONGEST_NAME = 255  # bytes of a file's name on Linux's file systems


def image_keys(paths: Sequence[str]) -> list[str]:
    """WebDataset keys of relative paths: the path without suffix and with "_" for other dots of the name.

    Files that differ in their suffix alone keep it, as ``name_png`` and ``name_jpg``.

    Raises:
        InputError: two files still share a key.
    """

    def key(path: str, keep_suffix: bool) -> str:
        parent, _, name = path.rpartition("/")
        name = (name if keep_suffix else name.rpartition(".")[0]).replace(".", "_")
        return f"{parent}/{name}" if parent else name

    return _named(paths, key)


def output_names(files: Sequence[str]) -> list[str]:
    """Names without suffix of files; those that differ in their suffix alone keep it, as ``name_png``.

    Raises:
        InputError: two files still share a name.
    """

    def name(file: str, keep_suffix: bool) -> str:
        path = PurePosixPath(file)
        return str(path.with_name(path.stem + path.suffix.replace(".", "_")) if keep_suffix else path.with_suffix(""))

    return _named(files, name)


def _named(files: Sequence[str], name: Callable[[str, bool], str]) -> list[str]:
    """``name(file, False)`` of each file, and ``name(file, True)`` of those that share it."""
    plain = Counter(name(file, False) for file in files)
    return _distinct(files, [name(file, plain[name(file, False)] > 1) for file in files])


def _distinct(files: Sequence[str], names: list[str]) -> list[str]:
    taken: dict[str, str] = {}
    for file, name in zip(files, names, strict=True):
        if taken.setdefault(name, file) != file:
            raise InputError(f"{taken[name]} and {file} would both become {name!r}: rename one of them")
    return names


def names_in_shards(shards: Sequence[str], keys: Sequence[Sequence[str]]) -> list[str]:
    """Names of samples: their keys, after their shard's name and a slash where shards share keys.

    Args:
        shards: file names.
        keys: of each shard's samples.

    Raises:
        InputError: two samples still share a name.
    """
    taken = Counter(key for each in keys for key in each)
    names, places = [], []
    for shard, each in zip(shards, keys, strict=True):
        names += [f"{Path(shard).stem}/{key}" if taken[key] > 1 else key for key in each]
        places += [f"{shard}: sample {key!r}" for key in each]
    return _distinct(places, names)


def pairing_name(name: str) -> str:
    """The form in which names of samples and of their results are compared.

    macOS spells é as two characters, others as one; tar writes ./a for a; packing turns dots into "_".
    """
    *folders, last = (part for part in unicodedata.normalize("NFC", name).split("/") if part != ".")
    return "/".join([*folders, last.replace(".", "_")])


def check_results(folder: Path, files: Iterable[str], option: str) -> None:
    """Prove that the files of results can all be written below ``folder``.

    Args:
        files: relative paths.
        option: how the command line calls what they are made from.

    Raises:
        InputError: two results would be one file or one would be a folder of another, or a name is none.
    """
    taken: set[str] = set()
    for file in files:
        parts = file.split("/")
        if "\0" in file or not {"", ".."}.isdisjoint(parts):
            raise InputError(f"{option}: {file!r} is no name for a file below {folder}; rename the sample")
        if longest := next((part for part in parts if len(_bytes(part, option)) > LONGEST_NAME), None):
            raise InputError(
                f"{option}: {longest!r} has {len(_bytes(longest, option))} bytes, {LONGEST_NAME} is the most of a "
                "file's name; rename the sample"
            )
        plain = "/".join(part for part in parts if part != ".")
        if plain in taken:
            raise InputError(f"{option}: two samples would become {folder / plain}; rename one of them")
        taken.add(plain)
    folders = {parent for file in taken for parent in _parents(file)}
    if both := min(taken & folders, default=None):
        raise InputError(f"{option}: {folder / both} would be a file and a folder; rename the sample")


def _bytes(part: str, option: str) -> bytes:
    try:
        return os.fsencode(part)
    except UnicodeEncodeError:
        raise InputError(f"{option}: {part!r} holds what no file name can; rename the sample") from None


def _parents(file: str) -> Iterable[str]:
    while file := file.rpartition("/")[0]:
        yield file


def refuse_inside(output: str | Path, option: str, inputs: Iterable[tuple[str, str | Path]]) -> None:
    """Refuse an output that is, or lies inside, one of the folders that it is made from.

    Args:
        inputs: folders after the option that names each; what is no folder is passed over.

    Raises:
        InputError: it is one of them, or inside it.
    """
    place = Path(output).resolve()
    for name, folder in inputs:
        if os.path.isdir(folder) and place.is_relative_to(real := Path(folder).resolve()):
            where = "is" if place == real else "lies inside"
            raise InputError(
                f"{option} {output}: {where} {name} {folder}, results would mix with what they are made from; name "
                "another place"
            )
