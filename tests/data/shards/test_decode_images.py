"""Decoding of plain files by Pillow's decoders at once gives what ``Image.open`` gives."""

import io

import numpy as np
import pytest
from PIL import Image

from rdmd_fast.data.shards import decode_images
from rdmd_fast.data.shards.decode_images import UNREADABLE, decode_rgb, to_rgb

PLAIN = [
    ("RGB", "JPEG", {}), ("RGB", "JPEG", {"quality": 95, "subsampling": 0, "progressive": True}),
    ("RGB", "JPEG", {"quality": 30, "restart_marker_rows": 1, "comment": b"a comment"}), ("L", "JPEG", {}),
    ("RGB", "PNG", {}), ("L", "PNG", {"compress_level": 0}), ("RGB", "PNG", {"optimize": True}),
]  # fmt: skip
OTHER = [
    ("CMYK", "JPEG", {}), ("RGBA", "PNG", {}), ("LA", "PNG", {}), ("P", "PNG", {}), ("1", "PNG", {}),
    ("I;16", "PNG", {}), ("RGB", "PNG", {"transparency": (1, 2, 3)}), ("RGB", "WEBP", {}),
]  # fmt: skip


def file_of(mode, form, options, size=(37, 21), seed=0):
    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(size)
    buffer = io.BytesIO()
    (image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)).save(buffer, form, **options)
    return buffer.getvalue()


def opened(data):
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
        return np.asarray(to_rgb(image))


def outcome(decode, data):
    try:
        return np.asarray(decode(data))
    except UNREADABLE:
        return None


@pytest.mark.parametrize(("mode", "form", "options"), PLAIN + OTHER)
@pytest.mark.parametrize("size", [(37, 21), (1, 1), (64, 64)])
def test_pixels_are_those_that_pillow_opens(monkeypatch, mode, form, options, size):
    data = file_of(mode, form, options, size)
    expected = opened(data)
    if (mode, form, options) in PLAIN:
        monkeypatch.setattr(Image, "open", None)  # the plain way must do
    image = decode_rgb(data)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), expected)


def test_exif_and_other_chunks_are_stepped_over(monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [file_of("RGB", form, {"exif": exif, "dpi": (72, 72)}) for form in ("JPEG", "PNG")]
    expected = [opened(data) for data in files]
    monkeypatch.setattr(Image, "open", None)
    for data, pixels in zip(files, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(decode_rgb(data)), pixels)


def test_several_idat_chunks_are_one_stream():
    data = file_of("RGB", "PNG", {"compress_level": 0}, size=(300, 200))
    assert data.count(b"IDAT") > 1
    np.testing.assert_array_equal(np.asarray(decode_rgb(data)), opened(data))


@pytest.mark.parametrize(("mode", "form", "options"), [PLAIN[0], PLAIN[1], PLAIN[4]])
def test_damaged_files_decode_to_what_pillow_opens_or_not_at_all(mode, form, options):
    whole = file_of(mode, form, options)
    random = np.random.default_rng(1)
    same = lost = 0
    for _ in range(400):
        data = bytearray(whole)
        if random.random() < 0.3:
            del data[int(random.integers(len(data))) :]
        else:
            data[int(random.integers(len(data)))] ^= int(random.integers(1, 256))
        ours, theirs = outcome(decode_rgb, bytes(data)), outcome(opened, bytes(data))
        if theirs is not None:
            assert ours is not None and np.array_equal(ours, theirs)
            same += 1
        lost += ours is None
    assert same > 4 and lost > 20


def test_too_large_pictures_are_refused_before_they_take_memory(monkeypatch):
    monkeypatch.setattr(decode_images, "MOST_PIXELS", 200)
    for form in ("JPEG", "PNG", "WEBP"):
        with pytest.raises(ValueError, match="pixels are more than 200"):
            decode_rgb(file_of("RGB", form, {}))
