"""One picture has one meaning wherever it is read, and faults of its metadata are none of its pixels."""

import io
import json
import struct
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import material
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from rdmd_fast import cli
from rdmd_fast.data import pictures
from rdmd_fast.data.pictures import UNREADABLE, decode_rgb, load_picture
from rdmd_fast.data.shards.shard_set import ShardSet

FORMATS = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}


def smooth(mode="RGB", size=(24, 16)):
    """A picture whose eight turns differ, of colours that every encoder keeps."""
    pixels = np.random.default_rng(0).integers(40, 216, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image, form, **options):
    return material.encoded(image, form, **FORMATS.get(form, {}) | options)


def decoded(data):
    """By the decoder of files, and by that of shards where they take the format."""
    pixels = np.asarray(load_picture(io.BytesIO(data)))
    if data[:4] in (b"\xff\xd8\xff\xe0", b"\xff\xd8\xff\xe1", b"\x89PNG", b"RIFF"):
        np.testing.assert_array_equal(np.asarray(decode_rgb(data)), pixels)
    return pixels


def opened(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def chunk(kind, body, crc=None):
    whole = material.png_chunk(kind, body)
    return whole if crc is None else whole[:-4] + struct.pack(">I", crc)


def png(header, pixels, *chunks, width=None):
    """Of IHDR's fields behind the size and of the bytes of rows, with chunks ahead of the pixels."""
    size = struct.pack(">II", width or pixels.shape[1], pixels.shape[0])
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    whole = [chunk(b"IHDR", size + bytes(header)), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole)


def in_png(*chunks, behind=False):
    """The smooth picture with chunks of one's own."""
    data = encoded(smooth(), "PNG")
    at = len(data) - 12 if behind else 33
    return data[:at] + b"".join(chunks) + data[at:]


def in_jpeg(marker, body, image=None):
    data = encoded(image or smooth(), "JPEG")
    return data[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + data[2:]


def tiff_structure(*entries, order="<", head=b"*"):
    mark = b"II*\0" if order == "<" else b"MM\0*"
    table = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries)
    return mark + struct.pack(order + "IH", 8, len(entries)) + table + bytes(4)


def turned(value, order="<", kind=3):
    return tiff_structure((0x112, kind, 1, struct.pack(order + ("H" if kind == 3 else "I"), value)), order=order)


# -- orientation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_every_orientation_is_that_which_pillow_transposes_by(form):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = orientation
        data = encoded(smooth(), form, exif=exif)
        with Image.open(io.BytesIO(data)) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        np.testing.assert_array_equal(decoded(data), expected)


@pytest.mark.parametrize("prefix", [b"", b"Exif\0\0", b"\0\0\0\6Exif\0\0", b"\0\0\0\0"])
@pytest.mark.parametrize(("order", "kind"), [("<", 3), (">", 3), ("<", 4), (">", 4)])
def test_orientation_is_read_in_either_byte_order_behind_any_prefix(prefix, order, kind):
    exif, upright = prefix + turned(6, order, kind), np.rot90(opened(encoded(smooth(), "PNG")), -1)
    np.testing.assert_array_equal(decoded(in_png(chunk(b"eXIf", exif))), upright)
    np.testing.assert_array_equal(decoded(in_png(chunk(b"eXIf", exif), behind=True)), upright)
    np.testing.assert_array_equal(decoded(encoded(smooth(), "WEBP", exif=exif)), upright)
    if prefix != b"":
        data = in_jpeg(0xE1, exif if prefix.startswith(b"Exif") else b"Exif\0\0" + exif)
        np.testing.assert_array_equal(decoded(data), np.rot90(opened(encoded(smooth(), "JPEG")), -1))


@pytest.mark.parametrize("value", [0, 1, 9, 300, 65535])
def test_an_orientation_of_no_meaning_turns_nothing(value):
    np.testing.assert_array_equal(
        decoded(in_jpeg(0xE1, b"Exif\0\0" + turned(value))), opened(encoded(smooth(), "JPEG"))
    )


@pytest.mark.parametrize("form", FORMATS)
def test_xmp_tells_the_orientation_where_exif_does_not(form):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    plain = encoded(smooth(), form)
    if form == "PNG":
        data = in_png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)))
    else:
        data = encoded(smooth(), form, **{"tiffinfo": {700: xmp}} if form == "TIFF" else {"xmp": xmp})
    np.testing.assert_array_equal(decoded(data), np.rot90(opened(plain), -1))


