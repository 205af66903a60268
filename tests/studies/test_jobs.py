import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rdmd_fast.errors import InputError
from rdmd_fast.files import strict_json
from rdmd_fast.studies.jobs import Job, read_result, run_jobs

sys.path.insert(0, str(Path(__file__).parent))  # the points' processes inherit it

from jobs_work import fail, refuse, save_and_stop, sleep, square, train_toy, vanish


def silent(text: str) -> None:
    pass


def test_points_are_computed_once_each_in_its_folder(tmp_path):
    points = [Job("square", "square", square, {"x": x}) for x in (1, 2, 3)]
    results = run_jobs(points, tmp_path, 2, silent)
    assert [result["value"] for result in results] == [1, 4, 9]
    assert all(result["infinite"] is None and result["seconds"] >= 0 for result in results)
    assert run_jobs([*points, Job("square", "square", square, {"x": 4})], tmp_path, 2, silent)[3]["value"] == 16
    assert len({point.folder(tmp_path) for point in points}) == 3
    for point in points:
        folder = point.folder(tmp_path)
        assert (folder / "calls").read_text() == "x"
        assert sorted((folder / "log.txt").read_text().splitlines()) == ["from a child", "squaring"]
        assert json.loads((folder / "point.json").read_text())["settings"] == point.settings


def test_half_a_result_is_none(tmp_path):
    point = Job("square", "square", square, {"x": 5})
    folder = point.folder(tmp_path)
    folder.mkdir()
    (folder / "point.json").write_text('{"format": 1, "resu')
    assert read_result(folder) is None
    assert run_jobs([point], tmp_path, 1, silent)[0]["value"] == 25


def test_what_a_point_reports_names_it(tmp_path):
    with pytest.raises(InputError, match=r"^third: no such thing$"):
        run_jobs([Job("third", "refuse", refuse, {})], tmp_path, 1, silent)
    with pytest.raises(InputError, match=r"^a process of the study was killed .*, see .*fourth.*log.txt"):
        run_jobs([Job("fourth", "vanish", vanish, {})], tmp_path, 1, silent)
    with pytest.raises(InputError, match=r"^fifth: broke \(RuntimeError: CUDA out of memory.*\), see .*log.txt"):
        run_jobs([Job("fifth", "fail", fail, {})], tmp_path, 1, silent)
    assert "Traceback" in (Job("fifth", "fail", fail, {}).folder(tmp_path) / "log.txt").read_text()
    with pytest.raises(InputError, match="--jobs 0"):
        run_jobs([], tmp_path, 0, silent)


def test_two_trainings_in_one_worker(tmp_path):
    results = run_jobs([Job("toy", "train_toy", train_toy, {"seed": seed}) for seed in (0, 1)], tmp_path, 1, silent)
    assert [result["step"] for result in results] == [2, 2]
    values = [result["validation"]["squared_w2"] for result in results]
    assert values[0] != values[1]


def test_strict_json_has_neither_nan_nor_infinity():
    value = {"a": [float("nan"), 1.0, (float("inf"), "x")], "b": None}
    assert strict_json(value) == {"a": [None, 1.0, [None, "x"]], "b": None}


@pytest.mark.parametrize("work", [sleep, save_and_stop])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_points_end_with_their_command(tmp_path, work, number):
    points = [Job(f"point{index}", "work", work, {"index": index}) for index in range(3)]
    script = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"from jobs_work import {work.__name__} as work\nfrom rdmd_fast.studies.jobs import Job, run_jobs\n"
        "points = [Job(f'point{index}', 'work', work, {'index': index}) for index in range(3)]\n"
        f"if __name__ == '__main__': run_jobs(points, {str(tmp_path)!r}, 1)\n"
    )
    (tmp_path / "command.py").write_text(script)
    command = subprocess.Popen([sys.executable, tmp_path / "command.py"], stderr=subprocess.DEVNULL)
    file = points[0].folder(tmp_path) / "process"
    assert _within(30, lambda: file.exists() and file.read_text())
    command.send_signal(number)
    assert command.wait(20) != 0
    assert _within(20, lambda: not Path(f"/proc/{file.read_text()}").exists())
    time.sleep(0.5)
    assert [point.folder(tmp_path).exists() for point in points] == [True, False, False]


def _within(seconds: float, condition) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
