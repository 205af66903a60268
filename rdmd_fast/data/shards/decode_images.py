"""From the bytes of a PNG, JPEG or WebP to RGB pixels. Imported by decoding workers: no numpy here, nor torch."""

import io
import struct
import warnings
import zlib

from PIL import Image

# What Pillow and NumPy raise for files that are broken, empty, cut short, absurdly large or of another kind.
UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, OverflowError, MemoryError, AttributeError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)

MOST_PIXELS = 1 << 24
"""Of an image in a shard, 4096 x 4096: a file of a few KiB can ask for thousands of times as much."""

warnings.filterwarnings("ignore", module=r"PIL\.")  # an odd file is refused, or read without a word

_PNG_HEAD = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
_PNG_MODES = {0: "L", 2: "RGB"}  # by colour type
_JPEG_MODES = {1: "L", 3: "RGB"}  # by number of components
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, Huffman coded


def decode_rgb(data: bytes) -> Image.Image:
    """The picture in a PNG, JPEG or WebP file, its mode turned to RGB by ``to_rgb``.

    Plain files go to Pillow's decoders at once. That gives the same pixels as ``Image.open``, whose reading of
    headers, metadata and tiles takes twice as long as decoding a 64x64 JPEG.

    Raises:
        One of ``UNREADABLE``: a damaged file, one of another format, or one too large, ahead of decoding it.
    """
    plain = _plain_jpeg(data) or _plain_png(data)
    if plain is not None:
        return plain if plain.mode == "RGB" else plain.convert("RGB")
    check_webp_size(data[:32], MOST_PIXELS)
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise ValueError(f"{width}x{height} pixels are more than {MOST_PIXELS}")
        return to_rgb(image)


def check_webp_size(head: bytes, most: int) -> None:
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


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB.

    Transparency is laid over white, as a browser page shows it; 16-bit grey keeps its high byte.

    Raises:
        ValueError: 32-bit integer or float grey, whose range is unknown.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I;16"):
        import numpy as np

        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no fixed range; save it as 8- or 16-bit")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _plain_jpeg(data: bytes) -> Image.Image | None:
    """An 8-bit grey or three-component JPEG that decodes without a fault."""
    if data[:2] != b"\xff\xd8":
        return None
    at, length = 2, len(data)
    while at + 10 <= length and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _JPEG_FRAMES:
            mode = _JPEG_MODES.get(data[at + 9]) if data[at + 4] == 8 else None
            size = data[at + 7] << 8 | data[at + 8], data[at + 5] << 8 | data[at + 6]
            return _decoded(mode, size, data, "jpeg", "")
        # Only tables, comments and application data may stand before: all of them tell their length.
        if not (0xE0 <= marker <= 0xFE or marker in (0xC4, 0xDB, 0xDD)):
            return None
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None


def _plain_png(data: bytes) -> Image.Image | None:
    """An 8-bit grey or RGB PNG, neither interlaced nor transparent nor animated, that decodes without a fault."""
    if data[:16] != _PNG_HEAD or data[24:25] != b"\x08" or data[26:29] != bytes(3):
        return None
    if zlib.crc32(data[12:29]) != int.from_bytes(data[29:33], "big"):
        return None
    parts, at, length = [], 33, len(data)
    while at + 12 <= length:
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if kind == b"IDAT":
            parts.append(data[at + 8 : at + 8 + size])
        elif kind == b"IEND":
            size = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
            return _decoded(_PNG_MODES.get(data[25]), size, b"".join(parts), "zip", 0)
        elif kind in (b"tRNS", b"acTL") or size > length:
            return None
        at += 12 + size
    return None


def _decoded(mode: str | None, size: tuple[int, int], data: bytes, decoder: str, option) -> Image.Image | None:
    """By one of Pillow's decoders; None where it meets a fault, so that the slow way judges and names it."""
    if mode is None or not 0 < size[0] * size[1] <= MOST_PIXELS:
        return None
    try:
        return Image.frombytes(mode, size, data, decoder, mode, option)
    except UNREADABLE:
        return None
