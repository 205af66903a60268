"""From the bytes of a picture to upright sRGB pixels, alike for files and for samples in shards.

What a picture looks like is in its pixels, its orientation (EXIF, else XMP) and its colour profile (ICC). These are
picked out of JPEG, PNG, WebP and TIFF here; Pillow then sees a file without metadata, so that none of it can be at
fault. A profile or an orientation that cannot be read counts as none. PNG's gAMA, cHRM and cICP are passed over:
most writers put gAMA and cHRM there for sRGB, roughly, and viewers do not agree on them.

Imported by decoding workers, which shall start fast and stay small: numpy and LittleCMS are for pictures that need
them, torch for none.
"""

from __future__ import annotations

import io
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    import numpy as np

# What Pillow and NumPy raise for files that are broken, empty, cut short, absurdly large or of another kind.
UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, OverflowError, MemoryError, AttributeError),
    *(AssertionError, struct.error, zlib.error, Image.DecompressionBombError),
)

DECODING = "upright sRGB"
"""What samples are decoded to; memory that several programs share has it in its name."""

MOST_PIXELS = 1 << 24
"""Of an image in a shard, 4096 x 4096: a file of a few KiB can ask for thousands of times as much."""

MOST_FILE_PIXELS = 2 * Image.MAX_IMAGE_PIXELS
"""Of a picture in a file, 179 million: Pillow refuses more, as a file of a few KiB can ask for gigabytes."""

MOST_FILE_BYTES = 1 << 30  # as of what is packed; files are read whole

SHARD_FORMATS = ("PNG", "JPEG", "WEBP")
# Of those that Pillow knows, the ones of our suffixes: it would run Ghostscript on others, whatever they are named.
FILE_FORMATS = (*SHARD_FORMATS, "BMP", "GIF", "TIFF", "PPM")

_MOST_NOTE_BYTES = 8 << 20  # of a profile or an XMP packet: the largest profiles of printers have 3 MiB

# An odd file is refused, or read without a word.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


def load_picture(file: str | Path | BinaryIO) -> Image.Image:
    """The picture in a file, by path or open, as ``decode_rgb`` gives it; raises one of ``UNREADABLE``."""
    if not isinstance(file, str | Path):
        return decode_rgb(file.read(), MOST_FILE_PIXELS, FILE_FORMATS)
    if not Path(file).is_file():  # a pipe would never end
        raise ValueError("not a regular file")
    if Path(file).stat().st_size > MOST_FILE_BYTES:
        raise ValueError(f"has more than {MOST_FILE_BYTES} bytes")
    return decode_rgb(Path(file).read_bytes(), MOST_FILE_PIXELS, FILE_FORMATS)


def load_image(file: str | Path | BinaryIO, resolution: int, crop: int | None = None) -> np.ndarray:
    """The central square of ``load_picture``, resized by ``central_square``; errors as there and below.

    Returns:
        uint8 [resolution, resolution, 3].
    """
    import numpy as np

    return np.asarray(central_square(load_picture(file), resolution, crop))


def central_square(image: Image.Image, resolution: int, crop: int | None = None) -> Image.Image:
    """Crop the central square of a picture and resize it by a Lanczos filter.

    Args:
        image: of any size.
        resolution: side of the result in pixels; smaller squares are enlarged.
        crop: side of the central square in pixels; None takes the largest.

    Raises:
        ValueError: an image smaller than ``crop``.
    """
    width, height = image.size
    side = crop or min(width, height)
    if side > min(width, height):
        raise ValueError(f"{width}x{height} pixels are too few for a central square of {side}")
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square if side == resolution else square.resize((resolution, resolution), Image.Resampling.LANCZOS)


def decode_rgb(data: bytes, most: int = MOST_PIXELS, formats: Sequence[str] = SHARD_FORMATS) -> Image.Image:
    """The picture in a file's bytes in RGB: upright, in sRGB, transparency over white (``to_rgb``).

    Plain JPEG and PNG go to Pillow's decoders at once. That gives the same pixels as ``Image.open``, whose reading of
    headers and tiles takes twice as long as decoding a 64x64 JPEG.

    Args:
        most: pixels of a picture.
        formats: that Pillow may open.

    Raises:
        One of ``UNREADABLE``: a damaged file, one of another format, or one too large, ahead of decoding it.
    """
    split = _SPLIT.get(data[:2])
    plain, pixels, notes = split(data, most) if split else (None, data, {})
    if plain is not None and not notes:
        return plain if plain.mode == "RGB" else plain.convert("RGB")
    profile = notes.get("profile", b"")
    image = _open(pixels, profile, most, formats) if plain is None else _to_srgb(plain, profile)
    turn = _TURNS.get(_orientation(notes.get("exif", b""), notes.get("xmp", b"")))
    return image if turn is None else image.transpose(turn)


