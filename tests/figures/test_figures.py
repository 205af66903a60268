"""The figures at a tiny size: what they compute, write, print and do not compute twice."""

import csv

import numpy as np
import pytest
from PIL import Image

from rdmd_fast.cli import main
from rdmd_fast.commands.figures import run_pack
from rdmd_fast.errors import InputError
from rdmd_fast.figures import surface, surface_loss, toys
from rdmd_fast.metrics.exact_transport import squared_w2
from rdmd_fast.metrics.tables import mean_and_error, with_error, write_rows
from rdmd_fast.monitoring import drawing
from rdmd_fast.studies import jobs as points
from rdmd_fast.studies.options import FigureOptions, shipped_config

TINY_SURFACE = surface.SurfaceSize(
    grid=(9, 13), radii=(0.5, 1.5, 2.0), angles=(0, 90, 180), draws=4000, starts=((0.5, 90.0),), steps=4, every=2
)
TINY = ("train.steps=2", "rdmd.fake_warmup=0", "train.global_batch_size=32")
TINY_TOYS = toys.ToysSize(
    problems=(
        toys.Problem("8 Gaussians", "toy/gaussian_to_8gaussians.yaml", (0.1, 1.0), TINY),
        toys.Problem("swiss roll", "toy/gaussian_to_swiss_roll.yaml", (0.2,), TINY),
    ),
    points=60,
    batches=(7, 20),
)


@pytest.fixture
def in_this_process(monkeypatch):
    """Points computed one after another, here; returns the names of those that were."""
    computed = []

    def compute(todo, jobs, say):
        for folder, point in todo.items():
            computed.append(point.name)
            points._work(point, folder)

    monkeypatch.setattr(points, "_compute", compute)
    monkeypatch.setattr(drawing, "toy_picture", lambda *arguments: None)  # each run's own, which takes a second
    return computed


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def numbers(rows, key):
    return [float(row[key]) for row in rows]


# -- surface -----------------------------------------------------------------------------------------------------------


def test_surface_compares_every_point_and_resumes(tmp_path, in_this_process, capsys):
    options = FigureOptions(1, 1, None, run_pack)
    made = surface.make(tmp_path, options, TINY_SURFACE)
    assert len(in_this_process) == 2  # λ = 0 and the config's
    rows, paths = read(tmp_path / "surface.csv"), read(tmp_path / "surface_paths.csv")
    assert len(rows) == 2 * 3 * 3
    assert numbers(rows, "closed_form") == [row["closed_form"] for row in made["rows"]]
    for row in rows:
        difference = float(row["monte_carlo"]) - float(row["closed_form"])
        assert abs(difference) < 4 * float(row["standard_error"]) + 1e-12
    # At r = s and λ = 0 both densities are one.
    assert [row["r"] for row in rows if not row["difference_in_standard_errors"]] == ["1.5"] * 3
    assert [row["step"] for row in paths[:3]] == ["0", "2", "4"]
    assert (float(paths[0]["r"]), float(paths[0]["alpha_degrees"])) == (0.5, 90.0)
    assert float(paths[2]["r"]) > 0.5
    table = capsys.readouterr().out
    assert [best["r"] for best in made["optima"]] == pytest.approx([1.5, 1.3233], abs=1e-4)
    assert f"{made['optima'][1]['r']:.5f}" in table and "any" in table
    assert Image.open(tmp_path / "surface.png").size[0] > 1000
    again = surface.make(tmp_path, options, TINY_SURFACE)
    assert len(in_this_process) == 2 and again == made


def test_monte_carlo_that_disagrees_is_seen(monkeypatch):
    """A closed form without its factor 2 of the cost differs by far more than the standard errors."""
    from rdmd_fast.config import load_config

    config = load_config(shipped_config(surface.CONFIG))
    right = surface_loss.closed_form
    monkeypatch.setattr(
        surface_loss, "closed_form", lambda config, weight, r, alpha: right(config, weight / 2, r, alpha)
    )
    rows = surface_loss.compare(config, (0.2,), TINY_SURFACE)
    assert max(abs(row["difference_in_standard_errors"]) for row in rows) > 20


# -- toys --------------------------------------------------------------------------------------------------------------


