"""``rdmd report``: what the page holds, that nothing from outside acts in it, and bad input."""

import json
import math
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from material import encoded, error_line, random_pixels

from rdmd_fast import cli
from rdmd_fast.monitoring.report import decimate, number
from rdmd_fast.monitoring.run_record import Series, read_run

HOSTILE = '</script><img src=x onerror="window.hit=1">{{ 7 * 7 }}'
VOID = ("img", "input", "meta", "br")


class Page(HTMLParser):
    """Tags with their attributes, and (tag, text) in order, of a page whose tags must be closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self._open = [], [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, text):
        self.texts.append((self._open[-1] if self._open else "", text))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def inside(self, tag):
        return [text for name, text in self.texts if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(text for tag, text in self.texts if tag not in ("script", "style")).split())

    @property
    def data(self):
        return json.loads(self.inside("script")[0])


def line(step, **values):
    seconds = {"interval": 2.0, "forward": 0.5, "backward": 1.0}
    return {"step": step, "samples": 8 * step, "loss": 1 / step, "lr/teacher": 1e-4, "seconds": seconds} | values


def make_run(folder, lines=None, pictures=3, config=None):
    """A run's folder as training leaves it."""
    (folder / "samples").mkdir(parents=True)
    values = {"stage": "teacher", "run_dir": str(folder), "train": {"steps": 40, "dtype": "float32"}, "license": None}
    (folder / "config.yaml").write_text(json.dumps(values | (config or {})))  # JSON is YAML
    lines = [line(step) for step in (10, 20, 30, 40)] if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    for index in range(pictures):
        name = "final" if index == pictures - 1 else f"step_{10 * (index + 1):08d}"
        (folder / f"samples/{name}.png").write_bytes(encoded(random_pixels(index, 8, 8, 3)))
    return folder


def report(tmp_path, *runs):
    out = tmp_path / "report.html"
    assert cli.main(["report", *map(str, runs), "--out", str(out)]) == 0
    return Page(out.read_text(encoding="utf-8"))


def test_a_run(tmp_path):
    measured = {"l2": 3.0, "psnr": 12.0}, {"l2": 2.0, "psnr": 11.0}, {"l2": 2.5, "psnr": 10.0}
    lines = [line(10), {"step": 10, "validation": measured[0]}, line(20), {"step": 20, "validation": measured[1]}]
    page = report(tmp_path, make_run(tmp_path / "run", [*lines, line(30), {"step": 30, "validation": measured[2]}]))
    assert "30 of 40 iterations, not ended" in page.text and "train.dtype float32" in page.text
    assert "l2 lower 2.5 at 30 2 at 20" in page.text and "psnr higher 10 at 30 12 at 10" in page.text
    # 10 iterations a line take 2 s: of one 0.05 s forward, 0.1 s backward, 0.05 s else, at 8 samples.
    assert "forward 0.05 25 % backward 0.1 50 % all else 0.05 25 % in all 0.2" in page.text
    assert "images per second 40" in page.text
    assert "None: no skipped update" in page.text and "lr/teacher 0.0001" in page.text
    assert [plot["name"] for plot in page.data["plots"]["training"]] == ["loss"]
    curve = page.data["plots"]["training"][0]["curves"][0]
    assert curve["x"] == [10, 20, 30] and curve["y"] == [0.1, 0.05, 0.033333]
    pictures = page.all("img")
    assert [each["data-name"] for each in pictures] == ["step_00000010.png", "step_00000020.png", "final.png"]
    assert ["hidden" in each for each in pictures] == [True, True, False]  # without a script the last one is seen


def test_several_runs(tmp_path):
    runs = [make_run(tmp_path / name, config={"rdmd": {"transport_weight": weight}}) for name, weight in
            (("a", 0.1), ("b", 0.5))]  # fmt: skip
    page = report(tmp_path, *runs)
    differing, common = (
        page.text.split("What differs in the configuration")[1].split("Pictures over time")[0],
        page.text,
    )
    assert "rdmd.transport_weight 0.1 0.5" in differing and "train.dtype" not in differing
    assert "train.dtype float32 float32" in common
    assert page.data["runs"] == ["a", "b"]
    assert [curve["run"] for curve in page.data["plots"]["training"][0]["curves"]] == [0, 1]
    assert len(page.all("figure")) == 2
    (tmp_path / "more").mkdir()
    shutil.copytree(runs[0], tmp_path / "more/a")
    assert report(tmp_path, runs[0], tmp_path / "more/a").data["runs"] == [f"{tmp_path}/a", f"{tmp_path}/more/a"]


