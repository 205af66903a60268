"""Images or .npy arrays from a folder, a zip archive or one large .npy file."""

import hashlib
import io
import stat
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from rdmd_fast.data.file_walk import ARRAY_SUFFIX, HOUSEKEEPING, is_array, is_hidden, is_image, tell_left_out, unread
from rdmd_fast.data.packing.sources import Sample, SampleSet, hold_out
from rdmd_fast.data.packing.sources.shards import ShardFiles
from rdmd_fast.data.pictures import UNREADABLE, load_image
from rdmd_fast.data.sample_names import image_keys
from rdmd_fast.data.shards.decode_arrays import checked_array, decode_array
from rdmd_fast.data.shards.folder_kind import Contents, Kind, describe_file, look_into, mixed
from rdmd_fast.errors import InputError

MAX_FILE_BYTES = 1 << 30  # of one file, unpacked where it is in a zip archive


class FolderFiles:
    """Images or arrays below a folder.

    Attributes:
        origin: the folder, for messages.
        paths: relative POSIX paths, sorted, hidden files left out.
        left_out: what else a user may miss, and how often.
    """

    def __init__(self, contents: Contents):
        self.origin, self._folder = str(contents.folder), contents.folder
        self.paths, self.left_out = contents.paths, contents.left_out

    def read(self, path: str) -> bytes:
        """One file.

        Raises:
            ValueError, OSError: gone, absurdly large, or a pipe or device, which might never end.
        """
        whole = self._folder / path
        status = whole.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("no regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise ValueError(f"has {status.st_size} bytes, over {MAX_FILE_BYTES}")
        return whole.read_bytes()

    def fingerprint(self, path: str) -> str:
        """Size; no file is read."""
        try:
            return str((self._folder / path).stat().st_size)
        except OSError as error:  # a broken link, say; reading it will tell
            return str(error.errno)


class ZipFiles:
    """Files of a zip archive, or of one folder in it; nothing is written to disk. Same attributes as FolderFiles."""

    def __init__(self, archive: Path, inner: str = ""):
        self.origin = f"{archive}/{inner}" if inner else str(archive)
        self._prefix = f"{inner}/" if inner else ""
        try:
            self._zip = zipfile.ZipFile(archive)
        except (zipfile.BadZipFile, *UNREADABLE) as error:
            raise InputError(f"{archive}: damaged or no zip archive ({error}); download or copy it again") from None
        names = [info.filename for info in self._zip.infolist() if not info.is_dir()]
        for name, count in Counter(names).items():
            if count > 1 or name.startswith("/") or "\\" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
                fault = "is there twice" if count > 1 else "is no plain relative path"
                raise InputError(f"{archive}: {name!r} {fault}; pack the archive anew, or its unpacked folder")
        found = [name.removeprefix(self._prefix) for name in names if name.startswith(self._prefix)]
        if not found:
            inside = sorted({name.split("/")[0] for name in names if "/" in name})
            raise InputError(f"{self.origin}: no files there; the archive's folders are {', '.join(inside[:8])}")
        self.paths = sorted(path for path in found if not is_hidden(path))
        self.left_out = unread(self.paths) + Counter(
            f"files in {part}" for path in found for part in path.split("/") if part in HOUSEKEEPING
        )

    def read(self, path: str) -> bytes:
        """One member, its checksum verified.

        Raises:
            ValueError, OSError: damaged, encrypted, absurdly large, or compressed in an unknown way.
        """
        info = self._zip.getinfo(self._prefix + path)
        if info.file_size > MAX_FILE_BYTES:
            raise ValueError(f"unpacks to {info.file_size} bytes, over {MAX_FILE_BYTES}")
        try:
            return self._zip.read(info)
        except (zipfile.BadZipFile, RuntimeError) as error:  # RuntimeError: encrypted, NotImplementedError below it
            raise ValueError(str(error)) from None

    def fingerprint(self, path: str) -> str:
        info = self._zip.getinfo(self._prefix + path)
        return f"{info.file_size} {info.CRC}"


Files = FolderFiles | ZipFiles | ShardFiles


def open_files(source: str | Path, extension: str | None = None) -> Files:
    """Images or arrays of a folder, of its tars, of ``FILE.zip`` or of ``FILE.zip/folder/inside``.

    Args:
        extension: the members of tars that are samples; None for all images or arrays.

    Raises:
        InputError: there are none, they are of two kinds, or an archive is damaged.
    """
    path = Path(source)
    if path.is_dir():
        contents = look_into(path)
        contents.require_samples()
        shards = contents.kind in (Kind.PACKED, Kind.TARS)
        return ShardFiles(contents, extension) if shards else FolderFiles(contents)
    for archive in (path, *path.parents):
        if archive.suffix.lower() == ".zip" and archive.is_file():
            inner = path.relative_to(archive).as_posix()
            return ZipFiles(archive, "" if inner == "." else inner)
    raise InputError(f"{source}: {describe_file(path)}")


def file_sets(args) -> list[SampleSet]:
    """Images or arrays, as the source holds them; those of shards are packed anew, say at another size."""
    path = Path(args.source)
    if path.suffix == ARRAY_SUFFIX and path.is_file():
        return _rows_sets(path, args)
    files = open_files(path, args.extension)
    tell_left_out(files.origin, files.left_out)
    ending = f".{args.extension.lower()}" if args.extension else ""
    paths = [path for path in files.paths if path.lower().endswith(ending)]
    images, arrays = list(filter(is_image, paths)), list(filter(is_array, paths))
    if images and arrays:
        raise mixed(files.origin, {Kind.IMAGES: images, Kind.ARRAYS: arrays})
    if not images and not arrays:
        chosen = f"files that end in .{args.extension}" if args.extension else "images and no arrays"
        raise InputError(f"{files.origin}: no {chosen} there")
    if arrays:
        _refuse_for_arrays(args)
        return sets_of_files(files, arrays, args, {}, decode_array)
    _tell_twins(files.origin, images)
    return image_sets(files, images, args, {})


def _tell_twins(origin: str, images: list[str]) -> None:
    """Say that two images differ in their suffix alone: one may be the mask of the other."""
    of_stem: dict[str, list[str]] = {}
    for image in images:
        of_stem.setdefault(image.rpartition(".")[0], []).append(image)
    twins = [each for each in of_stem.values() if len(each) > 1]
    if twins:
        print(
            f"{origin}: {' and '.join(twins[0][:2])} differ in their suffix alone, as {len(twins)} names do; each is a "
            "sample, --extension takes those of one suffix",
            file=sys.stderr,
        )


def image_sets(
    files: Files, paths: list[str], args, content: dict, folder: str = "", keys: list[str] | None = None
) -> list[SampleSet]:
    """Sets of the images at ``paths``, cropped and resized as ``args`` says."""
    if args.resolution is None:
        raise InputError("packing images needs --resolution, their side in pixels")
    content = {**content, "resolution": args.resolution, **({"crop": args.crop} if args.crop else {})}

    def load(data: bytes) -> np.ndarray:
        return load_image(io.BytesIO(data), args.resolution, args.crop)

    return sets_of_files(files, paths, args, content, load, folder, keys)


def sets_of_files(
    files: Files,
    paths: list[str],
    args,
    content: dict,
    load: Callable[[bytes], np.ndarray],
    folder: str = "",
    keys: list[str] | None = None,
) -> list[SampleSet]:
    """One set of files below ``folder``, or train and test with --holdout.

    ``load`` decodes a file; ``keys`` are the samples' names, by default their paths.
    """
    content = {
        "source": str(Path(files.origin).resolve()),
        "listing_sha256": _listing_digest(files, paths),
        "holdout": args.holdout,
        "seed": args.seed,
        "shard_size": args.shard_size,
        **({"extension": extension} if (extension := getattr(args, "extension", None)) else {}),
        **content,
    }
    keys = keys or image_keys(paths)
    labels: list[int | None] = [None] * len(paths)
    classes = None
    if isinstance(files, ShardFiles):
        if args.labels:
            raise InputError(f"--labels: {files.origin} holds shards, whose own labels are kept; leave the option out")
        labels, classes = files.labels(paths), files.classes
    elif args.labels:
        content["labels"] = True
        labels, classes = _folder_labels(files.origin, paths)

    def sample(indices: np.ndarray, position: int) -> Sample:
        index = indices[position]
        return keys[index], load(files.read(paths[index])), labels[index]

    return [
        SampleSet(
            "/".join(filter(None, (folder, split))),
            {**content, "split": split},
            len(indices),
            partial(sample, indices),
            classes,
            [paths[index] for index in indices],
        )
        for split, indices in hold_out(len(paths), args.holdout, args.seed).items()
    ]


def _folder_labels(origin: str, paths: list[str]) -> tuple[list[int], list[str]]:
    """(label of each path, class names): the classes are the first-level folders in sorted order."""
    alone = next((path for path in paths if "/" not in path), None)
    if alone is not None:
        raise InputError(
            f"{origin}: {alone} lies in no subfolder; with --labels the first-level subfolder is the class, "
            "move it into one"
        )
    folders = [path.split("/")[0] for path in paths]
    classes = sorted(set(folders))
    label_of = {name: label for label, name in enumerate(classes)}
    return [label_of[name] for name in folders], classes


def _listing_digest(files: Files, paths: list[str]) -> str:
    """Changes when a file is added, removed, renamed or changes size; no file is read."""
    listing = "".join(f"{path}\0{files.fingerprint(path)}\n" for path in paths)
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()


# -- arrays ------------------------------------------------------------------------------------------------------------


def _refuse_for_arrays(args) -> None:
    for option in ("resolution", "crop", "encoder"):
        if getattr(args, option) is not None:
            raise InputError(f"--{option}: is for images, {args.source} holds arrays, which are packed as they are")


def _rows_sets(path: Path, args) -> list[SampleSet]:
    """One .npy file of shape [N, C, H, W] or [N, D]: a sample each row. It is mapped, never read whole."""
    _refuse_for_arrays(args)
    if args.labels:
        raise InputError(f"--labels: {path} is one file, the classes are subfolders")
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (zipfile.BadZipFile, *UNREADABLE) as error:
        raise InputError(f"{path}: not a whole .npy file ({error}); save it again") from None
    if not isinstance(rows, np.ndarray):
        raise InputError(f"{path}: holds several arrays; save one with numpy.save")
    if rows.ndim not in (2, 4) or rows.dtype.kind != "f":
        raise InputError(f"{path}: holds {rows.dtype} {list(rows.shape)}; save floats [N, C, H, W] or [N, D]")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    content = {
        "source": str(path.resolve()),
        "sha256": digest,
        "holdout": args.holdout,
        "seed": args.seed,
        "shard_size": args.shard_size,
    }

    def sample(indices: np.ndarray, position: int) -> Sample:
        index = int(indices[position])
        try:
            return f"{path.stem.replace('.', '_')}_{index:07d}", checked_array(rows[index]), None
        except ValueError as error:
            raise InputError(f"{path}: row {index} {error}") from None

    return [
        SampleSet(split, {**content, "split": split}, len(indices), partial(sample, indices))
        for split, indices in hold_out(len(rows), args.holdout, args.seed).items()
    ]