def test_toys_table_has_every_map_and_resumes(tmp_path, in_this_process, capsys):
    options = FigureOptions(2, 1, None, run_pack)
    made = toys.make(tmp_path, options, TINY_TOYS)
    assert len(in_this_process) == 6
    printed = capsys.readouterr().out.splitlines()
    rows, runs = read(tmp_path / "toys.csv"), read(tmp_path / "toys_runs.csv")
    names = ["RDMD λ=0.1", "RDMD λ=1", "exact OT", "minibatch OT 7", "minibatch OT 20"]
    assert [row["map"] for row in rows] == [*names, "RDMD λ=0.2", *names[2:]]
    assert len(runs) == 2 * len(rows)
    table = [line for line in printed if line.startswith(("8 Gaussians ", "swiss roll "))]
    assert len(table) == len(rows)
    for row, line in zip(rows, table, strict=True):
        assert row["map"] in line
        assert with_error(float(row["squared_w2"]), float(row["squared_w2_error"])) in line
        assert with_error(float(row["transport_cost"]), float(row["transport_cost_error"])) in line
        assert f"{float(row['ot_cost_to_output']):.4f}" in line and f"{float(row['noise_floor']):.4f}" in line
        of_map = [run for run in runs if run["problem"] == row["problem"] and run["map"] == row["map"]]
        assert [run["seed"] for run in of_map] == ["0", "1"]
        assert float(row["cost_ratio"]) == pytest.approx(np.mean(numbers(of_map, "cost_ratio")))
    assert sum("best λ =" in line for line in printed) == 2
    assert Image.open(tmp_path / "toys.png").size[0] > 1000
    again = toys.make(tmp_path, options, TINY_TOYS)
    assert len(in_this_process) == 6 and again == made
    other = TINY_TOYS.problems[0]._replace(overrides=(*TINY, "rdmd.fake_updates=1"))
    assert points.read_result(toys.study(other, 1, TINY_TOYS)[0].folder(tmp_path / "points")) is None


def test_transport_rows_are_those_of_exact_transport():
    rows = toys.transport_runs(TINY_TOYS.problems[0], 0, TINY_TOYS)
    validator = toys.validator_of(TINY_TOYS.problems[0], 0, TINY_TOYS)
    source, target = validator.source, validator.target
    exact, small, large = rows
    assert exact["transport_cost"] == pytest.approx(squared_w2(source, target))
    assert exact["monotonicity_violations"] == 0 and exact["cost_ratio"] == 1
    assert exact["squared_w2"] == pytest.approx(squared_w2(target, validator.second_target))
    assert small["transport_cost"] > large["transport_cost"] > exact["transport_cost"]
    assert small["monotonicity_violations"] > 0


def row(weight, floors, ratio):
    return {"transport_weight": weight, "floors": floors, "squared_w2": floors, "cost_ratio": ratio}


def test_the_best_weight_is_chosen_by_the_rule():
    rows = [row(0.1, 2.5, 1.0), row(0.2, 1.9, 1.04), row(0.5, 1.2, 0.9), row(None, 1.0, 1.0)]
    best = toys.best_map(rows)
    assert best["transport_weight"] == 0.2 and best["near_optimal"]
    assert not toys.best_map([row(0.5, 1.2, 0.9)])["near_optimal"]
    far = toys.best_map([row(0.1, 2.5, 1.0), row(0.2, 2.1, 1.0)])
    assert far["transport_weight"] == 0.2 and not far["near_optimal"]


# -- command -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "message"), [
    (["--seeds", "0"], "--seeds 0: must be at least 1"),
    (["--jobs", "0"], "--jobs 0: must be at least 1"),
    (["--only", "surface", "--study", "x.yaml"], "--study: does nothing for surface"),
])  # fmt: skip
def test_bad_arguments_are_one_line(tmp_path, capsys, arguments, message):
    assert main(["figures", "--out", str(tmp_path), *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not any(tmp_path.iterdir())


def test_only_makes_the_named_figures_in_order(tmp_path, monkeypatch, capsys):
    called = []
    for name in ("surface", "toys"):
        module = {"surface": surface, "toys": toys}[name]
        monkeypatch.setattr(module, "make", lambda out, options, name=name: called.append((name, out, options)))
    arguments = ["--out", str(tmp_path), "--only", "toys", "--only", "surface", "--seeds", "2", "--jobs", "1"]
    assert main(["figures", *arguments]) == 0
    assert called == [(name, tmp_path, FigureOptions(2, 1, None, run_pack)) for name in ("surface", "toys")]
    with pytest.raises(SystemExit) as stop:
        main(["figures", "--out", str(tmp_path), "--only", "nothing"])
    assert stop.value.code == 2


def test_rows_and_means(tmp_path):
    write_rows(tmp_path / "a/b.csv", [{"x": 0.1, "y": None}, {"x": 1 / 3, "z": "λ"}])
    rows = read(tmp_path / "a/b.csv")
    assert float(rows[1]["x"]) == 1 / 3 and rows[0]["y"] == "" and rows[1]["z"] == "λ"
    assert mean_and_error([2.0]) == (2.0, None)
    assert mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    assert with_error(1.0, None) == "1.0000" and with_error(1.0, 0.25, 2) == "1.00 ± 0.25"
    with pytest.raises(InputError, match=r"toy/none\.yaml: no such file"):
        shipped_config("toy/none.yaml")
