"""``rdmd translate`` on folders and shards, with generators whose maps are known."""

import signal
import threading
import time

import material
import numpy as np
import pytest
import torch
from material import error_line, files_of, pixels_of, save_images, write_files
from PIL import Image

from rdmd_fast import cli, load_generator
from rdmd_fast.model_files.export_format import write_export
from rdmd_fast.processes.devices import pick_devices


def export(folder, brighter: float | None):
    """A generator G(x) = x + ``brighter`` of 8×8 images, or one of random weights."""
    config, network = material.generator_of(material.small_unet(1, 2), (3, 8, 8))
    weights = network.state_dict()
    for name in weights:
        if "aux_conv" in name:
            scale = 0.2 if brighter is None else 0.0
            weights[name] = scale * torch.randn_like(weights[name])
        if name.endswith("aux_conv.bias") and brighter is not None:
            weights[name] = torch.full_like(weights[name], brighter)
    write_export(folder, config, weights)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    shifts = {"same": 0.0, "lighter": 0.2, "any": None}
    return {name: export(folder / name, brighter) for name, brighter in shifts.items()}


def picture(number: int, height: int, width: int) -> np.ndarray:
    return material.random_pixels(number, height, width, 3)


@pytest.fixture
def photos(tmp_path):
    """name -> pixels, upright, of a folder ``in``."""
    sizes = {"a.png": (8, 8), "deep/b.c.png": (21, 13), "deep/er/d.png": (5, 30), "e.png": (40, 9)}
    photos = {name: picture(number, *size) for number, (name, size) in enumerate(sizes.items())}
    save_images(tmp_path / "in", photos)
    return photos


def translate(model, source, output, *extra) -> int:
    arguments = ["--model", model, "--input", source, "--output", output, "--device", "cpu", *extra]
    return cli.main(["translate", *map(str, arguments)])


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_tiles_of_the_identity_are_the_input(models, photos, tmp_path, batch_size):
    arguments = "--size", "tiles", "--batch-size", batch_size
    assert translate(models["same"], tmp_path / "in", tmp_path / "out", *arguments) == 0
    assert files_of(tmp_path / "out").keys() == photos.keys()
    for name, pixels in photos.items():
        np.testing.assert_array_equal(pixels_of(tmp_path / "out" / name), pixels)


def test_tiles_of_an_image_are_by_themselves_and_few_images_wait(models, photos, tmp_path, monkeypatch):
    """Batches of tiles hold one image's; two images at most wait to be written while the next is made."""
    from rdmd_fast.translation.outputs import Outputs
    from rdmd_fast.translation.translator import Translator

    batches, made, written, lock, most = [], set(), set(), threading.Lock(), []
    call, write = Translator.__call__, Outputs.write

    def counted_call(self, pieces, numbers):
        names = {self.job.samples.names[number] for number in numbers}
        batches.append((len(pieces), names))
        with lock:
            made.update(names)
            most.append(len(made - written))
        return call(self, pieces, numbers)

    def slow_write(self, name, *arrays):
        time.sleep(0.05)  # slower than the network
        write(self, name, *arrays)
        with lock:
            written.add(name)

    monkeypatch.setattr(Translator, "__call__", counted_call)
    monkeypatch.setattr(Outputs, "write", slow_write)
    save_images(tmp_path / "in", {f"{number}.png": picture(number, 8, 8) for number in range(10)})
    assert translate(models["same"], tmp_path / "in", tmp_path / "out", "--size", "tiles") == 0
    assert len(written) == 14 and all(len(names) == 1 for _, names in batches)
    assert max(most) <= 2 + 1


def test_tiles_of_a_shift_are_shifted_everywhere(models, photos, tmp_path):
    assert translate(models["lighter"], tmp_path / "in", tmp_path / "out", "--size", "tiles", "--overlap", 0.5) == 0
    for name, pixels in photos.items():
        expected = np.minimum(np.rint(pixels + 0.2 * 127.5), 255)
        np.testing.assert_allclose(pixels_of(tmp_path / "out" / name), expected, atol=1)


