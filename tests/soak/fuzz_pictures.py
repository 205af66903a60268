"""Pictures of real encoders with chunks, segments and tags cut, repeated, moved and damaged."""

from __future__ import annotations

import io
import random
import struct
import sys
import zlib

import numpy as np
from fuzz_mutations import mutate_bytes
from fuzz_sandbox import Rules
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from rdmd_fast.data.pictures import FILE_FORMATS, SHARD_FORMATS, UNREADABLE, decode_rgb, load_picture

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# Red and blue change places: a profile that shows.
SWAPPED = SRGB.replace(b"rXYZ", b"tmp ").replace(b"bXYZ", b"rXYZ").replace(b"tmp ", b"bXYZ")
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
LIBTIFF_SAYS = r"\w+: "
SEVERAL = ("PNG", "WEBP", "GIF", "TIFF")


class Pictures:
    """Both decoders on one file: an upright RGB picture of the header's size, the same of both, or a refusal."""

    name = "pictures"

    def __init__(self, material):
        self.files = [file for number in range(150) for file in [encoded(random.Random(number))] if file is not None]
        self.mutations = {
            name: (lambda case, chance, name=name: change(case, name, chance, self.files))
            for name in ("cut", "repeat", "move", "bytes", "short", "length", "graft", "end")
        }
        self.weights = {
            "cut": 2, "repeat": 2, "move": 2, "bytes": 4, "short": 2, "length": 1, "graft": 3, "end": 1,
        }  # fmt: skip

    def start(self, chance: random.Random, number: int) -> list[bytes]:
        return split(chance.choice(self.files))

    def finish(self, case: list[bytes], folder):
        data = b"".join(case)
        (folder / "picture").write_bytes(data)
        return lambda: judge(data), Rules(notes=LIBTIFF_SAYS), None


# -- encoders ----------------------------------------------------------------------------------------------------------


def encoded(chance: random.Random) -> bytes | None:
    """A picture by one of Pillow's encoders, or by hand what they do not write; None for what they refuse."""
    form = chance.choice(["PNG", "PNG", "JPEG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "by hand"])
    random_bytes = np.random.default_rng(chance.randrange(2**31))
    pixels = random_bytes.integers(0, 256, (5, 7, 4), dtype=np.uint8)
    if form == "by hand":
        return deep_png(chance, random_bytes) if chance.random() < 0.6 else deep_pgm(chance, random_bytes)
    image = Image.fromarray(pixels).resize(chance.choice([(23, 17), (64, 48), (1, 1), (9, 40)]))
    image = image.convert(chance.choice(["RGB", "RGB", "L", "P", "1", "LA", "RGBA", "CMYK"]))
    exif = Image.Exif()
    exif[0x112], exif[0x10F], exif[0x11A] = chance.randrange(1, 9), "a camera", 72.0
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", XMP.decode(), zip=True)
    text.add_text("Comment", "a" * 500, zip=True)
    packings = (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "group4" if image.mode == "1" else "jpeg")
    every = {
        "PNG": [{}, {"pnginfo": text}, {"compress_level": 0}, {"transparency": 3}, {"dpi": (72, 72)}],
        "JPEG": [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"comment": b"a comment"}, {"subsampling": 0}],
        "WEBP": [{}, {"lossless": True}, {"quality": 30}, {"xmp": XMP}],
        "TIFF": [{"compression": each} for each in packings],
    }
    options = dict(chance.choice(every.get(form, [{}])))
    if chance.random() < 0.5 and form in (*SHARD_FORMATS, "TIFF"):
        options["exif"] = exif
    if chance.random() < 0.5:
        options["icc_profile"] = chance.choice([SRGB, SWAPPED])
    if chance.random() < 0.2 and form in SEVERAL:
        options |= {"save_all": True, "append_images": [image.rotate(180)]}
    buffer = io.BytesIO()
    try:
        image.save(buffer, form, **options)
    except UNREADABLE:
        return None
    return buffer.getvalue()


def deep_png(chance: random.Random, random_bytes) -> bytes:
    """Of 16 bits, of few, or interlaced, with a transparent level or without."""
    depth, kind = chance.choice([(16, 0), (16, 2), (16, 4), (16, 6), (2, 0), (4, 0), (8, 2), (4, 3)])
    bits, interlaced, (width, height) = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind], chance.random() < 0.5, (11, 9)
    steps = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = b""
    for left, top, across, down in steps if interlaced else [(0, 0, 1, 1)]:
        columns, lines = -(-(width - left) // across), -(-(height - top) // down)
        rows += b"".join(b"\0" + random_bytes.bytes((columns * bits + 7) // 8) for _ in range(lines))
    level = random_bytes.bytes({0: 2, 2: 6, 3: 9}.get(kind, 0))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlaced))]
    chunks += [(b"PLTE", random_bytes.bytes(48))] * (kind == 3)
    chunks += [(b"tRNS", level)] * (bool(level) and chance.random() < 0.6)
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, *zip(*chunks, strict=True)))


def deep_pgm(chance: random.Random, random_bytes) -> bytes:
    maximum = chance.choice([65535, 1023, 300, 255, 15])
    numbers = random_bytes.integers(0, maximum + 1, (6, 8))
    if chance.random() < 0.3:
        return b"P2\n# by hand\n8 6\n%d\n" % maximum + " ".join(map(str, numbers.ravel())).encode()
    return b"P5\n8 6\n%d\n" % maximum + numbers.astype(">u2" if maximum > 255 else "u1").tobytes()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