def test_imagemagicks_exif_in_a_text_chunk_turns_the_picture():
    text = f"\nexif\n{34:8}\n{(b'Exif' + bytes(2) + turned(6)).hex()}\n".encode()
    packed = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))
    for each in (packed, chunk(b"tEXt", b"Raw profile type exif\0" + text)):
        np.testing.assert_array_equal(decoded(in_png(each)), np.rot90(opened(encoded(smooth(), "PNG")), -1))


def test_foreign_shards_files_and_packed_sets_show_the_same_upright_picture(tmp_path, capsys):
    (tmp_path / "files").mkdir()
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/a.tar", "w") as tar:
        for number in range(2):
            path = tmp_path / f"files/{number}.jpg"
            path.write_bytes(in_jpeg(0xE1, b"Exif\0\0" + turned(6 + 2 * number), smooth(size=(24, 16))))
            tar.add(path, path.name)
    shards = ShardSet(tmp_path / "tars", cache_dir=tmp_path / "cache")
    assert shards.shape == (24, 16, 3)
    for number in range(2):
        np.testing.assert_array_equal(shards.read(number), np.asarray(load_picture(tmp_path / f"files/{number}.jpg")))
    for source in ("tars", "files"):
        assert (
            cli.main(["pack", str(tmp_path / source), "--out", str(tmp_path / f"{source}_set"), "--resolution", "16"])
            == 0
        )
    one, other = (ShardSet(tmp_path / f"{source}_set") for source in ("tars", "files"))
    for number in range(2):
        np.testing.assert_array_equal(one.read(number), other.read(number))
        np.testing.assert_array_equal(one.read(number), shards.read(number)[4:20])


# -- colours -----------------------------------------------------------------------------------------------------------

ADOBE = (0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)
DISPLAY_P3 = (0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)
WHITE = (0.9642, 1, 0.8249)


def xyz(*values):
    return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile_of(kind, space, connection, tags):
    """An ICC 2.2 profile."""
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78), b"wtpt": xyz(*WHITE)} | tags
    at, table, data = 132 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += name + struct.pack(">II", at + len(data), len(content))
        data += content
    body = struct.pack(">I", len(tags)) + table + data
    head = struct.pack(">I", 128 + len(body)) + b"none\x02\x20\0\0" + kind + space + connection
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + xyz(*WHITE)[8:]
    return head.ljust(128, b"\0") + body


def gamma(value):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def rgb_profile(primaries, exponent=2.19921875):
    tags = {name + b"XYZ": xyz(*primary) for name, primary in zip((b"r", b"g", b"b"), primaries, strict=True)}
    return profile_of(b"mntr", b"RGB ", b"XYZ ", tags | {name + b"TRC": gamma(exponent) for name in (b"r", b"g", b"b")})


def cmyk_profile():
    """Inks that take their colours away less than fully, by a table of two points an ink."""
    ramp = bytes(range(256))
    lab = [(255 - 40 * c - 60 * m - 20 * y - 120 * k, 128 - 30 * c + 40 * m, 128 - 30 * c + 50 * y)
           for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]  # fmt: skip
    matrix = b"".join(struct.pack(">i", 65536 * (number % 4 == 0)) for number in range(9))
    table = b"mft1\0\0\0\0\4\3\2\0" + matrix + ramp * 4 + bytes(value for each in lab for value in each) + ramp * 3
    return profile_of(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table})


