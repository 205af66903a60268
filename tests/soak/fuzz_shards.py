"""Mutated shard sets: packed folders, foreign tars, and the images and arrays in them."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
import tarfile
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from fuzz_mutations import Edits, mutate_bytes, mutate_text, mutate_tree, noted, odd_files, replace_by_odd
from fuzz_sandbox import Rules, as_command
from material import encoded, npy, npz, png_chunk, png_of_size
from PIL import Image

from rdmd_fast import cli
from rdmd_fast.data.options import DataOptions
from rdmd_fast.data.stream import open_stream
from rdmd_fast.randomness import Philox

NAMES = [
    "../outside.png", "/tmp/fuzz_outside.png", "a/../../../outside.png", "a" * 150 + ".png",
    ("b" * 90 + "/") * 3 + "c.png", "a.png.cls", ".png", "a", "", "a.PNG", "a.b.c.png", "é\udcff.png", "a\nb.png",
    "\x1b[31m.png", "same.png", "x.npy", "x.cls", "x.pyd", "x.pkl", "-rf.png", "a b.png", "CON.png", ".hidden.png",
    "0_0.png", "0_0.jpg", "0_0.cls",
]  # fmt: skip
LABELS = [
    b"", b"-1", b"1e3", b"9" * 30, b"0x1", b"1\n", b" 2 ", b"\xff", "²".encode(), b"3" * 19, b"1" + b"0" * 17,
    b"\x00",
]  # fmt: skip


class Shards:
    """Packed and foreign sets, through `rdmd pack`, its `--check`, `rdmd translate` and a stream that reads all."""

    name = "shards"

    def __init__(self, material):
        self.material = material
        self.bases = [material.images, material.images, material.latents, material.foreign, material.foreign]
        self.bases += [material.foreign_latents, material.pictures]
        self.weights = {
            "member": 5, "header": 4, "manifest": 3, "index": 3, "bytes": 3, "text": 0.5, "file": 1, "name": 1.5,
        }  # fmt: skip
        self.mutations = noted(*self.weights)

    def start(self, chance: random.Random, number: int) -> Edits:
        base, door = chance.choice(self.bases), chance.randrange(8)
        return Edits(base=base, door=door, windowed=chance.random() < 0.2)

    def finish(self, case: Edits, folder: Path):
        odd_files(folder)
        data = Path(shutil.copytree(case.base, folder / "data"))
        for kind, seed in case:
            damage_set(data, kind, random.Random(seed), folder)
        pictures = case.base == self.material.pictures
        if case.door == 0 or (pictures and case.door % 2):
            arguments = ["translate", "--model", str(self.material.generator), "--input", "data", "--output", "out"]
        elif case.door == 1 or pictures:
            arguments = ["pack", "data", "--out", "packed", "--workers", "1"]
            arguments += ["--resolution", "8"] if "latents" not in case.base.name else []
        elif case.door in (2, 3, 4):
            return lambda: as_command(read_all, case.windowed), Rules(), None
        else:
            arguments = ["pack", "--check", "data", "--workers", "1"]
        return lambda: cli.main(arguments), Rules(notes=PACK_SAYS), None


PACK_SAYS = r"(data|packed)[/:]|skipped, unreadable: |\d+ (near-empty|duplicates|unlike)"


def read_all(windowed: bool) -> None:
    """Two epochs of a set as a training reads it, and its labels."""
    options = DataOptions(cache_gib=0.0 if windowed else 4.0, cache_dir="cache")
    stream = open_stream("data", Philox(0), "source", options)
    positions = np.arange(2 * stream.len)
    for batch in np.array_split(positions, 4):
        stream.batch(batch)
    if stream.shards.labels is not None:
        stream.labels(positions)


def damage_set(data: Path, kind: str, chance: random.Random, folder: Path) -> None:
    tars = sorted(data.glob("*.tar"))
    whole = [path for path in sorted(data.iterdir()) if path.is_file()]
    if kind in ("manifest", "index"):
        path = data / f"{kind}.json"
        if not path.is_file():
            kind = "member"
        else:
            mutate_json(data, path, chance)
            return
    if kind == "file" and whole:
        replace_by_odd(chance.choice(whole), folder, chance)
        return
    if kind == "text":
        for path in (path for path in whole if path.suffix == ".json"):
            path.write_bytes(mutate_text(path.read_text(errors="replace"), chance))
            return
    if not tars:
        path = chance.choice(whole) if whole else None
        if path and path.is_file():
            form = path.suffix.removeprefix(".")
            whole = path.read_bytes()
            path.write_bytes(odd_sample(whole, form, chance) if kind == "member" else mutate_bytes(whole, chance))
        return
    path = chance.choice([path for path in tars if path.is_file()] or [None])
    if path is None:
        return
    if kind == "member" or kind == "name":
        rewrite(path, kind, chance)
    elif kind == "header":
        path.write_bytes(mutate_headers(path.read_bytes(), chance))
    else:
        path.write_bytes(mutate_bytes(path.read_bytes(), chance))
    if chance.random() < 0.6:
        tell_manifest(data, path)


def tell_manifest(data: Path, shard: Path) -> None:
    """Size and hash of a changed shard into the manifest: the damage is to be met in the shard itself."""
    path = data / "manifest.json"
    try:
        values = json.loads(path.read_text())
        for entry in values["shards"]:
            if entry["file"] == shard.name:
                content = shard.read_bytes()
                entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        path.write_text(json.dumps(values))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass


def mutate_json(data: Path, path: Path, chance: random.Random) -> None:
    """A value of the index or the manifest; of the index mostly with its hash put right."""
    try:
        values = json.loads(path.read_text())
    except ValueError:
        return
    words = ("../images/shard-000000.tar", "fifo", "array", "image", "npy", "png", "cls", "manifest.json", "loop")
    mutate_tree(values, chance, words)
    path.write_text(json.dumps(values))
    if path.name == "index.json" and chance.random() < 0.9:
        manifest = data / "manifest.json"
        try:
            told = json.loads(manifest.read_text())
            told["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
            manifest.write_text(json.dumps(told))
        except (OSError, ValueError, TypeError):
            pass


# -- tars --------------------------------------------------------------------------------------------------------------


def rewrite(path: Path, kind: str, chance: random.Random) -> None:
    """The tar again, with another member in one place: its name, its type or its content."""
    try:
        with tarfile.open(path) as tar:
            members = [(info, (tar.extractfile(info).read() if info.isreg() else b"")) for info in tar.getmembers()]
    except Exception:  # damaged already
        path.write_bytes(mutate_bytes(path.read_bytes(), chance))
        return
    if not members:
        return
    at = chance.randrange(len(members))
    info, content = members[at]
    if kind == "name":
        info.name = chance.choice(NAMES)
        if chance.random() < 0.2:
            info.type = chance.choice([b"1", b"2", b"3", b"5", b"6"])  # links, a device, a folder, a pipe
            info.linkname, content = "/etc/passwd", b""
        if chance.random() < 0.3:
            info.pax_headers = chance.choice([
                {"size": "-1"}, {"size": "1e30"}, {"path": "\x00"}, {"path": "../x.png"}, {"GNU.sparse.map": "0,1,a"},
                {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, {"mtime": "nan"}, {"comment": "x" * 100000},
                {"GNU.sparse.size": "1000000000000000"}, {"uid": "9" * 5000}, {"hdrcharset": "BINARY"},
            ])  # fmt: skip
    else:
        form = info.name.rpartition(".")[2]
        content = chance.choice(LABELS) if form == "cls" else odd_sample(content, form, chance)
    members[at] = info, content
    if chance.random() < 0.1:
        members.append(members[chance.randrange(len(members))])
    form = chance.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    with tarfile.open(path, "w", format=form, errors="surrogateescape") as tar:
        for each, data in members:
            each.size = len(data)
            try:
                tar.addfile(each, BytesIO(data))
            except (ValueError, UnicodeError):
                continue


NUMBERS = [
    b"\x80" + b"\xff" * 11, b"\xff" * 12, b"\x80" + b"\x00" * 3 + b"\x7f" + b"\xff" * 7, b"\xff" * 10 + b"\xfe\x00",
    b"77777777777\0",
]  # fmt: skip
NUMBERS += [
    b"-0000000001\0", b"           \0", b"abcdefghijk\0", b"00000000000\0", b"00000001000\0", b"\xff" * 11 + b"\x00",
]  # fmt: skip


def mutate_headers(data: bytes, chance: random.Random) -> bytes:
    """A field of one header, with the checksum put right: sizes, types, names, magic."""
    headers = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    if not headers:
        return mutate_bytes(data, chance)
    at = chance.choice(headers)
    block = bytearray(data[at : at + 512])
    kind = chance.choice(["size", "size", "type", "type", "name", "magic", "mode", "link", "sparse", "prefix"])
    if kind in ("size", "mode"):
        start = 124 if kind == "size" else chance.choice([136, 100])
        block[start : start + (12 if start != 100 else 8)] = chance.choice(NUMBERS)[: 12 if start != 100 else 8]
    elif kind == "type":
        block[156:157] = chance.choice(
            [b"1", b"2", b"3", b"5", b"6", b"7", b"g", b"x", b"L", b"K", b"S", b"V", b"M", b"X", b"\0", b"\xff"]
        )
    elif kind == "name":
        block[:100] = chance.choice([bytes(100), b"\xff" * 100, b"../" * 33 + b"a", b"a/" * 50, b"./.png" + bytes(94)])
    elif kind == "magic":
        block[257:265] = chance.choice([b"ustar  \0", bytes(8), b"ustar\00099", b"USTAR\00000"])
    elif kind == "link":
        block[157:257] = b"/etc/passwd".ljust(100, b"\0")
    elif kind == "prefix":
        block[345:500] = chance.choice([b"p/" * 77 + b"p", b"\xff" * 155, b"../".ljust(155, b"\0")])
    else:
        block[156:157] = b"S"
        block[386:512] = chance.choice([b"\xff" * 126, b"7" * 126, chance.randbytes(126)])
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return data[:at] + bytes(block) + data[at + 512 :]


# -- samples -----------------------------------------------------------------------------------------------------------


def odd_sample(content: bytes, form: str, chance: random.Random) -> bytes:
    """Another content of a sample: damaged, of another kind, or larger than anybody wants."""
    kind = chance.randrange(4)
    if kind == 0:
        return mutate_bytes(content, chance, reach=128)
    if kind == 1:
        return chance.choice(
            [b"", b"<html>", b"PK\x03\x04", b"\x80\x04cos\nsystem\n.", b"GIF89a", b"%PDF", b"\x93NUMPY", bytes(64)]
        )
    return odd_array(content, chance) if form == "npy" else odd_image(chance)


def odd_image(chance: random.Random) -> bytes:
    kind = chance.choice(["bomb", "wide", "mode", "other size", "chunk", "animation", "jpeg size", "format", "exif"])
    if kind in ("bomb", "wide"):
        wide = chance.choice([(11000, 11000), (2**31 - 1, 1), (1, 10**6), (0, 5), (16000, 9000)])
        return png_of_size(*(60000, 60000) if kind == "bomb" else wide, zlib.compress(bytes(1 << 20)))
    if kind == "mode":
        mode = chance.choice(["1", "L", "LA", "P", "RGBA", "I;16", "CMYK"])
        image = Image.new(mode, (8, 8))
        if mode == "P":
            image.info["transparency"] = bytes(range(200))
        return encoded(image, "JPEG" if mode == "CMYK" else "PNG")
    if kind == "other size":
        return encoded(Image.new("RGB", chance.choice([(1, 1), (9, 8), (3000, 2), (300, 300)])))
    if kind == "chunk":
        name, body = chance.choice([
            (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 24))), (b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 22))),
            (b"tEXt", b"a\0" + b"x" * 100000), (b"tRNS", b"\xff" * 300), (b"gAMA", b"\0"), (b"eXIf", b"MM\0*\xff"),
        ])  # fmt: skip
        return png_of_size(8, 8, zlib.compress(bytes(8 * 25)), extra=png_chunk(name, body))
    if kind == "animation":
        frames = [Image.new("RGB", (8, 8), (n, 0, 0)) for n in range(3)]
        return encoded(frames[0], chance.choice(["PNG", "WEBP", "GIF"]), save_all=True, append_images=frames[1:])
    if kind == "exif":
        exif = Image.Exif()
        exif[274] = chance.choice([0, 3, 6, 99, 65535])
        data = exif.tobytes() if chance.random() < 0.5 else b"Exif\0\0" + chance.randbytes(60)
        return encoded(Image.new("RGB", (8, 8)), "JPEG", exif=data)
    if kind == "format":
        form = chance.choice(["BMP", "TIFF", "PPM", "GIF", "ICO", "TGA", "PDF", "EPS"])
        return encoded(Image.new("RGB", (8, 8)), form)
    data = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG"))
    at = data.find(b"\xff\xc0")
    sides = chance.choice([(65535, 65535), (0, 8), (8, 0), (12000, 12000), (8, 65535)])
    data[at + 5 : at + 9] = struct.pack(">HH", *sides)
    return bytes(data)


HEADERS = [
    "{'descr': '<f4', 'fortran_order': True, 'shape': (4, 8, 8), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (4,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-4, 8, 8), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (4000, 300, 300), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (4, 8, 4), }",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (4, 8, 8), }",
    "{'descr': '<c8', 'fortran_order': False, 'shape': (4, 8, 4), }",
    "{'descr': '<M8[s]', 'fortran_order': False, 'shape': (4, 8, 4), }",
    "{'descr': '|V4', 'fortran_order': False, 'shape': (4, 8, 8), }",
    "{'descr': '|S4', 'fortran_order': False, 'shape': (4, 8, 8), }",
    "{'descr': '<U1', 'fortran_order': False, 'shape': (4, 8, 8), }",
    "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (4, 8, 8), }",
    "{'descr': [('a', '<f4', (2**9,))], 'shape': ()}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 8, 8), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (), }",
    "{'descr': '<f4', 'fortran_order': 1, 'shape': (4, 8, 8), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': 4, }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (4L, 8L, 8L), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 8, 8), }", "__import__('os').system('touch executed')",
    "(" * 300, "-" * 9000 + "1", "[" * 90 + "]" * 90, "", "{", "{}", "1+1", "'a'" * 2000, "{'descr': 'f2,f2,(3)f4'}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775807,), }",
    "{'descr': '>f4', 'fortran_order': False, 'shape': (4, 8, 8), }",
    "{'descr': 'a4', 'fortran_order': False, 'shape': (4, 8, 8), }",
    "{'descr': '\\x00', 'fortran_order': False, 'shape': (4, 8, 8), }",
]  # fmt: skip


def odd_array(content: bytes, chance: random.Random) -> bytes:
    kind = chance.randrange(6)
    if kind == 0:
        values = np.frombuffer(content[-1024:], np.float32).copy()
        values[chance.randrange(len(values))] = chance.choice([np.nan, np.inf, -np.inf, 3e38])
        return content[:-1024] + values.tobytes()
    if kind == 1:
        return npz(a=np.zeros(4))[: None if chance.random() < 0.5 else 50]
    if kind == 2:
        return npy(np.array([Evil()], dtype=object), allow_pickle=True)
    text = chance.choice(HEADERS).encode()
    version = chance.choice([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09"])
    length = struct.pack("<H", len(text)) if version[:1] == b"\x01" else struct.pack("<I", len(text))
    if chance.random() < 0.1:
        length = b"\xff" * len(length)
    return b"\x93NUMPY" + version + length + text + content[-1024:]


class Evil:
    """What would touch a file if anybody unpickled it."""

    def __reduce__(self):
        import os

        return os.system, ("touch executed",)
