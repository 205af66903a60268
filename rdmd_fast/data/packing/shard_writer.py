"""Writing a shard set: WebDataset tars with the same bytes each time, an index and, last, the manifest.

While a set is being written its folder holds, besides whatever complete set it may replace,

    manifest.json.partial     a set is being written here
    shard-N.tar.tmp           the shard that is being written
    shard-N.tar.partial       a finished shard
    shard-N.json.partial      what the index and the report need to know of it

so that a killed writer goes on after its last finished shard. ``commit`` renames it all into place.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image

from rdmd_fast.data.packing.report import Traits, traits_of
from rdmd_fast.data.pictures import DECODING
from rdmd_fast.data.shards.parts import INDEX, LABEL_EXTENSION, MANIFEST, MANIFEST_VERSION, UNFINISHED_MANIFEST
from rdmd_fast.data.shards.tar import scan_shard
from rdmd_fast.errors import InputError
from rdmd_fast.files import encoded, fsync_path, make_folder, rename_durably, sha256_of, write_atomically

REPORT = "report.json"


class EncodedSample(NamedTuple):
    """A sample as it stands in a tar.

    Attributes:
        key: WebDataset key.
        extension: "png" or "npy", of ``data``.
        shape: of the array in ``data``.
        label: class, or None.
        traits: what the report is made from.
    """

    key: str
    extension: str
    data: bytes
    shape: tuple[int, ...]
    label: int | None
    traits: Traits


def encode_sample(key: str, sample: np.ndarray, label: int | None = None) -> EncodedSample:
    """Uint8 [H, W, 3] as PNG, a float array as float32 .npy."""
    buffer = io.BytesIO()
    if sample.dtype == np.uint8:
        Image.fromarray(sample).save(buffer, "PNG")
        extension = "png"
    else:
        np.save(buffer, sample.astype(np.float32), allow_pickle=False)
        extension = "npy"
    return EncodedSample(key, extension, buffer.getvalue(), sample.shape, label, traits_of(sample))


@dataclass
class ShardRecord:
    """A finished shard: its entries in the manifest and the index, and what the report needs.

    Attributes:
        file: name in the folder.
        form: (shape, extension, whether samples have labels) of its samples, None where it has none.
        unreadable: [path, reason] of each file that was left out.
    """

    file: str
    bytes: int
    sha256: str
    form: list | None
    keys: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[int]
    traits: list[Traits]
    unreadable: list[list[str]] = field(default_factory=list)

    @property
    def manifest_entry(self) -> dict:
        return {"file": self.file, "count": len(self.keys), "bytes": self.bytes, "sha256": self.sha256}

    @property
    def index_entry(self) -> dict:
        entry = {"file": self.file, "keys": self.keys, "offsets": self.offsets, "sizes": self.sizes}
        return {**entry, "labels": self.labels} if self.labels else entry


class ShardFile:
    """One shard being written to ``path``; nothing reads it before ``finish``."""

    def __init__(self, path: Path):
        from webdataset import TarWriter  # over a second to import, and every `rdmd --help` imports this module

        self._path = path
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close)
        # The pax format differs from ustar only in long and non-ASCII names, which it can hold.
        self._tar = TarWriter(self._file, user="", group="", mtime=0, encoder=False, format="PAX_FORMAT")
        self._labels: list[int] = []
        self._traits: list[Traits] = []
        self.count = 0

    def add(self, sample: EncodedSample) -> None:
        """Append one sample, and its label, if any, as .cls."""
        members = {sample.extension: sample.data}
        if sample.label is not None:
            members[LABEL_EXTENSION] = str(sample.label).encode()
            self._labels.append(sample.label)
        self._tar.write({"__key__": sample.key, **members})
        self._traits.append(sample.traits)
        self.count += 1

    def finish(self, name: str, form: list | None, unreadable: Sequence[list[str]] = ()) -> ShardRecord:
        """Complete the file on disk; ``name`` is what it will be called."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        members = [member for member in scan_shard(self._path) if member.extension != LABEL_EXTENSION]
        return ShardRecord(
            file=name,
            bytes=self._path.stat().st_size,
            sha256=sha256_of(self._path),
            form=form if members else None,
            keys=[member.key for member in members],
            offsets=[member.offset for member in members],
            sizes=[member.size for member in members],
            labels=self._labels,
            traits=self._traits,
            unreadable=list(unreadable),
        )

    def discard(self) -> None:
        """Remove it, finished or not."""
        with suppress(OSError, ValueError):  # a full disk, or closed already
            self._tar.close()
        with suppress(OSError):
            self._file.close()
        self._path.unlink(missing_ok=True)


