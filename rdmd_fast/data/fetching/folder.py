"""The folder of a fetched collection: written whole or not at all, with a record by which it is known again."""

import json
import os
from pathlib import Path

from rdmd_fast.data.fetching import Collection
from rdmd_fast.errors import InputError
from rdmd_fast.files import new_folder, read_text

RECORD = "fetched.json"
_MOST_RECORD_BYTES = 16 << 20


def record_of(name: str, collection: Collection, options: dict) -> dict:
    """What tells one fetched folder from another."""
    packages = {str(package): package.integrity for package in collection.packages}
    return {"collection": name, "packages": packages, "options": options}


def is_there(folder: Path, record: dict) -> bool:
    """Whether ``folder`` holds, whole, what ``record`` tells of; False where it is new or empty.

    Raises:
        InputError: it is a file, or holds anything else.
    """
    if not os.path.isdir(folder):
        if os.path.lexists(folder) and not os.path.islink(folder):
            raise InputError(f"--out {folder}: is a file, name a folder")
        return False
    names = sorted(os.listdir(folder))
    if not names:
        return False
    if RECORD not in names:
        raise InputError(f"--out {folder}: holds other files ({names[0]}), choose a new or empty folder")
    found, sizes = _read_record(folder)
    if found != record:
        raise InputError(f"--out {folder}: holds {_described(found)}, choose a new folder or remove this one")
    changed = [name for name, size in sizes.items() if _size(folder / name) != size]
    if changed:
        raise InputError(
            f"--out {folder}: {len(changed)} of its {len(sizes)} files are gone or changed ({changed[0]}), remove the "
            "folder and fetch again"
        )
    return True


def write(folder: Path, record: dict, files: dict[str, bytes]) -> None:
    """Fill ``folder``, new or empty, with ``files`` and their record.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    sizes = {name: len(data) for name, data in files.items()}
    with new_folder(folder) as partial:
        for parent in sorted({Path(name).parent for name in files}):
            (partial / parent).mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (partial / name).write_bytes(data)
        (partial / RECORD).write_text(json.dumps(record | {"files": sizes}, indent=1) + "\n", encoding="utf-8")


def _described(record: dict) -> str:
    options = record["options"].items()
    words = [str(record["collection"]), *(f"--{name.replace('_', '-')} {value}" for name, value in options)]
    return f"`{' '.join(words)}` of {', '.join(record['packages'])}"


def _read_record(folder: Path) -> tuple[dict, dict[str, int]]:
    """(record, size by relative path)."""
    try:
        values = json.loads(read_text(folder / RECORD, _MOST_RECORD_BYTES))
        sizes = {str(name): int(size) for name, size in values.pop("files").items()}
        _described(values)
        return values, sizes
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise InputError(
            f"--out {folder}: its {RECORD} is none of this command's, choose a new or empty folder"
        ) from None


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
