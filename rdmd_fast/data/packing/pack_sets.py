"""Writing the sets of a source: loading in parallel, resuming, repairing, and the report at the end."""

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from rdmd_fast.data.file_walk import is_image
from rdmd_fast.data.packing.check import OtherSet
from rdmd_fast.data.packing.report import build_report, summary
from rdmd_fast.data.packing.shard_writer import (
    REPORT,
    EncodedSample,
    ShardFile,
    ShardWriter,
    encode_sample,
    folder_lock,
    remove_leftovers,
    report_text,
    shard_name,
)
from rdmd_fast.data.packing.sources import CHUNK, SampleSet, Unreadable
from rdmd_fast.data.pictures import UNREADABLE
from rdmd_fast.data.shards.folder_kind import is_packed
from rdmd_fast.data.shards.parts import INDEX, MANIFEST, MOST_INDEX_BYTES, UNFINISHED_MANIFEST
from rdmd_fast.data.threads import map_in_order
from rdmd_fast.errors import InputError
from rdmd_fast.files import read_text, rename_durably, sha256_of, write_atomically

EncodedChunk = tuple[int, list[EncodedSample], list[list[str]]]
"""Number of the shard it goes to, samples, and (path, reason) of unreadable files."""


def pack_sets(sets: list[SampleSet], command: str, args: argparse.Namespace) -> None:
    """Write the sets that are not there yet, or what is missing of them; new sets appear together, at the end.

    Args:
        sets: what to write, each below ``args.out``.
        command: the command line, for the manifest.
        args: of ``rdmd pack``: source, out, shard_size, workers, force, other.

    Raises:
        InputError: another set in the way, too many unreadable files, disk full.
    """
    for each in sets:
        if each.count == 0:
            raise InputError(f"{args.out / each.folder}: {args.source} holds no samples for it; choose otherwise")
        _check_place(args.out / each.folder)
    # Every set in the way is looked at before anything is written.
    present = [None if args.force else _present_set(args.out / each.folder, each.content) for each in sets]
    other = OtherSet(args.other, args.workers) if args.other else None
    try:
        _write_sets(sets, present, other, command, args)
    except OSError as error:
        raise InputError(
            f"{args.out}: cannot be written ({error.strerror or error}); finished shards are kept, mend that and run "
            "the same command again"
        ) from error


def _write_sets(sets, present, other: OtherSet | None, command: str, args) -> None:
    unreadable = Unreadable(args.source, sum(each.count for each in sets))
    with ExitStack() as stack:
        writers = []
        for each, manifest in zip(sets, present, strict=True):
            folder = args.out / each.folder
            stack.enter_context(folder_lock(folder))
            if manifest is not None:
                _complete(folder, each, manifest, args)
                if other is not None:
                    _add_to_report(folder, other.shared_with(folder))
                continue
            writer = ShardWriter(folder, each.content, command, args.shard_size, each.classes, resume=True)
            stack.enter_context(writer)
            _write(each, folder, writer, unreadable, args)
            writers.append((folder, each, writer))
        reports = [
            None if each.generated and other is None else _report(folder, writer, other)
            for folder, each, writer in writers
        ]
        for (folder, each, writer), report in zip(writers, reports, strict=True):
            writer.commit(report)
            skipped = each.count - writer.count
            note = f"; {skipped} of {each.count} files skipped as unreadable" if skipped else ""
            print(f"{folder}: {writer.count} samples{note}")
            if report is not None:
                _print_summary(folder, report)


def _check_place(folder: Path) -> None:
    """Refuse to put shards beside images or over another program's manifest.json, even with --force."""
    if folder.is_dir() and not is_packed(folder):
        others = sorted(path.name for path in folder.iterdir() if is_image(path.name) or path.name == MANIFEST)
        if others:
            raise InputError(f"--out {folder}: holds {others[0]}, which is of no packed set; name another folder")