class ShardWriter:
    """Writes one shard set. Nothing of it shows before ``commit``.

    Leaving the context without a commit discards what was written, unless something other than bad input ended
    it (a signal, a full disk): then finished shards stay for a writer with ``resume``.

    The bytes depend on the samples alone (and the versions of Pillow and zlib): no times, no user names.

    Args:
        folder: where the set goes; made if missing.
        content: what the set is made of, JSON types; equal content means an equal set.
        command: the command line that makes it, for the manifest.
        shard_size: samples in each shard that ``write`` fills.
        classes: names of the classes that labels count, for the manifest.
        resume: keep the shards that an interrupted writer of the same content has finished.

    Attributes:
        records: finished shards by number.
    """

    def __init__(
        self,
        folder: Path,
        content: dict,
        command: str,
        shard_size: int,
        classes: Sequence[str] | None = None,
        resume: bool = False,
    ):
        self._folder, self._content, self._command, self._shard_size = folder, content, command, shard_size
        self._classes = classes
        make_folder(folder)
        # Another Pillow may encode the same pixels in other bytes, another decoder give other pixels.
        identity = json.dumps([MANIFEST_VERSION, PIL.__version__, DECODING, content], sort_keys=True)
        self._identity = hashlib.sha256(identity.encode()).hexdigest()
        self.records: dict[int, ShardRecord] = self._finished_shards() if resume else {}
        remove_leftovers(
            folder, {name for n in self.records for name in (f"{shard_name(n)}.partial", self._record_path(n).name)}
        )
        self._form = next((record.form for record in self.records.values() if record.form), None)
        self._number = -1
        self._shard: ShardFile | None = None
        self._committed = False
        if not (folder / UNFINISHED_MANIFEST).exists():
            marker = {"command": command, "content": content}
            write_atomically(folder / UNFINISHED_MANIFEST, json.dumps(marker, indent=1) + "\n")

    @property
    def count(self) -> int:
        """Samples written so far."""
        return sum(len(record.keys) for record in self.records.values()) + (self._shard.count if self._shard else 0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample, once there is one."""
        return tuple(self._form[0]) if self._form else ()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._shard is not None:
            self._shard.discard()
        # A commit that was cut short has put these shards in the place of the old set's: nothing else tells of them.
        half_committed = not (self._folder / MANIFEST).exists() and any(self._folder.glob("shard-*.tar"))
        if not self._committed and not half_committed and (kind is None or issubclass(kind, InputError)):
            remove_leftovers(self._folder)
            (self._folder / UNFINISHED_MANIFEST).unlink(missing_ok=True)

    def write(self, key: str, sample: np.ndarray, label: int | None = None) -> None:
        """Append uint8 [H, W, 3] as PNG or a float32 array as .npy, and the class label, if any, as .cls.

        Raises:
            InputError: the sample's shape differs from that of the first, or only one of the two has a label.
        """
        if self._shard is None or self._shard.count == self._shard_size:
            self.begin_shard(self._number + 1)
        self.add(encode_sample(key, sample, label))

    def begin_shard(self, number: int) -> None:
        """The following samples go into shard ``number``; the one before it is finished."""
        self.finish_shard()
        self._number = number
        self._shard = ShardFile(self._folder / f"{shard_name(number)}.tmp")

    def add(self, sample: EncodedSample) -> None:
        """Append an encoded sample to the shard that was begun; raises as ``write`` does."""
        form = [list(sample.shape), sample.extension, sample.label is not None]
        self._form = self._form or form
        if form[:2] != self._form[:2]:
            raise InputError(
                f"{sample.key}: {sample.extension} of shape {sample.shape} in a set of {self._form[1]} of shape "
                f"{tuple(self._form[0])}; pack it on its own"
            )
        if form != self._form:
            raise InputError(
                f"{sample.key}: some samples of this set have a class label, some have none; label all of them"
            )
        self._shard.add(sample)

    def finish_shard(self, unreadable: Sequence[list[str]] = ()) -> None:
        """Complete the shard that was begun, if any; from now on it survives a kill."""
        if self._shard is None:
            return
        name = shard_name(self._number)
        record = self._shard.finish(name, self._form, unreadable)
        self._shard = None
        os.replace(self._folder / f"{name}.tmp", self._folder / f"{name}.partial")
        write_atomically(self._record_path(self._number), json.dumps({"identity": self._identity, **vars(record)}))
        self.records[self._number] = record

    def commit(self, report: dict | None = None) -> None:
        """Replace what the folder held by the new set; cut short anywhere, the folder reads as unfinished.

        Raises:
            InputError: no sample was written.
        """
        self.finish_shard()
        if not self.count:
            raise InputError(f"{self._folder}: no samples to pack")
        records = [self.records[number] for number in sorted(self.records)]
        # All bytes are made before anything is replaced: what can fail for what is in them fails here.
        index = encoded(json.dumps([record.index_entry for record in records], separators=(",", ":")) + "\n")
        report_bytes = None if report is None else encoded(report_text(report))
        shape, extension, _ = self._form
        manifest = {
            "version": MANIFEST_VERSION,
            "kind": "image" if extension == "png" else "array",
            "count": self.count,
            "shape": shape,
            "extension": extension,
            "command": self._command,
            "content": self._content,
            **({"classes": list(self._classes)} if self._classes is not None else {}),
            "shards": [record.manifest_entry for record in records],
            "index_sha256": hashlib.sha256(index).hexdigest(),
        }
        write_atomically(self._folder / UNFINISHED_MANIFEST, json.dumps(manifest, indent=1) + "\n")
        (self._folder / MANIFEST).unlink(missing_ok=True)
        fsync_path(self._folder)  # an old manifest shall not come back beside new shards
        names = {record.file for record in records}
        for name in names:
            if (self._folder / f"{name}.partial").exists():  # else renamed by a commit that was cut short
                os.replace(self._folder / f"{name}.partial", self._folder / name)
        for stale in self._folder.glob("shard-*.tar"):
            if stale.name not in names:
                stale.unlink()
        write_atomically(self._folder / INDEX, index)
        (self._folder / REPORT).unlink(missing_ok=True)
        if report_bytes is not None:
            write_atomically(self._folder / REPORT, report_bytes)
        rename_durably(self._folder / UNFINISHED_MANIFEST, self._folder / MANIFEST)
        self._committed = True
        remove_leftovers(self._folder)

    def _record_path(self, number: int) -> Path:
        return self._folder / f"{Path(shard_name(number)).stem}.json.partial"

    def _finished_shards(self) -> dict[int, ShardRecord]:
        """Shards of an interrupted writer of the same content whose bytes are what their records say."""
        records = {}
        for path in sorted(self._folder.glob("shard-*.json.partial")):
            try:
                fields = json.loads(path.read_bytes())
                if fields.pop("identity") != self._identity:
                    continue
                fields["traits"] = [Traits(*traits) for traits in fields["traits"]]
                record = ShardRecord(**fields)
                number = int(re.fullmatch(r"shard-(\d{6,})\.tar", record.file)[1])
            except (ValueError, KeyError, TypeError):
                continue  # nothing of ours: the shard is made again
            places = (self._folder / f"{record.file}.partial", self._folder / record.file)
            if any(place.is_file() and sha256_of(place) == record.sha256 for place in places):
                records[number] = record
        return records


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:06d}.tar"


def remove_leftovers(folder: Path, keep: Collection[str] = ()) -> None:
    """Remove what an interrupted writer left, but for the names in ``keep``."""
    for leftover in (*folder.glob("shard-*.tmp"), *folder.glob("shard-*.partial")):
        if leftover.name not in keep:
            leftover.unlink()


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Keep other packings out of ``folder``, which is made if missing; the lock goes with the process.

    Raises:
        InputError: another one is at work there.
    """
    make_folder(folder)
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another `rdmd pack` is writing here; wait for it or stop it") from None
        yield
    finally:
        os.close(descriptor)


def report_text(report: dict) -> str:
    """report.json."""
    return json.dumps(report, indent=1, ensure_ascii=False) + "\n"