GREY = profile_of(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": gamma(1.0)})
PROFILES = {"Adobe RGB": rgb_profile(ADOBE), "Display P3": rgb_profile(DISPLAY_P3), "gamma 1": rgb_profile(ADOBE, 1.0)}


def converted(image, profile, mode="RGB"):
    """What LittleCMS makes of opaque pixels."""
    profile, srgb = ImageCms.getOpenProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    return np.asarray(ImageCms.profileToProfile(image, profile, srgb, outputMode=mode)).astype(int)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", PROFILES)
def test_colours_go_to_srgb_by_their_profile(form, name):
    data = encoded(smooth(), form, icc_profile=PROFILES[name])
    expected = converted(Image.fromarray(opened(data)), PROFILES[name])
    assert np.abs(decoded(data) - expected).max() <= 1
    assert np.abs(expected - opened(data)).max() > 4


@pytest.mark.parametrize(("mode", "form"), [("L", "JPEG"), ("L", "PNG"), ("L", "TIFF"), ("1", "TIFF"), ("I;16", "PNG")])
def test_grey_goes_to_srgb_by_a_grey_profile(mode, form):
    image = smooth("L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 256 + 7)
    data = encoded(image.convert("1") if mode == "1" else image, form, icc_profile=GREY)
    grey = Image.fromarray(opened(encoded(smooth("L").convert("1") if mode == "1" else smooth("L"), form))[..., 0])
    assert np.abs(decoded(data) - converted(grey, GREY)).max() <= 1


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_inks_go_to_srgb_by_their_profile(form):
    data = encoded(smooth("CMYK"), form, icc_profile=cmyk_profile())
    with Image.open(io.BytesIO(data)) as image:
        expected = converted(image, cmyk_profile())
    assert np.abs(decoded(data) - expected).max() <= 1
    assert np.abs(expected - opened(data)).max() > 20


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_laid_over_white_behind_the_profile(form):
    alpha = np.tile(np.linspace(0, 255, 24).astype(np.uint8), (16, 1))
    image = smooth()
    image.putalpha(Image.fromarray(alpha))
    options = {"exact": True} if form == "WEBP" else {}
    got = decoded(encoded(image, form, icc_profile=PROFILES["Adobe RGB"], **options))
    share = alpha[..., None] / 255
    expected = converted(image.convert("RGB"), PROFILES["Adobe RGB"]) * share + 255 * (1 - share)
    assert np.abs(got - expected).max() <= 1.5


def test_grey_with_transparency_goes_by_a_grey_profile():
    image = smooth("LA")
    image.putalpha(Image.new("L", image.size, 128))
    expected = converted(image.convert("L"), GREY) * (128 / 255) + 127
    assert np.abs(decoded(encoded(image, "PNG", icc_profile=GREY)) - expected).max() <= 1.5


def test_palettes_go_by_the_profile_as_their_colours_do():
    image = smooth().quantize(32)
    data = encoded(image, "PNG", icc_profile=PROFILES["Display P3"])
    assert np.abs(decoded(data) - converted(image.convert("RGB"), PROFILES["Display P3"])).max() <= 1


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("profile", [
    GREY, cmyk_profile(), PROFILES["Adobe RGB"][:200], b"no profile", b"x" * 200,
    PROFILES["Adobe RGB"].replace(b"rXYZ", b"qXYZ"), profile_of(b"link", b"RGB ", b"RGB ", {}),
], ids=["grey", "inks", "cut", "short", "noise", "no red", "link"])  # fmt: skip
def test_a_profile_that_cannot_be_used_leaves_the_pixels(form, profile):
    data = encoded(smooth(), form, icc_profile=profile)
    np.testing.assert_array_equal(decoded(data), opened(data))


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_picture_in_srgb_by_name_is_decoded_at_once(form, monkeypatch):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encoded(smooth(), form, icc_profile=profile)
    expected = opened(data)
    monkeypatch.setattr(Image, "open", None)
    np.testing.assert_array_equal(np.asarray(decode_rgb(data)), expected)
    assert pictures._transform(profile, "RGB") is None


def test_a_profile_in_several_segments_is_put_together_in_their_order():
    parts = [PROFILES["Adobe RGB"][:150], PROFILES["Adobe RGB"][150:300], PROFILES["Adobe RGB"][300:]]
    data = encoded(smooth(), "JPEG")
    for number in (1, 3, 2):
        body = b"ICC_PROFILE\0" + bytes([number, 3]) + parts[number - 1]
        data = data[:2] + b"\xff\xe2" + struct.pack(">H", len(body) + 2) + body + data[2:]
    assert np.abs(decoded(data) - converted(Image.fromarray(opened(data)), PROFILES["Adobe RGB"])).max() <= 1


def test_threads_share_a_profile():
    data = encoded(smooth(size=(200, 200)), "JPEG", icc_profile=PROFILES["Display P3"])
    pictures._transform.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        first, *others = pool.map(lambda _: np.asarray(decode_rgb(data)), range(32))
    assert all(np.array_equal(first, other) for other in others)


def test_gamma_and_primaries_of_a_png_leave_its_pixels():
    chunks = chunk(b"gAMA", struct.pack(">I", 100000)), chunk(b"cHRM", struct.pack(">8I", *[30000] * 8))
    np.testing.assert_array_equal(decoded(in_png(*chunks, chunk(b"cICP", bytes([12, 13, 0, 1])))), np.asarray(smooth()))


# -- metadata ----------------------------------------------------------------------------------------------------------

NOISE = np.random.default_rng(1).bytes(300)
PNG_FAULTS = {
    "text of 2 MiB unpacked": [chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2 << 20)))],
    "text of 65 MiB in all": [chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20)))] * 66,
    "text in an unknown packing": [chunk(b"zTXt", b"a\0\7abc")],
    "international text of 2 MiB": [chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(2 << 20)))],
    "profile in an unknown packing": [chunk(b"iCCP", b"a\0\7abc")],
    "profile of 12 MiB": [chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(12 << 20)))],
    "empty profile": [chunk(b"iCCP", b"")],
    "short gAMA, cHRM, sRGB, pHYs": [chunk(kind, b"\0") for kind in (b"gAMA", b"cHRM", b"sRGB", b"pHYs")],
    "empty sRGB": [chunk(b"sRGB", b"")],
    "wrong checksum": [chunk(b"tEXt", b"a\0b", 1), chunk(b"pHYs", bytes(9), 2)],
    "orientation of a wrong checksum": [chunk(b"eXIf", turned(6), 3)],
    "broken EXIF": [chunk(b"eXIf", NOISE)],
    "EXIF cut off": [chunk(b"eXIf", turned(6)[:15])],
    "EXIF that points elsewhere": [chunk(b"eXIf", b"II*\0" + struct.pack("<I", 2**32 - 1))],
    "broken EXIF in text": [chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 3\nzz")],
    "broken XMP": [chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + NOISE)],
    "broken animation": [chunk(b"acTL", b"\0"), chunk(b"fcTL", bytes(26))],
    "a private chunk": [chunk(b"prVt", NOISE)],
}  # fmt: skip