def _present_set(folder: Path, content: dict) -> dict | None:
    """Manifest of exactly this set where the folder holds it, None where it holds nothing or an unfinished set.

    Raises:
        InputError: it holds another set, or tars of unknown origin.
    """
    if not is_packed(folder):
        if any(folder.glob("*.tar")):
            raise InputError(f"{folder}: holds .tar files without {MANIFEST}; choose another --out or pass --force")
        return None
    if not (folder / MANIFEST).is_file():
        return None
    try:
        manifest = json.loads(read_text(folder / MANIFEST, MOST_INDEX_BYTES))
        present, command = manifest["content"], manifest["command"]
        index_sha256, _ = manifest["index_sha256"], [(s["file"], s["bytes"], s["sha256"]) for s in manifest["shards"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / MANIFEST}: unreadable ({error!r}); pass --force to replace the set") from error
    if present != json.loads(json.dumps(content)):
        raise InputError(
            f"{folder}: already holds another set, made by `{command}`; choose another --out or pass --force"
        )
    index = folder / INDEX
    if not index.is_file() or sha256_of(index) != index_sha256:
        return None  # nothing says what the shards hold: the set is made again
    return manifest


def _complete(folder: Path, each: SampleSet, manifest: dict, args) -> None:
    """Make the shards again that are gone from a complete set, or hold other bytes than its manifest says."""
    whole = map_in_order(partial(_is_whole, folder), manifest["shards"], args.workers)
    missing = [number for number, is_whole in enumerate(whole) if not is_whole]
    if not (folder / UNFINISHED_MANIFEST).exists():  # else a replacement is under way, which --force may resume
        remove_leftovers(folder)
    if not missing:
        print(f"{folder}: already complete")
        return
    for number, chunks in groupby(_encoded_chunks(each, missing, folder, args), lambda chunk: chunk[0]):
        expected = manifest["shards"][number]
        path = folder / f"{shard_name(number)}.tmp"
        shard = ShardFile(path)
        try:
            for _, samples, _ in chunks:
                for sample in samples:
                    shard.add(sample)
            if shard.finish(shard_name(number), None).sha256 != expected["sha256"]:
                raise InputError(
                    f"{folder / expected['file']}: made again it differs from what {MANIFEST} says, by another Pillow "
                    "or changed files; pass --force to pack the whole set again"
                )
            rename_durably(path, folder / expected["file"])
        finally:
            shard.discard()
    print(f"{folder}: completed, {len(missing)} of {len(manifest['shards'])} shards were missing or damaged")


def _is_whole(folder: Path, shard: dict) -> bool:
    path = folder / shard["file"]
    return path.is_file() and path.stat().st_size == shard["bytes"] and sha256_of(path) == shard["sha256"]


def _write(each: SampleSet, folder: Path, writer: ShardWriter, unreadable: Unreadable, args) -> None:
    """Write the shards of a set that are not finished yet."""
    for number in sorted(writer.records):
        for path, reason in writer.records[number].unreadable:
            unreadable.skip(path, reason)
    shards = -(-each.count // args.shard_size)
    missing = [number for number in range(shards) if number not in writer.records]
    if writer.records:
        print(f"{folder}: resumed, {len(writer.records)} of {shards} shards were finished")
    for number, chunks in groupby(_encoded_chunks(each, missing, folder, args), lambda chunk: chunk[0]):
        writer.begin_shard(number)
        skipped_here = []
        for _, samples, skipped in chunks:
            for path, reason in skipped:
                unreadable.skip(path, reason)
            skipped_here += skipped
            for sample in samples:
                writer.add(sample)
        writer.finish_shard(skipped_here)


def _encoded_chunks(each: SampleSet, numbers: list[int], folder: Path, args) -> Iterator[EncodedChunk]:
    """The chunks of the shards ``numbers`` in order. Shard n has positions [n, n + 1) x shard_size, readable or not:
    so it depends on no other, and neither do an encoder's batches."""

    def positions() -> Iterator[tuple[int, range]]:
        for number in numbers:
            stop = min((number + 1) * args.shard_size, each.count)
            for first in range(number * args.shard_size, stop, CHUNK):
                yield number, range(first, min(first + CHUNK, stop))

    total = sum(len(chunk) for _, chunk in positions())
    with tqdm(desc=str(folder), total=total, unit="sample", disable=None) as bar:
        for number, samples, skipped in map_in_order(partial(_load_chunk, each), positions(), args.workers):
            bar.update(len(samples) + len(skipped))
            if each.encode is not None and samples:
                keys, arrays, labels = zip(*samples, strict=True)
                samples = list(map(encode_sample, keys, each.encode(list(arrays)), labels))
            yield number, samples, skipped


def _load_chunk(each: SampleSet, job: tuple[int, range]) -> EncodedChunk:
    """Samples as they go into the tar, or as arrays where an encoder still has to see them."""
    number, positions = job
    samples, skipped = [], []
    for position in positions:
        try:
            sample = each.load(position)
        except UNREADABLE as error:
            if each.paths is None:
                raise
            skipped.append([each.paths[position], " ".join(str(error).split()) or type(error).__name__])
        else:
            samples.append(sample if each.encode else encode_sample(*sample))
    return number, samples, skipped


def _report(folder: Path, writer: ShardWriter, other: OtherSet | None) -> dict:
    records = [writer.records[number] for number in sorted(writer.records)]
    keys = [key for record in records for key in record.keys]
    traits = [each for record in records for each in record.traits]
    report = build_report(keys, traits, [skipped for record in records for skipped in record.unreadable])
    if other is not None:
        other.check_shape(folder, writer.shape)
        report["in_other"] = other.shared(keys, [each.digest for each in traits])
    return report


def _add_to_report(folder: Path, in_other: dict) -> None:
    """Note in report.json of a complete set what it shares with another one."""
    try:
        report = json.loads(read_text(folder / REPORT, MOST_INDEX_BYTES))
    except (OSError, ValueError):
        report = build_report([], [], [])
    report["in_other"] = in_other
    write_atomically(folder / REPORT, report_text(report))
    _print_summary(folder, report)


def _print_summary(folder: Path, report: dict) -> None:
    lines = summary(report)
    for line in lines:
        print(f"  {line}")
    if lines:
        print(f"  all of them in {folder / REPORT}")