def _check_webp_size(head: bytes, most: int) -> None:
    """ValueError for a WebP file of more pixels, by its first 32 bytes: to open it takes the memory already."""
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return
    numbers = [
        int.from_bytes(head[at : at + size], "little") for at, size in ((24, 3), (27, 3), (21, 4), (26, 2), (28, 2))
    ]
    width, height = {
        b"VP8X": (numbers[0] + 1, numbers[1] + 1),
        b"VP8L": ((numbers[2] & 0x3FFF) + 1, (numbers[2] >> 14 & 0x3FFF) + 1),
        b"VP8 ": (numbers[3] & 0x3FFF, numbers[4] & 0x3FFF),
    }.get(head[12:16], (0, 0))
    if width * height > most:
        raise ValueError(f"{width}x{height} pixels are more than {most}")


# -- colours -----------------------------------------------------------------------------------------------------------


def to_rgb(image: Image.Image, profile: bytes = b"") -> Image.Image:
    """Convert any mode to RGB.

    Transparency is laid over white, as a browser page shows it; of 16 bits the high byte is kept.

    Args:
        profile: ICC profile of the colours, which go to sRGB by it; one that does not fit the mode is passed over.

    Raises:
        ValueError: 32-bit or signed integer grey, or float grey, whose range is unknown.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return _to_srgb(image, profile) if profile else image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        image = _eight_bits(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no fixed range; save it as 8- or 16-bit")
    if not image.has_transparency_data:
        return _to_srgb(image, profile)
    grey = image.mode in ("1", "L", "LA", "La")
    image = image.convert("RGBA")
    if profile:
        colours = _to_srgb(image.getchannel("R") if grey else image.convert("RGB"), profile)
        colours.putalpha(image.getchannel("A"))
        image = colours
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An opaque picture in RGB, by its profile if that can be used."""
    if profile:
        image = image.convert({"1": "L", "P": "RGB"}[image.mode]) if image.mode in ("1", "P") else image
        transform = _transform(profile, image.mode)
        if transform is not None:
            return transform.apply(image)
    return image if image.mode == "RGB" else image.convert("RGB")


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str):
    """ImageCms's way from a profile to sRGB, usable by several threads at once; None where there is nothing to do.

    That is so for a profile of another colour space or kind, for a broken one, and for sRGB itself, by any name.
    """
    from PIL import ImageChops, ImageCms

    fits = profile[16:20] == {"L": b"GRAY", "RGB": b"RGB ", "CMYK": b"CMYK"}.get(mode)
    if not fits or profile[12:16] not in (b"scnr", b"mntr", b"prtr", b"spac"):
        return None
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        steps = range(0, 256, 17)
        colours = bytes(level for red in steps for green in steps for blue in steps for level in (red, green, blue))
        probe = Image.frombytes("RGB", (64, 64), colours).convert(mode)
        change = ImageChops.difference(transform.apply(probe), probe.convert("RGB"))
    except (ImageCms.PyCMSError, *UNREADABLE):
        return None
    return transform if max(highest for _, highest in change.getextrema()) > 1 else None


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as L, or as LA where one of its levels is transparent; 12-bit and inverted TIFF too.

    A PGM's levels up to another maximum go to [0, 255] as Pillow scales those of 8 bits.
    """
    import numpy as np

    maximum, tags = 65535, getattr(image, "tag_v2", {})
    for tile in image.tile if image.mode == "I" else ():
        if isinstance(tile.args, tuple):  # a PGM: Pillow would scale each level to 16 bits
            maximum, codec = tile.args[-1], "raw" if tile.codec_name == "ppm" else tile.codec_name
            image.tile = [tile._replace(codec_name=codec, args="I;16B" if codec == "raw" else ("L", 65535))]
    image.load()
    numbers = np.asarray(image)
    if maximum == 65535:
        grey = (numbers >> tags.get(258, (16,))[0] - 8).astype(np.uint8)
    else:
        grey = np.rint(np.minimum(numbers, maximum) * (255 / maximum)).astype(np.uint8)
    result = Image.fromarray(~grey if tags.get(262) == 0 else grey)
    if "transparency" in image.info:
        result.putalpha(Image.fromarray(np.where(numbers == image.info["transparency"], 0, 255).astype(np.uint8)))
    return result


# -- files -------------------------------------------------------------------------------------------------------------


_Split = tuple[Image.Image | None, bytes, dict[str, bytes]]
"""A file taken apart: its pixels where Pillow's decoder has them already, or the file without what its pixels do not
need; and what it has of "exif", "xmp" and "profile"."""


def _open(data: bytes, profile: bytes, most: int, formats: Sequence[str]) -> Image.Image:
    """By ``Image.open``, in RGB; raises as ``decode_rgb``."""
    _check_webp_size(data[:32], most)
    try:
        opened = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:  # its message holds a memory address
        raise ValueError("not an image of a known format") from None
    with opened as image:
        width, height = image.size
        if width * height > most:
            raise ValueError(f"{width}x{height} pixels are more than {most}")
        if image.format == "PNG" and "transparency" in image.info:
            _fit_transparency(image, data)
        return to_rgb(image, profile)


def _fit_transparency(image: Image.Image, data: bytes) -> None:
    """Bring a PNG's transparent level from the file's depth to that which its pixels are decoded to."""
    level, raw = image.info["transparency"], image.tile[0].args
    if raw == "RGB;16B":
        import numpy as np

        with Image.open(io.BytesIO(data), formats=("PNG",)) as low:
            low.tile = [low.tile[0]._replace(args="RGB;16L")]  # low bytes, where Pillow takes the high ones
            low.load()
        image.load()
        clear = (np.asarray(image) == np.array(level) >> 8) & (np.asarray(low) == np.array(level) & 255)
        image.putalpha(Image.fromarray(np.where(clear.all(2), 0, 255).astype(np.uint8)))
        image.info.pop("transparency", None)
    elif image.mode == "RGB":
        image.info["transparency"] = tuple(each & 255 for each in level)
    elif image.mode == "L":
        image.info["transparency"] = {"L;2": (level & 3) * 85, "L;4": (level & 15) * 17}.get(raw, level & 255)


def _decoded(mode: str | None, size: tuple[int, int], most: int, data: bytes, decoder: str, option):
    """By one of Pillow's decoders; None where it meets a fault, so that the slow way judges and names it."""
    if mode is None or not 0 < size[0] * size[1] <= most:
        return None
    try:
        image = Image.new(mode, size, None)
        image.frombytes(data, decoder, (mode, option))
        return image
    except UNREADABLE:
        return None


