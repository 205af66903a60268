"""What a picture decodes to; plain files by Pillow's decoders at once give what ``Image.open`` gives."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from rdmd_fast.data.pictures import MOST_FILE_PIXELS, UNREADABLE, decode_rgb, load_image, to_rgb

PLAIN = [
    ("RGB", "JPEG", {}),
    ("RGB", "JPEG", {"quality": 95, "subsampling": 0, "progressive": True}),
    ("RGB", "JPEG", {"quality": 30, "restart_marker_rows": 1, "comment": b"a comment"}),
    ("L", "JPEG", {}),
    ("RGB", "PNG", {}),
    ("L", "PNG", {"compress_level": 0}),
    ("RGB", "PNG", {"optimize": True}),
]
OTHER = [
    ("CMYK", "JPEG", {}),
    ("RGBA", "PNG", {}),
    ("LA", "PNG", {}),
    ("P", "PNG", {}),
    ("1", "PNG", {}),
    ("I;16", "PNG", {}),
    ("RGB", "PNG", {"transparency": (1, 2, 3)}),
    ("RGB", "WEBP", {}),
]


def random_image(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = random_image(8, 8)
    # How each orientation stores an upright picture: the EXIF standard's transformations, inverted.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(load_image(tmp_path / "turned.png", 8), upright)


def test_grey_images_repeat_in_three_channels(tmp_path):
    grey = random_image(8, 8, 1)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(load_image(tmp_path / "grey.png", 8), np.repeat(grey[..., None], 3, axis=2))


def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path):
    deep = np.random.default_rng(1).integers(0, 65536, (8, 8), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(load_image(tmp_path / "deep.png", 8)[..., 1], deep >> 8)


def test_transparency_is_laid_over_white(tmp_path):
    rgba = random_image(8, 8, 4)
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(load_image(tmp_path / "alpha.png", 8) - expected).max() <= 1


def test_palette_images_show_their_colours_and_white_where_transparent(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 2), 1)
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=0)
    plain, clear = load_image(tmp_path / "plain.png", 4), load_image(tmp_path / "clear.png", 4)
    assert plain[0, 0].tolist() == [10, 20, 30] and plain[2, 1].tolist() == [200, 100, 50]
    assert clear[0, 0].tolist() == [255, 255, 255] and clear[2, 1].tolist() == [200, 100, 50]


def test_float_grey_is_refused():
    with pytest.raises(ValueError, match="mode F"):
        to_rgb(Image.new("F", (2, 2)))


@pytest.mark.parametrize(("height", "width"), [(12, 20), (20, 12), (13, 20)])
def test_the_central_square_is_kept(tmp_path, height, width):
    pixels = random_image(height, width)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    np.testing.assert_array_equal(load_image(tmp_path / "wide.png", side), pixels[top : top + side, left : left + side])


def test_shrinking_averages_instead_of_skipping_pixels(tmp_path):
    checkered = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    Image.fromarray(checkered.astype(np.uint8)).save(tmp_path / "fine.png")
    assert np.abs(load_image(tmp_path / "fine.png", 8).astype(int) - 127).max() <= 3


def test_a_given_crop_is_central_and_refused_where_it_does_not_fit(tmp_path):
    pixels = random_image(30, 20)
    Image.fromarray(pixels).save(tmp_path / "tall.png")
    np.testing.assert_array_equal(load_image(tmp_path / "tall.png", 12, crop=12), pixels[9:21, 4:16])
    with pytest.raises(ValueError, match="20x30 pixels are too few"):
        load_image(tmp_path / "tall.png", 12, crop=21)


def test_other_formats_are_not_opened_whatever_their_names(tmp_path, monkeypatch):
    """Pillow would start Ghostscript to read an EPS file."""
    started = []
    monkeypatch.setattr("subprocess.check_call", lambda *arguments, **_: started.append(arguments))
    monkeypatch.setattr("subprocess.Popen", lambda *arguments, **_: started.append(arguments))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(ValueError, match="known format"):
        load_image(tmp_path / "a.png", 8)
    assert not started


@pytest.mark.filterwarnings("ignore:Image size")  # which pytest shows whatever the module has set
def test_an_image_of_too_many_pixels_is_refused_ahead_of_decoding(tmp_path):
    header = b"IHDR" + struct.pack(">IIBBBBB", 14_000, 14_000, 8, 2, 0, 0, 0)
    chunks = (header, b"IDAT" + zlib.compress(b""), b"IEND")
    framed = [struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) for body in chunks]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))
    with pytest.raises(UNREADABLE, match="196000000 pixels"):
        load_image(tmp_path / "a.png", 8)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_large_photos_are_packed(tmp_path, monkeypatch):
    assert MOST_FILE_PIXELS > 108_000_000  # the largest sensors of telephones
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 50)
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 8).shape == (8, 8, 3)


@pytest.mark.parametrize("lossless", [True, False])
def test_a_webp_of_too_many_pixels_is_refused_before_it_is_opened(tmp_path, monkeypatch, lossless):
    animated = [Image.new("RGB", (300, 200), colour) for colour in ("red", "blue")]
    animated[0].save(tmp_path / "a.webp", lossless=lossless)
    animated[0].save(tmp_path / "b.webp", lossless=lossless, save_all=True, append_images=animated[1:])
    monkeypatch.setattr("rdmd_fast.data.pictures.MOST_FILE_PIXELS", 59_999)
    monkeypatch.setattr("rdmd_fast.data.pictures.Image.open", None)
    for name in ("a.webp", "b.webp"):
        with pytest.raises(ValueError, match="300x200 pixels"):
            load_image(tmp_path / name, 8)


def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match="not a regular file"):
        load_image(tmp_path / "a.png", 8)


def file_of(mode, form, options, size=(37, 21), seed=0):
    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(size)
    buffer = io.BytesIO()
    (image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)).save(buffer, form, **options)
    return buffer.getvalue()


def opened(data):
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
        return np.asarray(to_rgb(ImageOps.exif_transpose(image)))


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


def test_plain_files_with_metadata_are_not_opened(monkeypatch):
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


def test_too_large_pictures_are_refused_before_they_take_memory():
    for form in ("JPEG", "PNG", "WEBP"):
        with pytest.raises(ValueError, match="pixels are more than 200"):
            decode_rgb(file_of("RGB", form, {}), most=200)