def test_what_a_toy_should_measure(tmp_path):
    values = {"squared_w2": 0.3, "noise_floor": 0.25, "axis_scale_0": 1.2, "axis_scale_0_expected": 1.3}
    values |= {"rotation_degrees": 0.5, "axis_scale_0_at_0.02": 1.4, "axis_scale_0_expected_at_0.02": 1.45}
    lines = [{"step": step, "validation": values | {"squared_w2": 10 / step}} for step in (10, 20)]
    config = {"rdmd": {"transport_weight": 0.1}}
    page = report(tmp_path, make_run(tmp_path / "run", lines, config=config))
    assert "squared_w2 lower 0.5 at 20 0.5 at 20 0.25" in page.text
    assert "axis_scale_0 1.2 at 20 1.3" in page.text and "axis_scale_0_at_0.02 1.4 at 20 1.45" in page.text
    assert "rotation_degrees 0.5 at 20 0 " in page.text
    assert [curve["truth"] for curve in page.data["plots"]["validation"][0]["curves"]] == [False, True]


def test_events(tmp_path):
    lines = [
        line(10, **{"skipped_updates/teacher": 0, "loss_scale/teacher": 64.0, "grad_norm/teacher": 1.0}),
        line(20, **{"skipped_updates/teacher": 2, "loss_scale/teacher": 32.0}),
        line(30, **{"skipped_updates/teacher": 2, "loss_scale/teacher": 32.0}, failed_checkpoints=1),
        {"step": 30, "validation": {"psnr": math.inf}},
        line(40, dropped_samples={"source": {"a-0.tar": 3}}),
        line(15),
    ]
    run = make_run(tmp_path / "run", lines)
    (run / "checkpoints.old/step_00000050").mkdir(parents=True)
    events = {(event.step, event.what): event.text for event in read_run(run).events}
    assert events == {
        (15, "steps go back"): "from 40: lines of two courses",
        (20, "skipped updates"): "2 more of teacher, 2 so far",
        (20, "loss scale"): "of teacher lowered from 64 to 32",
        (20, "no value"): "grad_norm/teacher: missing from this line, as what is not finite is",
        (30, "failed checkpoints"): "1 more, 1 so far",
        (30, "not finite"): "validation psnr is inf",
        (40, "dropped samples"): "of source so far, by shard: a-0.tar 3",
        (50, "set aside"): "checkpoint step_00000050, of a course that was left",
        (40, "no value"): events[40, "no value"],
    }
    assert "2 more of teacher, 2 so far" in report(tmp_path, run).text


def test_resumes_are_those_of_the_tensorboard_files(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    run = make_run(tmp_path / "run")
    for step in (0, 25):
        tensorboard.SummaryWriter(str(run / "tensorboard"), purge_step=step, filename_suffix=str(step)).close()
    (run / "tensorboard/events.out.tfevents.1.torn").write_bytes(struct.pack("<Q", 70) + b"?" * 9)
    record = read_run(run)
    assert [(event.step, event.what) for event in record.events] == [(25, "resumed")]
    assert record.timed == 35  # the third line is of five iterations


def test_hostile_names_are_inert(tmp_path):
    def page_of(name, text):
        lines = [line(step, **{text: step}, seconds={"interval": 1, text: 0.5}) for step in (10, 20)]
        lines += [line(30, dropped_samples={text: {text: 1}}, **{f"skipped_updates/{text}": 1})]
        lines += [{"step": step, "validation": {text: step, "bad": math.nan}} for step in (10, 20)]
        config = {text: text, "stage": text, "teacher_prompt": f"a\n{text}"}
        run = make_run(tmp_path / name, lines, config=config)
        (run / f"samples/step_1{name}.png").write_bytes(b"")
        return report(tmp_path, run, make_run(tmp_path / f"beside {name}"))

    name = HOSTILE.replace("/", "∕")  # no folder has a slash in its name
    tame, page = page_of("tame", "tame/text"), page_of(name, HOSTILE)
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in tame.tags]
    assert [sorted(attributes) for _, attributes in page.tags] == [sorted(attributes) for _, attributes in tame.tags]
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert len(page.all("script")) == len(page.inside("script")) == 2
    assert HOSTILE in page.text and name == page.data["runs"][0]
    assert any(plot["name"] == HOSTILE for plot in page.data["plots"]["rates"])
    styles = [attributes["style"] for _, attributes in page.tags if "style" in attributes]
    assert styles and all(re.fullmatch(r"width:[\d.]+%", style) for style in styles)


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    page = report(tmp_path, make_run(tmp_path / "run", config={"teacher": "https://example.org/x"}))
    for tag, attributes in page.tags:
        for name in ("src", "href", "data", "action", "srcset", "poster"):
            assert re.match(r"data:image/(png|jpeg|webp);base64,|#\w+$", attributes.get(name, "#x")), (tag, name)
    own = "".join(page.inside("style") + page.inside("script")[1:])
    assert not re.search(r"https?:|//|url\(|@import|import\(|fetch|innerHTML", own)
    policy = next(each["content"] for each in page.all("meta") if "http-equiv" in each)
    assert policy.startswith("default-src 'none'; img-src data:;") and "script-src 'sha256-" in policy


