"""Writing a shard set: WebDataset tars with the same bytes each time, an index and, last, the manifest."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from rdmd_fast.data.shards import INDEX, LABEL_EXTENSION, MANIFEST, MANIFEST_VERSION, UNFINISHED_MANIFEST, scan_shard
from rdmd_fast.errors import InputError


class ShardWriter:
    """Writes one shard set. Nothing of it shows before ``commit``; leaving the context first discards it.

    The bytes depend on the samples alone (and the versions of Pillow and zlib): no times, no user names.

    Args:
        folder: where the set goes; made if missing.
        content: what the set is made of, JSON types; equal content means an equal set.
        command: the command line that makes it, for the manifest.
        shard_size: samples in each shard.
        classes: names of the classes that labels count, for the manifest.
    """

    def __init__(
        self, folder: Path, content: dict, command: str, shard_size: int, classes: Sequence[str] | None = None
    ):
        self._folder, self._content, self._command, self._shard_size = folder, content, command, shard_size
        self._classes = classes
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("shard-*.tar.partial"):
            leftover.unlink()
        self._names: list[str] = []
        self._file = self._tar = None
        self._form: tuple[tuple[int, ...], str] | None = None
        self._labels: list[int | None] = []
        self.count = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception) -> None:
        self._close_shard()
        for name in self._names:
            (self._folder / f"{name}.partial").unlink(missing_ok=True)

    def write(self, key: str, sample: np.ndarray, label: int | None = None) -> None:
        """Append uint8 [H, W, 3] as PNG or a float32 array as .npy, and the class label, if any, as .cls.

        Raises:
            InputError: the sample's shape differs from that of the first, or only one of the two has a label.
        """
        extension = "png" if sample.dtype == np.uint8 else "npy"
        self._form = self._form or (sample.shape, extension)
        if (sample.shape, extension) != self._form:
            raise InputError(f"{key}: {extension} of shape {sample.shape} in a set of {self._form}; pack it on its own")
        if self._labels and (label is None) != (self._labels[0] is None):
            raise InputError(f"{key}: some samples of this set have a class label, some have none; label all of them")
        if self.count % self._shard_size == 0:
            self._open_shard()
        members = {extension: _encode(sample, extension)}
        if label is not None:
            members[LABEL_EXTENSION] = str(label).encode()
        self._tar.write({"__key__": key, **members})
        self._labels.append(label)
        self.count += 1

    def commit(self) -> None:
        """Replace what the folder held by the new set; cut short anywhere, the folder reads as unfinished.

        Raises:
            InputError: no sample was written.
        """
        if not self.count:
            raise InputError(f"{self._folder}: no samples to pack")
        self._close_shard()
        shards, index = zip(*map(self._describe, range(len(self._names))), strict=True)
        index_bytes = (json.dumps(index, separators=(",", ":")) + "\n").encode()
        shape, extension = self._form
        manifest = {
            "version": MANIFEST_VERSION,
            "kind": "image" if extension == "png" else "array",
            "count": self.count,
            "shape": shape,
            "extension": extension,
            "command": self._command,
            "content": self._content,
            **({"classes": list(self._classes)} if self._classes is not None else {}),
            "shards": shards,
            "index_sha256": hashlib.sha256(index_bytes).hexdigest(),
        }
        _write_file(self._folder / UNFINISHED_MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        (self._folder / MANIFEST).unlink(missing_ok=True)
        for name in self._names:
            os.replace(self._folder / f"{name}.partial", self._folder / name)
        for stale in self._folder.glob("shard-*.tar"):
            if stale.name not in self._names:
                stale.unlink()
        _write_file(self._folder / INDEX, index_bytes)
        _sync_folder(self._folder)
        os.replace(self._folder / UNFINISHED_MANIFEST, self._folder / MANIFEST)
        _sync_folder(self._folder)

    def _open_shard(self) -> None:
        from webdataset import (
            TarWriter,
        )  # over a second to import, and every `rdmd --help` imports this module

        self._close_shard()
        name = f"shard-{len(self._names):06d}.tar"
        self._names.append(name)
        self._file = open(self._folder / f"{name}.partial", "wb")  # noqa: SIM115 (closed by _close_shard)
        # The pax format differs from ustar only in long and non-ASCII names, which it can hold.
        self._tar = TarWriter(self._file, user="", group="", mtime=0, encoder=False, format="PAX_FORMAT")

    def _close_shard(self) -> None:
        if self._file is not None:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _describe(self, number: int) -> tuple[dict, dict]:
        """A shard's entries in the manifest and in the index."""
        name = self._names[number]
        path = self._folder / f"{name}.partial"
        members = [member for member in scan_shard(path) if member.extension != LABEL_EXTENSION]
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        index = {
            "file": name,
            "keys": [member.key for member in members],
            "offsets": [member.offset for member in members],
            "sizes": [member.size for member in members],
        }
        if self._labels[0] is not None:
            index["labels"] = self._labels[number * self._shard_size :][: self._shard_size]
        return {"file": name, "count": len(members), "bytes": path.stat().st_size, "sha256": digest}, index


def _encode(sample: np.ndarray, extension: str) -> bytes:
    buffer = io.BytesIO()
    if extension == "png":
        Image.fromarray(sample).save(buffer, "PNG")
    else:
        np.save(buffer, sample.astype(np.float32), allow_pickle=False)
    return buffer.getvalue()


def _write_file(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