@pytest.mark.parametrize("fault", PNG_FAULTS)
def test_chunks_that_no_pixel_needs_may_be_broken(fault):
    for data in (in_png(*PNG_FAULTS[fault]), in_png(*PNG_FAULTS[fault], behind=True)):
        np.testing.assert_array_equal(decoded(data), np.asarray(smooth()))
    slow = encoded(smooth("P"), "PNG")
    data = slow[:33] + b"".join(PNG_FAULTS[fault]) + slow[33:]
    np.testing.assert_array_equal(decoded(data), opened(slow))


SLOPPY = tiff_structure((0x112, 3, 1, b"\6\0"), (0x128, 5, 1, b"\x26\0\0\0")) + struct.pack("<II", 2, 1)
JPEG_FAULTS = {
    "EXIF with a rational unit": (0xE1, b"Exif\0\0" + SLOPPY, 6),
    "broken EXIF": (0xE1, b"Exif\0\0" + NOISE, 1),
    "empty EXIF": (0xE1, b"Exif\0\0", 1),
    "EXIF cut off": (0xE1, b"Exif\0\0II*\0\x08\0", 1),
    "broken XMP": (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + NOISE, 1),
    "short JFIF": (0xE0, b"JFIF", 1),
    "short Adobe": (0xEE, b"Adobe", 1),
    "one of two profile parts": (0xE2, b"ICC_PROFILE\0\1\2" + NOISE, 1),
    "profile without number": (0xE2, b"ICC_PROFILE\0", 1),
    "several pictures, broken": (0xE2, b"MPF\0" + NOISE, 1),
    "broken Photoshop resources": (0xED, b"Photoshop 3.0\0008BIM\4\4\0\0\xff\xff\xff\xff", 1),
    "comment": (0xFE, NOISE, 1),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
@pytest.mark.parametrize("fault", JPEG_FAULTS)
def test_segments_that_no_pixel_needs_may_be_broken(fault, mode):
    marker, body, orientation = JPEG_FAULTS[fault]
    pixels = opened(encoded(smooth(mode), "JPEG"))
    expected = np.rot90(pixels, -1) if orientation == 6 else pixels
    np.testing.assert_array_equal(decoded(in_jpeg(marker, body, smooth(mode))), expected)


@pytest.mark.parametrize("exif", [NOISE, b"", b"\0\0\0\6Exif\0\0" + turned(1), b"Exif\0\0" + SLOPPY[:20]])
def test_a_webp_with_broken_metadata_keeps_its_pixels(exif):
    data = encoded(smooth(), "WEBP", exif=exif or b"x", xmp=NOISE, icc_profile=NOISE)
    np.testing.assert_array_equal(decoded(data), np.asarray(smooth()))
    np.testing.assert_array_equal(decoded(data[:-100]), np.asarray(smooth()))  # of the XMP packet, which comes last


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "jpeg"])
@pytest.mark.parametrize("entry", [
    (282, 2, 4, b"abc\0"), (296, 5, 1, b"\xff\xff\xff\xff"), (305, 2, 100000, b"\xff\xff\xff\x7f"),
    (34665, 4, 1, b"\xff\xff\xff\x7f"), (34675, 7, 500, b"\xff\xff\xff\x7f"), (700, 1, 2**31, b"\0\0\0\0"),
    (60000, 99, 1, b"abcd"),
])  # fmt: skip
def test_tiff_tags_that_no_pixel_needs_may_be_broken(entry, compression):
    data = encoded(smooth(), "TIFF", compression=compression)
    at = struct.unpack("<I", data[4:8])[0]
    count = struct.unpack("<H", data[at : at + 2])[0]
    table = data[at + 2 : at + 2 + 12 * count] + struct.pack("<HHI", *entry[:3]) + entry[3] + struct.pack("<I", 2**31)
    data += bytes(len(data) % 2)
    broken = data[:4] + struct.pack("<I", len(data)) + data[8:] + struct.pack("<H", count + 1) + table
    np.testing.assert_array_equal(decoded(broken), opened(data))