# -- parts and what happens to them ------------------------------------------------------------------------------------


def split(data: bytes) -> list[bytes]:
    """The head, then chunks, segments or tags as far as they go, then the rest."""
    if data[:4] == b"\x89PNG":
        return pieces(data, 8, lambda at: 12 + int.from_bytes(data[at : at + 4], "big"))
    if data[:4] == b"RIFF":
        return pieces(data, 12, lambda at: 8 + -(-int.from_bytes(data[at + 4 : at + 8], "little") // 2) * 2)
    if data[:2] == b"\xff\xd8":
        return pieces(data, 2, lambda at: 2 + int.from_bytes(data[at + 2 : at + 4], "big"), b"\xff\xda")
    if data[:4] == b"II*\0":
        start = int.from_bytes(data[4:8], "little") + 2
        stop = start + 12 * int.from_bytes(data[start - 2 : start], "little")
        return [data[:start], *(data[at : at + 12] for at in range(start, stop, 12)), data[stop:]]
    return [data[at : at + 16] for at in range(0, len(data), 16)]


def pieces(data: bytes, at: int, size, last: bytes | None = None) -> list[bytes]:
    found = [data[:at]]
    while at + 8 <= len(data) and data[at : at + 2] != last:
        found.append(data[at : at + size(at)])
        at += size(at)
    return [*found, data[at:]]


def change(case: list[bytes], name: str, chance: random.Random, files: list[bytes]) -> str:
    """One change of the parts; returns where it fell."""
    at = chance.randrange(len(case))
    part = case[at]
    if name == "cut":
        del case[at]
        case.append(b"")
    elif name == "repeat":
        case[at:at] = [part] * (chance.choice([1, 2, 300]) if len(part) < 2000 else 1)
    elif name == "move":
        case.insert(chance.randrange(len(case)), case.pop(at))
    elif name == "bytes":
        case[at] = checked(mutate_bytes(part, chance, 64), part, chance)
    elif name == "short":
        case[at] = part[: chance.randrange(len(part) + 1)]
    elif name == "length":
        number = chance.choice([0, 1, 2, 255, 65535, 2**31 - 1, 2**32 - 1])
        case[at] = struct.pack(chance.choice("<>") + "I", number) + part[4:]
    elif name == "graft":
        others = [other for file in files if file[:2] == case[0][:2] for other in split(file)[1:-1]]
        case.insert(chance.choice([1, at, len(case) - 1]), chance.choice(others or [part]))
    else:
        whole = b"".join(case)
        case[:] = [whole[: chance.randrange(len(whole) + 1)]]
    return f"part {at}, {part[:8]!r}"


def checked(new: bytes, old: bytes, chance: random.Random) -> bytes:
    """With length and checksum of a PNG's chunk mended, mostly: what is in it shall be read."""
    is_chunk = len(old) >= 12 and len(old) == 12 + int.from_bytes(old[:4], "big")
    return chunk(old[4:8], new[8:-4]) if is_chunk and len(new) >= 12 and chance.random() < 0.8 else new


# -- what must hold ----------------------------------------------------------------------------------------------------


def judge(data: bytes) -> int:
    """0 for a picture that both decoders give, 2 for a refusal; AssertionError for anything else."""
    picture, why = outcome(lambda: load_picture(io.BytesIO(data)))
    stored, _ = outcome(lambda: decode_rgb(data))
    theirs, form = by_pillow(data)
    if form in SHARD_FORMATS or stored is not None:
        assert (picture is None) == (stored is None), "one decoder takes it, the other does not"
        assert picture is None or np.array_equal(picture, stored), "the decoders differ"
    if theirs is not None:
        assert picture is not None, f"Pillow reads what is refused: {why}"
        turns = [np.rot90(each, turn) for each in (picture, picture[::-1]) for turn in range(4)]
        assert any(turn.shape == theirs.shape for turn in turns), "another size"
        known = form not in ("I;16", "PPM") and theirs.size
        assert not known or any(np.array_equal(turn, theirs) for turn in turns), "other pixels"
    if picture is None:
        print("error: " + " ".join(why.split())[:200].encode("ascii", "replace").decode(), file=sys.stderr)
        return 2
    return 0


def outcome(decode) -> tuple[np.ndarray | None, str]:
    """(uint8 [H, W, 3], "") or (None, why not)."""
    try:
        image = decode()
    except UNREADABLE as error:
        return None, f"{type(error).__name__} {error}"
    assert image.mode == "RGB" and image.tobytes()
    return np.asarray(image), ""


def by_pillow(data: bytes) -> tuple[np.ndarray | None, str]:
    """(uint8 [H, W, 3] as Pillow alone reads it, its format); None where it refuses, or has colours to change."""
    form = ""
    try:
        with Image.open(io.BytesIO(data), formats=FILE_FORMATS) as image:
            form = image.format
            plain = image.mode in ("RGB", "L", "P", "CMYK") and not image.has_transparency_data
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        plain = plain and not any(mark in data for mark in (b"ICC_PROFILE", b"iCCP", b"ICCP", b"\x73\x87"))
        return (pixels if plain else None), form
    except Exception:
        return None, form