def test_keys_are_not_mailed(tmp_path):
    data = {"source": "https://me:secret@host/a.tar?token=secret::shards/b", "target": ["pipe:aws --key secret", "s/c"]}
    page = report(tmp_path, make_run(tmp_path / "run", config={"data": data}))
    assert "secret" not in page.text
    assert "https://host/a.tar::shards/b" in page.text and "[a command, which may hold keys, s/c]" in page.text


def test_decimation_keeps_extremes():
    values = np.random.default_rng(0).lognormal(size=5003)
    whole = Series(list(range(1, 5004)), values.tolist())
    few = decimate(whole, 100)
    assert len(few.steps) <= 202 and few.steps == sorted(few.steps)
    assert (few.steps[0], few.steps[-1]) == (1, 5003)
    assert all(values[step - 1] == value for step, value in zip(*few, strict=True))
    places = np.asarray(few.steps) - 1
    for part in np.array_split(np.arange(5003), 50):  # every second bound of a bucket is near: look at those inside
        inside = np.isin(part, places)
        middle = part[26:-26]
        assert values[part][inside].max() >= values[middle].max() and values[part][inside].min() <= values[middle].min()
    assert decimate(Series([1, 2], [3.0, 4.0])) == Series([1, 2], [3.0, 4.0])


def test_numbers():
    assert [number(value) for value in (0.0, 12345.6, 0.000123456, -1.5, 1e-7, 3, None)] == [
        "0", "12350", "0.0001235", "-1.5", "1e-07", "3", "–"
    ]  # fmt: skip


def test_damaged_files_are_told_of(tmp_path):
    run = make_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('nonsense\n[1]\n{"step": "x"}\n' + "[" * 9999 + '\n{"step": 50, "lo')
    (run / "samples/step_00000010.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    page = report(tmp_path, run)
    assert "last line of metrics.jsonl is torn" in page.text and "cannot be read and are left out: 4" in page.text
    assert "cannot be read and left out: step_00000010.png" in page.text and len(page.all("img")) == 2
    assert page.data["plots"]["training"][0]["curves"][0]["x"] == [10, 20, 30, 40]


@pytest.mark.parametrize("lines", [[], None], ids=["empty", "missing"])
def test_a_run_that_has_just_begun(tmp_path, lines):
    run = make_run(tmp_path / "run", [], pictures=0)
    if lines is None:
        (run / "metrics.jsonl").unlink()
        (run / "samples").rmdir()
    page = report(tmp_path, run)
    for text in ("metrics.jsonl holds no lines yet", "None to show", "Nothing was measured", "No metric changes"):
        assert text in page.text


def test_many_large_pictures_stay_small(tmp_path):
    run = make_run(tmp_path / "run", pictures=0)
    noise = encoded(random_pixels(0, 500, 1500, 3))
    for step in range(1, 61):
        (run / f"samples/step_{step:08d}.png").write_bytes(
            noise if step % 20 == 0 else encoded(random_pixels(0, 9, 9, 3))
        )
    page = report(tmp_path, run)
    steps = [int(image["data-step"]) for image in page.all("img")]
    assert len(steps) == 40 and steps[0] == 1 and steps[-1] == 60
    assert "20 more of its pictures are left out" in page.text
    assert max(int(image["width"]) for image in page.all("img")) == 1200
    assert (tmp_path / "report.html").stat().st_size < 5e6


@pytest.mark.parametrize("runs, out, words", [
    (["nowhere"], "report.html", ["nowhere", "no run there"]),
    (["data"], "report.html", ["no config.yaml"]),
    (["run", "run"], "report.html", ["given twice"]),
    (["run"], "data", ["--out", "is a folder"]),
    (["run"], "data/deeper/report.html", ["--out", "lies inside data.source"]),
    (["run"], "run/config.yaml/report.html", ["config.yaml"]),
    (["damaged"], "report.html", ["config.yaml", "not valid YAML"]),
], ids=["missing", "no run", "twice", "folder", "data", "no folder", "config"])  # fmt: skip
def test_bad_input(tmp_path, capsys, monkeypatch, runs, out, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    make_run(tmp_path / "run", config={"data": {"source": "data", "target": {"toy": "gaussian"}}})
    (make_run(tmp_path / "damaged") / "config.yaml").write_text("a: [")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["report", *runs, "--out", out]) == 2
    message = error_line(capsys)
    assert all(word in message for word in words), message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_browser_draws_every_plot(tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    lines = [line(10 * step, **{HOSTILE: step}) for step in range(1, 5001)]
    report(tmp_path, make_run(tmp_path / "run", lines))
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    address = (tmp_path / "report.html").as_uri()
    done = subprocess.run([browser, *options, address], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.count("<svg viewBox") == 2 and "NaN" not in done.stdout
    assert done.stdout.count("<img ") == 3  # as many as there are pictures