@pytest.mark.parametrize("extension", [
    b"!\xff\x0bNETSCAPE2.0\0", b"!\xff\x0bNETSCAPE2.0\1\1\0", b"!\xfe\0", b"!\xf9\0", b"!\xf9\1\0\0", b"!\x77\2ab\0",
])  # fmt: skip
def test_gif_extensions_that_no_pixel_needs_may_be_broken(extension):
    data = encoded(smooth(), "GIF", comment=NOISE)
    at = 13 + (6 << (data[10] & 7))
    np.testing.assert_array_equal(decoded(data[:at] + extension + data[at:]), opened(data))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_that_are_cut_off_are_refused_with_or_without_metadata(form, mode):
    exif = Image.Exif()
    exif[0x112] = 6
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)).convert(mode)
    for options in ({}, {"exif": exif, "icc_profile": PROFILES["Adobe RGB"]}):
        data = encoded(image, form, **options)
        at = len(data) - 1500 if form != "TIFF" or not options else 1500
        with pytest.raises(UNREADABLE):
            load_picture(io.BytesIO(data[:at]))
        with pytest.raises(UNREADABLE):
            decode_rgb(data[:at])


def test_flipped_bytes_in_a_pngs_pixels_are_refused_behind_any_metadata():
    data = bytearray(in_png(chunk(b"eXIf", turned(6)), chunk(b"tEXt", b"a\0b", 1)))
    at = data.index(b"IDAT") + 20
    data[at : at + 40] = bytes(40)
    with pytest.raises(UNREADABLE):
        decode_rgb(bytes(data))


def test_commands_take_pictures_of_broken_metadata(tmp_path, rdmd, translate):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(in_jpeg(0xE1, b"Exif\0\0" + SLOPPY, smooth(size=(8, 8))))
    (tmp_path / "in/b.png").write_bytes(in_png(*PNG_FAULTS["text of 2 MiB unpacked"], *PNG_FAULTS["wrong checksum"]))
    assert rdmd("pack", tmp_path / "in", "--out", tmp_path / "set", "--resolution", 8).status == 0
    assert translate(tmp_path / "in", tmp_path / "out").status == 0
    folders = ("--outputs", tmp_path / "in", "--source", tmp_path / "set", "--target", tmp_path / "out")
    assert rdmd("evaluate", *folders, "--out", tmp_path / "report.json").status == 0
    row = json.loads((tmp_path / "report.json").read_text())["rows"][-1]
    assert row["mse_per_pixel"] == 0


# -- 16 bits -----------------------------------------------------------------------------------------------------------


def deep(shape=(16, 24)):
    return np.random.default_rng(3).integers(0, 65536, shape, dtype=np.uint16)