def test_resized_images_come_back_at_their_own_size(models, photos, tmp_path):
    assert translate(models["same"], tmp_path / "in", tmp_path / "out", "--size", "resize") == 0
    for name, pixels in photos.items():
        small = Image.fromarray(pixels).resize((8, 8), Image.Resampling.LANCZOS)
        back = small.resize(pixels.shape[1::-1], Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(pixels_of(tmp_path / "out" / name), np.asarray(back))


def test_turned_photos_come_out_upright(models, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90° anticlockwise
    upright = picture(0, 20, 9)
    save_images(tmp_path / "in", {"a.png": np.rot90(upright)}, exif=exif)
    assert translate(models["same"], tmp_path / "in", tmp_path / "out", "--size", "tiles") == 0
    np.testing.assert_array_equal(pixels_of(tmp_path / "out/a.png"), upright)
    with Image.open(tmp_path / "out/a.png") as image:
        assert 0x0112 not in image.getexif()


def test_shards_of_another_size(models, tmp_path, capsys):
    images = [picture(number, 12, 16) for number in range(3)]
    material.write_shards(tmp_path / "in", images, key="deep/{}")
    assert translate(models["same"], tmp_path / "in", tmp_path / "out") == 2
    assert "choose --size resize or tiles" in capsys.readouterr().err
    assert translate(models["same"], tmp_path / "in", tmp_path / "out", "--size", "tiles") == 0
    for number, image in enumerate(images):
        np.testing.assert_array_equal(pixels_of(tmp_path / f"out/deep/{number}.png"), image)


@pytest.mark.parametrize(("suffix", "kind"), [("jpg", "JPEG"), ("webp", "WEBP")])
def test_formats(models, tmp_path, suffix, kind):
    rows, columns = np.mgrid[:16, :16]
    smooth = np.stack([rows * 8, columns * 8, 128 - rows * 4 + columns * 4], axis=-1).astype(np.uint8)
    save_images(tmp_path / "in", {"a.png": smooth})
    assert translate(models["same"], tmp_path / "in", tmp_path / "out", "--size", "tiles", "--format", suffix) == 0
    with Image.open(tmp_path / f"out/a.{suffix}") as image:
        assert image.format == kind
        np.testing.assert_allclose(np.asarray(image.convert("RGB")).astype(float), smooth, atol=6)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_what_is_there_whole_is_left_alone(models, photos, tmp_path, capsys, suffix):
    out = tmp_path / "out"
    assert translate(models["same"], tmp_path / "in", out, "--format", suffix) == 0
    first, times = files_of(out), {path: path.stat().st_mtime_ns for path in out.rglob(f"*.{suffix}")}
    (cut, empty, gone, kept) = sorted(times)
    cut.write_bytes(cut.read_bytes()[:-3])
    empty.write_bytes(b"")
    gone.unlink()
    capsys.readouterr()
    assert translate(models["same"], tmp_path / "in", out, "--format", suffix, "--skip-existing") == 0
    assert "3 images, 1 were there" in capsys.readouterr().out
    assert files_of(out) == first
    assert [path for path in times if path.stat().st_mtime_ns == times[path]] == [kept]
    # All there: not even the weights are read.
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_bytes((models["same"] / "config.json").read_bytes())
    assert translate(tmp_path / "model", tmp_path / "in", out, "--format", suffix, "--skip-existing") == 0


def test_arrays_that_are_there_whole_are_left_alone(tmp_path):
    from rdmd_fast.translation.outputs import is_whole

    path = tmp_path / "a.npy"
    np.save(path, np.zeros((3, 8, 8), np.float32))
    assert is_whole(path)
    content = path.read_bytes()
    for damaged in (content[:-1], content[:50], content[:6], b"", content + b"x"):
        path.write_bytes(damaged)
        assert not is_whole(path)


def test_unreadable_files_end_it_or_are_skipped(models, photos, tmp_path, capsys):
    whole = (tmp_path / "in/e.png").read_bytes()
    (tmp_path / "in/deep/cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in/text.jpg").write_text("no picture")
    assert translate(models["same"], tmp_path / "in", tmp_path / "out") == 2
    assert error_line(capsys) and not (tmp_path / "out").exists()
    assert translate(models["same"], tmp_path / "in", tmp_path / "out", "--skip-unreadable") == 0
    said = capsys.readouterr()
    assert "4 images, 2 unreadable ones skipped" in said.out
    assert [line.split(":")[1].split("/")[-1] for line in said.err.strip().splitlines()] == ["cut.png", "text.jpg"]
    assert files_of(tmp_path / "out").keys() == photos.keys()


def test_files_that_differ_in_their_suffix_alone(models, tmp_path, capsys):
    save_images(tmp_path / "in", dict.fromkeys(("a.png", "a.bmp"), picture(0, 8, 8)))
    assert translate(models["same"], tmp_path / "in", tmp_path / "out") == 0
    assert files_of(tmp_path / "out").keys() == {"a_png.png", "a_bmp.png"}
    Image.fromarray(picture(0, 8, 8)).save(tmp_path / "in/a_png.gif")
    assert translate(models["same"], tmp_path / "in", tmp_path / "out") == 2
    assert "would both become 'a_png'" in capsys.readouterr().err


def test_dtype_is_the_generator_s(models, photos, tmp_path):
    for dtype in ("fp32", "bf16"):
        assert translate(models["any"], tmp_path / "in", tmp_path / dtype, "--dtype", dtype) == 0
    x = torch.from_numpy(photos["a.png"]).permute(2, 0, 1)[None].float() / 127.5 - 1
    y = load_generator(models["any"]).to(torch.bfloat16)(x)[0].permute(1, 2, 0)
    half, whole = (pixels_of(tmp_path / dtype / "a.png").astype(float) for dtype in ("bf16", "fp32"))
    np.testing.assert_allclose(half, ((y + 1) * 127.5).clamp(0, 255).numpy(), atol=0.6)
    assert 0 < np.abs(half - whole).max() < 8


def test_what_is_not_finite_is_an_error(models, photos, tmp_path, capsys):
    """fp16 ends at 65,504."""
    model, (name, *_) = export(tmp_path / "bright", 1e5), sorted(photos)
    for size in ("crop", "tiles"):
        flags = "--size", size, "--dtype"
        assert translate(model, tmp_path / "in", tmp_path / "out", *flags, "fp16") == 2
        said = error_line(capsys)
        assert "the translation of a is not finite" in said and "--dtype bf16 or fp32" in said
        assert not (tmp_path / "out" / name).exists()
        assert translate(model, tmp_path / "in", tmp_path / size, *flags, "bf16") == 0
        assert (pixels_of(tmp_path / size / name) == 255).all()


@pytest.mark.parametrize(("suffix", "longest"), [("jpg", 65_500), ("webp", 16_383)])
def test_formats_have_a_longest_side(tmp_path, suffix, longest):
    from rdmd_fast.errors import InputError
    from rdmd_fast.translation.outputs import Outputs

    outputs = Outputs(tmp_path, suffix, False)
    outputs.write("a", None, np.zeros((longest, 1, 3), np.uint8))
    assert pixels_of(tmp_path / f"a.{suffix}").shape[:2] == (longest, 1)
    with pytest.raises(InputError, match=f"1×{longest + 1} pixels, .* use png"):
        outputs.write("b", None, np.zeros((longest + 1, 1, 3), np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == [f"a.{suffix}"]


def test_process_that_is_done_ends_on_a_signal_without_a_word(monkeypatch):
    """An exception of the handler while objects are freed would be printed, and passed over."""
    from rdmd_fast.errors import InputError
    from rdmd_fast.translation import workers

    def fail(*_):
        during.append(signal.getsignal(signal.SIGTERM))
        raise InputError("a.png: not a readable image")

    class Sender:
        def send(self, message):
            after.append((str(message), signal.getsignal(signal.SIGTERM)))

    during, after = [], []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(workers, "work", fail)
    try:
        workers._main(None, "cuda:0", 2, [], Sender())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert after == [("a.png: not a readable image", signal.SIG_DFL)]
    with pytest.raises(SystemExit):  # and so files that are half written are removed
        during[0](signal.SIGTERM, None)


def test_two_processes_write_what_one_writes(models, photos, tmp_path, capfd):
    arguments = models["any"], tmp_path / "in"
    flags = "--batch-size", 2, "--size", "tiles"
    assert translate(*arguments, tmp_path / "one", *flags) == 0
    assert translate(*arguments, tmp_path / "two", *flags, "--workers", 2) == 0
    assert "4 images" in capfd.readouterr().out
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert files_of(tmp_path / "one").keys() == photos.keys()
    # An error in one of them is the only thing that is said.
    (tmp_path / "in/e.png").write_bytes(b"")
    assert translate(*arguments, tmp_path / "three", *flags, "--workers", 2) == 2
    assert "e.png: not a readable image" in error_line(capfd)
    assert not [name for name in files_of(tmp_path / "three") if name.endswith(".partial")]


@pytest.mark.parametrize(("extra", "message"), [
    (["--overlap", 0.5], "is for --size tiles"),
    (["--workers", 0], "--workers 0: must be at least 1"),
    (["--batch-size", 0], "--batch-size 0: must be at least 1"),
    (["--device", "cpu,cpu"], "names a device twice"),
    (["--device", "cuda:77"], "this machine has"),
    (["--device", "nonsense"], "no such device"),
])  # fmt: skip
def test_flags_that_do_not_fit_are_one_line(models, photos, tmp_path, capsys, extra, message):
    assert translate(models["same"], tmp_path / "in", tmp_path / "out", *extra) == 2
    assert message in error_line(capsys) and not (tmp_path / "out").exists()


def test_sizes_and_formats_are_of_images(models, tmp_path, capsys):
    write_files(tmp_path / "in", {"a.npy": material.npy(np.zeros((3, 8, 8), np.float32))})
    for flags, message in ((("--size", "tiles"), "is for images"), (("--format", "jpg"), "is for images")):
        assert translate(models["same"], tmp_path / "in", tmp_path / "out", *flags) == 2
        assert message in capsys.readouterr().err


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert pick_devices("auto") == pick_devices("cuda") == ["cuda:0", "cuda:1", "cuda:2"]
    assert pick_devices("cuda:2, cuda:0") == ["cuda:2", "cuda:0"]
    assert pick_devices("cpu", 2) == ["cpu", "cpu"]
