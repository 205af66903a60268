"""What benchmarks/run_gpu.sh says where something is missing, keeps as it goes, and prints."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ is no part of the package

from benchmarks import gpu_summary, preflight

ROOT = Path(__file__).parents[2]


def refused(results, **environment) -> str:
    """The only line of a call that is refused."""
    variables = {**os.environ, "RESULTS": str(results), **environment}
    done = subprocess.run(
        ["bash", "benchmarks/run_gpu.sh", "1"], cwd=ROOT, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 2 and not done.stdout and not results.exists()
    [line] = done.stderr.splitlines()
    return line


def test_all_that_is_missing_is_said_in_one_line(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    there = tmp_path / "site"
    there.mkdir()
    for name in ("torch", "triton", "numpy"):
        (there / name).symlink_to(Path(find_spec(name).origin).parent)
    line = refused(tmp_path / "results", PYTHON=str(tmp_path / "venv/bin/python"), PYTHONPATH=str(there))
    missing = line.removeprefix("run_gpu.sh: no ").partition(": pip install --no-index --no-deps --target SITE")[0]
    assert {"deepspeed", "pydantic", "pydantic-core", "py-cpuinfo", "webdataset", "pytest-benchmark"} <= set(
        missing.split(", ")
    )
    assert len(missing.split(", ")) == len(preflight.MODULES) - 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_device_is_said_in_one_line(tmp_path):
    line = refused(tmp_path / "results", PYTHON=sys.executable, PYTHONPATH="")
    assert line == f"run_gpu.sh: no CUDA device that torch {torch.__version__} can use"


def needed(*names: str) -> set[str]:
    """Distributions that these depend on here, themselves with them."""
    found, left = set(), [canonicalize_name(name) for name in names]
    while left:
        if (name := left.pop()) in found:
            continue
        try:
            wanted = map(Requirement, requires(name) or ())
        except PackageNotFoundError:
            continue
        found.add(name)
        left += [
            canonicalize_name(each.name) for each in wanted if not each.marker or each.marker.evaluate({"extra": ""})
        ]
    return found


def test_what_the_package_depends_on_is_looked_for():
    ours = needed("rdmd_fast", "pytest-benchmark", "matplotlib")
    modules: dict[str, set[str]] = {}
    for module, distributions in packages_distributions().items():
        for name in distributions:
            modules.setdefault(canonicalize_name(name), set()).add(module)
    # Of what matplotlib and pytest need in turn, whoever has them has it.
    others = needed("torch", "matplotlib", "pytest") - {"torch", "matplotlib", "pytest"}
    looked_for = {name for name in ours if modules.get(name, set()) & set(preflight.MODULES)}
    assert ours - others - looked_for == {"rdmd-fast"}
    assert "deepspeed" in looked_for and "pydantic-core" in looked_for


TESTS = """
import json, pathlib, pytest
def test_fine(): pass
def test_kept(): assert json.loads(pathlib.Path(FILE).read_text())["tests"]["test_fine"]["passed"] == 1
@pytest.mark.parametrize("n", [1, 2])
def test_wrong(n): assert n == 1, "not one"
"""


def test_outcomes_are_kept_while_tests_run(tmp_path):
    file = tmp_path / "outcomes.json"
    (tmp_path / "test_some.py").write_text(f"FILE = {str(file)!r}\n{TESTS}")
    command = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "benchmarks.outcomes",
        "--outcomes",
        file,
        tmp_path,
    ]
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True)
    kept = json.loads(file.read_text())
    assert kept["tests"]["test_kept"] == {"passed": 1, "failed": 0, "skipped": 0}
    assert kept["tests"]["test_wrong"] == {"passed": 1, "failed": 1, "skipped": 0}
    assert len(kept["failures"]) == 1 and kept["finished"]


def test_a_summary_fits_a_screen_and_says_what_is_not_measured(tmp_path):
    for call in "123":
        assert any(gpu_summary.ABSENT in line for line in gpu_summary.summary(call, tmp_path))
    failures = {f"tests/kernels/test_on_gpu.py::test_gradient[{'x' * 80}-{n}]": "AssertionError" for n in range(50)}
    counts = {"test_noise_has_the_bits_of_the_cpu": {"passed": 11, "failed": 1, "skipped": 0}}
    kept = {"tests": counts, "failures": failures, "finished": False, "seconds": 90.0}
    (tmp_path / "correctness.json").write_text(json.dumps(kept))
    rows = [
        {
            "extra_info": {
                "operation": "generator_gradient/sigma2", "case": f"8x{128 + n}x256x256 bfloat16", "bytes": 905969664,
                "implementation": implementation, "GBps": 4321.0, "percent_of_copy": 100.4,
            },
            "stats": {"median": 0.0123456},
        }
        for n in range(20) for implementation in ("ours", "eager", "compile")
    ]  # fmt: skip
    (tmp_path / "kernels_largest.json").write_text(json.dumps({"benchmarks": rows}))
    lines = gpu_summary.summary("1", tmp_path)
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    assert "11 passed, 1 failed, 0 skipped in 90 s, CUT OFF" in lines[0] and lines[1].endswith("no")