def pgm(numbers, maximum, plain=False):
    head = b"P%d\n%d %d\n%d\n" % (2 if plain else 5, numbers.shape[1], numbers.shape[0], maximum)
    return head + (" ".join(map(str, numbers.ravel())).encode() if plain else numbers.astype(">u2").tobytes())


@pytest.mark.parametrize("plain", [False, True])
def test_a_pgm_of_16_bits_is_read_as_a_png_of_16_bits_is(plain):
    numbers = deep()
    as_png = decoded(encoded(Image.fromarray(numbers), "PNG"))
    np.testing.assert_array_equal(decoded(pgm(numbers, 65535, plain)), as_png)
    np.testing.assert_array_equal(as_png[..., 0], numbers >> 8)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("maximum", [1023, 256, 4095, 65534])
def test_a_pgm_is_scaled_by_its_maximum(maximum, plain):
    numbers = deep() % (maximum + 1)
    numbers[0, :2] = 0, maximum
    got = decoded(pgm(numbers, maximum, plain))
    np.testing.assert_array_equal(got[..., 2], np.rint(numbers / maximum * 255))


@pytest.mark.parametrize(("header", "channels"), [((16, 0, 0, 0, 0), 1), ((16, 2, 0, 0, 0), 3)])
def test_a_transparent_level_of_16_bits_is_laid_over_white(header, channels):
    numbers = deep((16, 24, channels))
    level = numbers[5, 7]
    numbers[6, 8], numbers[9, 9] = level, level ^ 1  # one alike, one that differs in the lowest bits
    got = decoded(png(header, numbers.astype(">u2"), chunk(b"tRNS", level.astype(">u2").tobytes())))
    expected = np.broadcast_to(numbers >> 8, (16, 24, 3)).copy()
    expected[5, 7] = expected[6, 8] = 255
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("depth", "level"), [(2, 3), (2, 1), (4, 9), (8, 77)])
def test_a_transparent_level_of_few_bits_is_laid_over_white(depth, level):
    numbers = np.random.default_rng(4).integers(0, 1 << depth, (16, 24), dtype=np.uint8)
    numbers[3, 3] = level
    bits = np.unpackbits(numbers[..., None], axis=2)[..., 8 - depth :].reshape(16, -1)
    rows = np.packbits(bits, axis=1)
    got = decoded(png((depth, 0, 0, 0, 0), rows, chunk(b"tRNS", struct.pack(">H", level)), width=24))
    expected = np.where(numbers == level, 255, numbers * (255 // ((1 << depth) - 1)))
    np.testing.assert_array_equal(got[..., 0], expected)


@pytest.mark.parametrize("white", [0, 1])
@pytest.mark.parametrize("order", ["<", ">"])
def test_grey_tiffs_of_16_bits_are_read_as_those_of_8_are(order, white):
    numbers = deep()
    entries = [
        (256, 24),
        (257, 16),
        (258, 16),
        (259, 1),
        (262, white),
        (273, 8),
        (277, 1),
        (278, 16),
        (279, numbers.nbytes),
    ]
    table = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in entries)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    data = mark + struct.pack(order + "I", 8 + numbers.nbytes) + numbers.astype(order + "u2").tobytes()
    data += struct.pack(order + "H", len(entries)) + table + bytes(4)
    if order == ">" and white == 0:
        with pytest.raises(UNREADABLE):  # Pillow knows no such files
            decoded(data)
        return
    np.testing.assert_array_equal(decoded(data)[..., 1], numbers >> 8 if white else 255 - (numbers >> 8))


@pytest.mark.parametrize("data", [
    b"Pf\n2 1\n-1.0\n" + bytes(8), encoded(Image.new("F", (2, 2)), "TIFF"), encoded(Image.new("I", (2, 2)), "TIFF"),
], ids=["PFM", "float TIFF", "32-bit TIFF"])  # fmt: skip
def test_ranges_that_no_file_tells_stay_refused(data):
    with pytest.raises(ValueError, match="no fixed range"):
        load_picture(io.BytesIO(data))


def test_pillows_limits_of_text_are_what_is_got_round():
    """Without our taking apart of the file Pillow refuses it."""
    data = in_png(*PNG_FAULTS["text of 2 MiB unpacked"])
    assert PngImagePlugin.MAX_TEXT_CHUNK < 2 << 20
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"):
        Image.open(io.BytesIO(data)).load()
