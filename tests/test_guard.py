"""Updates that are skipped: on two ranks together, bit for bit, counted, and not for ever."""

import json
import math
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("guard_worker.py")


@pytest.fixture(scope="module")
def engines(rank_server, tmp_path_factory):
    """What each of two ranks has seen, by dtype and stage."""
    folder = tmp_path_factory.mktemp("engines")
    before = f"REPORT = {str(folder / 'report')!r}\n{WORKER.read_text()}"
    ids = rank_server.start([], 2, folder / "log", before)
    assert rank_server.wait(ids, 90) == [0, 0], (folder / "log").read_text()
    return [json.loads((folder / f"report.{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_bad_update_on_one_rank_leaves_everything_as_it_was(engines, dtype, stage):
    """Afterwards the engine goes on as its twin that never met it."""
    for report in engines:
        case = report[f"{dtype} {stage}"]
        assert len(case["kept"]) == (1 if dtype == "fp16" else 5)
        assert all(case["kept"].values()) and set(case["counted"].values()) == {1.0}, case
        assert case["spikes"] == 1 and case["in_row"] == 0 and case["average"]
    assert engines[0][f"{dtype} {stage}"]["state"] == engines[1][f"{dtype} {stage}"]["state"]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("dtype,tolerance", [("fp32", 1e-6), ("bf16", 2e-2), ("fp16", 2e-3)])
def test_norm_is_of_the_whole_gradient_before_clipping(engines, dtype, tolerance, stage):
    assert engines[0][f"{dtype} {stage}"]["norms"] == pytest.approx(reference_norms(), rel=tolerance)


def reference_norms():
    """Of the first updates of guard_worker.py, in one process in fp64."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.SiLU(), torch.nn.Linear(5, 4)).double()
    adam, norms = torch.optim.Adam(network.parameters(), lr=1e-2), []
    for number in range(3):
        adam.zero_grad()
        for rank in range(2):
            for micro in range(2):
                generator = torch.Generator().manual_seed(1000 * number + 10 * micro + rank)
                x, gradient = torch.randn(2, 6, generator=generator), torch.randn(2, 4, generator=generator)
                network(x.double()).backward(gradient.double() / 2)  # DeepSpeed takes the mean over ranks
        norms.append(float(torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)))
        adam.step()
    return norms
