"""benchmarks.step --fastgen: what it counts, and what it says where FastGen cannot be had.

With a checkout of NVlabs/FastGen: FASTGEN=PATH pytest tests/benchmarks/test_fastgen_side.py
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ is no part of the package

from benchmarks import step
from benchmarks.host_syncs import HostSyncs, count_host
from benchmarks.network_passes import count_passes, passes_of
from benchmarks.step_measurements import count_plain
from benchmarks.step_sides import Plain


def test_passes_are_counted_by_kind():
    teacher, student = torch.nn.Linear(2, 2).requires_grad_(False), torch.nn.Linear(2, 2)
    with count_passes({"teacher": teacher, "student": student}) as counts:
        y = student(torch.ones(3, 2))
        teacher(y).detach()  # a graph that no backward pass reads
        with torch.no_grad():
            teacher(y), student(y)
        y.sum().backward()
    student(torch.ones(3, 2)).sum().backward()  # afterwards
    assert passes_of(counts) == {
        "teacher": {"forward": 1, "forward_with_graph": 1, "backward": 0},
        "student": {"forward": 1, "forward_with_graph": 1, "backward": 1},
        "all": {"forward": 2, "forward_with_graph": 2, "backward": 1},
    }


def test_operations_are_those_that_are_dispatched():
    tensor, host = torch.ones(2, 3), torch.ones(2)
    with HostSyncs([tensor]) as syncs:
        (tensor + 1).mul_(2).t()
        host + 1
        tensor.sum().item()
    assert syncs.totals() == {"host_syncs": 1, "launches": 3, "operations": 6}


def test_no_network_of_ours_keeps_a_graph_or_is_rolled_out_for_nothing(step_run):
    ours = step_run("toy", "fp32")
    plain = count_plain(Plain.like(ours, "toy", "fp32", None))["passes"]
    passes = count_host(ours)["passes"]
    assert passes["teacher"] == {"forward": 1, "forward_with_graph": 0, "backward": 0}
    assert passes["generator"] == {"forward": 0, "forward_with_graph": 1, "backward": 1}
    assert passes["fake_score"] == {"forward": 1, "forward_with_graph": 1, "backward": 1}
    assert plain["generator"] == {"forward": 1, "forward_with_graph": 1, "backward": 1}  # a second rollout


@pytest.mark.parametrize(("method", "said"), [
    (None, "no checkout of NVlabs/FastGen, fastgen/methods/distribution_matching/dmd2.py is missing: git clone"),
    ("import no_such_package", "FastGen imports no_such_package, not installed: pip install"),
    ("", "take the commit that docs/performance.md names"),
])  # fmt: skip
def test_a_checkout_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, capsys, method, said):
    if method is not None:
        file = tmp_path / "fastgen/methods/distribution_matching/dmd2.py"
        file.parent.mkdir(parents=True)
        file.write_text(method)
    path, command = list(sys.path), ["step", "--case", "digits", "--fastgen", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        step.main()
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"step: error: --fastgen {tmp_path}: ") and said in last
    assert sys.path == path and not [name for name in sys.modules if name.partition(".")[0] == "fastgen"]


@pytest.mark.skipif("FASTGEN" not in os.environ, reason="FASTGEN names no checkout")
def test_fastgens_step_beside_ours(tmp_path, monkeypatch):
    file = tmp_path / "digits.json"
    command = ["step", "--case", "digits", "--dtype", "fp32", "--batch", "2", "--rounds", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", [*command, "--fastgen", os.environ["FASTGEN"]])
    monkeypatch.setattr(step, "DTYPES", ["fp32"])
    assert step.main() == 0
    [entry] = json.loads(file.read_text())
    passes = entry["fastgen"]["passes"]
    assert passes["teacher"] == {"forward": 0, "forward_with_graph": 1, "backward": 0}  # a graph for nothing
    assert passes["generator"] == {"forward": 1, "forward_with_graph": 1, "backward": 1}
    assert entry["fastgen"]["host_syncs"] > entry["ours"]["host_syncs"] == 0
    assert entry["fastgen_ratios"]["seconds"] == entry["fastgen"]["seconds"] / entry["ours"]["seconds"]