def _orientation(exif: bytes, xmp: bytes) -> int:
    """As EXIF tells it, or XMP where EXIF does not; 1 where neither does. What is not in [1, 8] turns nothing."""
    prefix = exif.rfind(b"Exif\0", 0, 20)  # some writers leave it out, some put the offset of HEIF files in front of it
    start = prefix + 6 if prefix >= 0 else 0
    start += 4 if exif[start : start + 3] == bytes(3) else 0
    for tag, kind, count, value in _entries(exif, start):
        if tag == 0x112 and count == 1 and kind in (3, 4):  # a SHORT, or a LONG
            order = "little" if exif[start] == 0x49 else "big"
            return int.from_bytes(value[:2] if kind == 3 else value[:4], order)
    told = _XMP_ORIENTATION.search(xmp)
    return int(told[1]) if told else 1


# By head, how a TIFF structure tells where its first directory is, how long that is, and an entry of it.
_DIRECTORIES = {
    head: tuple(struct.Struct(head[:1].replace(b"I", b"<").replace(b"M", b">").decode() + each) for each in formats)
    for heads, formats in (((b"II*\0", b"MM\0*"), ("4xI", "H", "HHI4s")), ((b"II+\0", b"MM\0+"), ("8xQ", "Q", "HHQ8s")))
    for head in heads
}
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=\"|>)([1-8])")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _entries(data: bytes, start: int = 0) -> Iterator[tuple[int, int, int, bytes]]:
    """(tag, type, count, value or its offset) of a TIFF structure's first directory, as far as it goes."""
    if data[start : start + 4] not in _DIRECTORIES:
        return iter(())
    offset, length, entry = _DIRECTORIES[data[start : start + 4]]
    try:
        first = start + offset.unpack_from(data, start)[0]
        at = first + length.size
        table = data[at : at + entry.size * length.unpack_from(data, first)[0]]
    except (struct.error, OverflowError):
        return iter(())
    return entry.iter_unpack(table[: len(table) // entry.size * entry.size])


# -- JPEG --------------------------------------------------------------------------------------------------------------

_JPEG_MODES = {1: "L", 3: "RGB"}  # by number of components
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, Huffman coded
_JPEG_TABLES = (0xDB, 0xC4, 0xDD)
_XMP_HEAD = b"http://ns.adobe.com/xap/1.0/\0"


def _split_jpeg(data: bytes, most: int) -> _Split:
    """Comments and application segments are left out but those that tell libjpeg the colour space.

    What stands behind the frame's header is no metadata of the picture, as for Pillow's reading of profiles.
    """
    plain, notes, profile, spare = None, {}, {}, []
    at, stop, framed = 2, len(data) - 3, False
    while at < stop:
        marker = data[at + 1] if data[at] == 0xFF else 0
        end = at + 2 + (data[at + 2] << 8 | data[at + 3])
        if marker in _JPEG_TABLES:
            pass
        elif 0xE0 <= marker <= 0xFE:
            if marker == 0xE1 and not framed:
                if data.startswith(b"Exif\0", at + 4):
                    notes.setdefault("exif", data[at + 4 : end])
                elif data.startswith(_XMP_HEAD, at + 4):
                    notes.setdefault("xmp", data[at + 4 : end])
            elif marker == 0xE2 and not framed and data.startswith(b"ICC_PROFILE\0", at + 4) and end - at >= 18:
                profile[data[at + 16]] = data[at + 17 : end]
            if end - at < 16 or not data.startswith((b"JFIF\0", b"Adobe"), at + 4):
                spare.append((at, end))
        elif marker in _JPEG_FRAMES and not framed:
            framed = True
            if data[at + 4] == 8:
                size = data[at + 7] << 8 | data[at + 8], data[at + 5] << 8 | data[at + 6]
                plain = _decoded(_JPEG_MODES.get(data[at + 9]), size, most, data, "jpeg", "")
                if plain is not None:
                    break
        elif marker == 0xDA:
            break
        elif marker in (0, 0xFF) or 0xD0 <= marker <= 0xD9:  # junk, padding, or no length follows
            framed, end = True, data.find(b"\xff", at + 1)
            if end < 0:
                break
        at = end
    if profile and all(part[0] == len(profile) for part in profile.values()):
        notes["profile"] = b"".join(profile[number][1:] for number in sorted(profile))
    return plain, b"" if plain is not None else _without(data, spare), notes


def _without(data: bytes, spare: list[tuple[int, int]]) -> bytes:
    """A JPEG but for some spans, which are in order; an empty comment, as Pillow wants a marker behind the first."""
    starts, ends = [2, *(end for _, end in spare)], [*(start for start, _ in spare), len(data)]
    kept = (data[start:end] for start, end in zip(starts, ends, strict=True))
    return b"".join((b"\xff\xd8\xff\xfe\0\2", *kept))


# -- PNG ---------------------------------------------------------------------------------------------------------------

_PNG_HEAD = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
_PNG_MODES = {0: "L", 2: "RGB"}  # by colour type
_PNG_PIXELS = (b"IDAT", b"IHDR", b"IEND", b"PLTE", b"tRNS")
_PNG_NOTES = (b"eXIf", b"iCCP", b"iTXt", b"zTXt", b"tEXt")


def _split_png(data: bytes, most: int) -> _Split:
    """Chunks that no pixel needs are left out; of an animation that leaves the first picture."""
    plain, notes, chunks, pixels = None, {}, [], []
    mode = _plain_png_mode(data)
    kind, at, length = b"", 8, len(data)
    while at + 8 <= length and kind != b"IEND":
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if kind in _PNG_PIXELS:
            chunks.append((at, end))
            if kind == b"IDAT":
                pixels.append(data[at + 8 : end - 4])
            elif kind == b"tRNS":
                mode = None
        elif kind in _PNG_NOTES:
            _read_png_note(kind, data, at, end, notes)
        elif not kind.isalnum():
            chunks.append((at, length))
            break
        at = end
    if mode and kind == b"IEND":
        size = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
        plain = _decoded(mode, size, most, b"".join(pixels), "zip", 0)
    return plain, b"" if plain is not None else data[:8] + b"".join(data[at:end] for at, end in chunks), notes


def _plain_png_mode(data: bytes) -> str | None:
    """Of an 8-bit grey or RGB picture that is not interlaced; None for others and for a damaged header."""
    if data[:16] != _PNG_HEAD or data[24:25] != b"\x08" or data[26:29] != bytes(3):
        return None
    return _PNG_MODES.get(data[25]) if zlib.crc32(data[12:29]) == int.from_bytes(data[29:33], "big") else None


def _read_png_note(kind: bytes, data: bytes, at: int, end: int, notes: dict[str, bytes]) -> None:
    """Add what a chunk tells of orientation and colours, if it is whole and the first to tell it."""
    body = data[at + 8 : end - 4]
    if kind in (b"zTXt", b"tEXt") and not body.startswith(b"Raw profile type exif\0"):
        return
    if kind == b"iTXt" and not body.startswith(b"XML:com.adobe.xmp\0"):
        return
    if zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
        return
    if kind == b"eXIf":
        notes["exif"] = body
    elif kind == b"iCCP":
        notes.setdefault("profile", _inflate(body.partition(b"\0")[2][1:]))
    elif kind == b"iTXt" and "xmp" not in notes:
        text = body[20:].split(b"\0", 2)[-1]  # behind the names of language and keyword
        notes["xmp"] = _inflate(text) if body[18:19] == b"\1" else text
    elif "exif" not in notes:  # ImageMagick's way: hexadecimal digits, from the third line on
        text = _inflate(body[23:]) if kind == b"zTXt" else body[22:]
        with suppress(ValueError):
            notes["exif"] = bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("latin-1"))


def _inflate(data: bytes) -> bytes:
    """Unpacked, as far as it goes; empty where that is absurdly large."""
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(data, _MOST_NOTE_BYTES)
    except zlib.error:
        return b""
    return b"" if inflater.unconsumed_tail else text


# -- WebP, TIFF and GIF ------------------------------------------------------------------------------------------------

_WEBP_NOTES = {b"ICCP": ("profile", 0x20), b"EXIF": ("exif", 8), b"XMP ": ("xmp", 4)}
_WEBP_PIXELS = (b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L")


def _split_webp(data: bytes, most: int) -> _Split:
    """An extended file's metadata are left out, and the flags that announce them."""
    if data[8:16] != b"WEBPVP8X" or len(data) < 30:
        return None, data, {}
    notes, kept, at = {}, [b"WEBP"], 12
    stop = min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while at + 8 <= stop:
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 8 + size + size % 2
        name, flag = _WEBP_NOTES.get(kind, ("", 0))
        if at == 12:
            kept.append(data[at:20] + bytes([data[20] & ~0x2C]) + data[21:end])
        elif kind in _WEBP_PIXELS:
            kept.append(data[at : min(end, stop)])
        elif data[20] & flag:
            notes.setdefault(name, data[at + 8 : min(at + 8 + size, stop)])
        at = end
    body = b"".join(kept)
    return None, b"RIFF" + len(body).to_bytes(4, "little") + body, notes


_TIFF_PIXELS = frozenset((
    *range(256, 260), 262, 266, 273, *range(277, 280), 284, 292, 293, 317, *range(320, 326), 332, 338, 339, 347,
    *range(512, 522), *range(529, 533),
))  # fmt: skip
_TIFF_NOTES = {34675: "profile", 700: "xmp"}


def _split_tiff(data: bytes, most: int) -> _Split:
    """The first picture, with a directory at the end that holds the tags of its pixels alone."""
    order, big = "little" if data[:1] == b"I" else "big", 43 in data[2:4]
    wide = 8 if big else 4
    notes, kept = {"exif": data}, []
    for tag, kind, count, value in _entries(data):
        if tag in _TIFF_PIXELS:
            kept.append(b"".join((tag.to_bytes(2, order), kind.to_bytes(2, order), count.to_bytes(wide, order), value)))
        elif tag in _TIFF_NOTES and kind in (1, 7) and wide < count <= _MOST_NOTE_BYTES:
            at = int.from_bytes(value, order)
            notes.setdefault(_TIFF_NOTES[tag], data[at : at + count])
    if not kept:
        return None, data, {}
    table = len(kept).to_bytes(8 if big else 2, order) + b"".join(kept) + bytes(wide)
    pad = bytes(len(data) % 2)
    head = data[: 8 if big else 4] + (len(data) + len(pad)).to_bytes(wide, order)
    return None, b"".join((head, memoryview(data)[len(head) :], pad, table)), notes


def _split_gif(data: bytes, most: int) -> _Split:
    """Extensions ahead of the first picture are left out, but for those that tell its transparency."""
    at = 13 + (6 << (data[10] & 7) if data[10:11] >= b"\x80" else 0)
    kept = [data[:at]]
    while data[at : at + 1] == b"!":
        end = at + 2
        while data[end : end + 1] > b"\0":
            end += 1 + data[end]
        if data[at + 1 : at + 3] == b"\xf9\4":
            kept.append(data[at : end + 1])
        at = end + 1
    return None, b"".join((*kept, data[at:])), {}


# By a file's first two bytes; a function takes the file and the most pixels.
_SPLIT = {
    b"\xff\xd8": _split_jpeg,
    b"\x89P": _split_png,
    b"RI": _split_webp,
    b"II": _split_tiff,
    b"MM": _split_tiff,
    b"GI": _split_gif,
}
