"""Updates that are skipped: on two ranks together, bit for bit, counted, and not for ever."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from material import toy_rdmd
from safetensors.torch import load_file

from rdmd_fast.config import validate_config
from rdmd_fast.engine.update_guard import Guards
from rdmd_fast.errors import InputError
from rdmd_fast.monitoring.telemetry import TIME_KEYS

WORKER = Path(__file__).with_name("guard_worker.py")


@pytest.fixture(scope="module")
def engines(rank_server, tmp_path_factory):
    """What each of two ranks has seen, by dtype and stage."""
    folder = tmp_path_factory.mktemp("engines")
    before = f"REPORT = {str(folder / 'report')!r}\n{WORKER.read_text()}"
    ids = rank_server.start([], 2, folder / "log", before)
    assert rank_server.wait(ids, 240) == [0, 0], (folder / "log").read_text()
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
    assert engines[0][f"{dtype} {stage}"]["norms"] == pytest.approx(reference()[0], rel=tolerance)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("dtype,tolerance", [("fp32", 1e-6), ("bf16", 1e-3), ("fp16", 1e-4)])
def test_clipped_updates_are_those_of_an_fp64_adam(engines, dtype, tolerance, stage):
    """Masters after three updates that move them by 0.03; without clipping weights differ by up to 2.5e-3."""
    for name, expected in reference()[1].items():
        torch.testing.assert_close(
            torch.tensor(engines[0][f"{dtype} {stage}"]["weights"][name]), expected.float(), rtol=0, atol=tolerance
        )


def reference():
    """(norms, weights) of the first updates of guard_worker.py, in one process in fp64."""
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
    return norms, {name: weight.detach() for name, weight in network.named_parameters()}


# -- whole runs --------------------------------------------------------------------------------------------------------

RUN = toy_rdmd(
    rdmd={"weighting": "sigma2", "fake_updates": 2},
    train={"steps": 1000, "global_batch_size": 8},
    deepspeed={"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}},
)
SPIKES = {"spike_factor": 1.1, "spike_warmup": 2, "spike_half_life": 3.0}
# Each rank: a run with one bad gradient, a run whose guard is busy in one go and in two, and then, by the command
# line, one whose generator's gradients stay bad.
BEFORE = """
import json, math
from pathlib import Path
from types import SimpleNamespace
import torch
from rdmd_fast import rdmd
from rdmd_fast.config import validate_config
from rdmd_fast.processes.world import join_world
from rdmd_fast.trainer import run

class StopAfter:
    def __init__(self, count):
        self.left = count
    @property
    def requested(self):
        self.left -= 1
        return SimpleNamespace(name="SIGTERM") if self.left < 0 else None

generator_gradient, calls = rdmd.generator_gradient, []
def spoilt(*arguments, **keywords):
    gradient, statistics = generator_gradient(*arguments, **keywords)
    calls.append(None)
    if rank == 1 and first_bad <= len(calls) <= last_bad:
        gradient.fill_(math.nan)
    return gradient, statistics
rdmd.generator_gradient = spoilt

world = join_world()
for name, guard, stops, (first_bad, last_bad) in CASES:
    for stop in stops:
        calls.clear()
        values = {**VALUES, "run_dir": name, "train": {**VALUES["train"], "guard": guard}}
        Path(name).mkdir(exist_ok=True)
        config = validate_config(values, name)
        assert run(config, "auto", world, Path(name), StopAfter(stop)) == 75
calls.clear()
first_bad, last_bad = 5, 1000
"""


@pytest.fixture(scope="module")
def runs(rank_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    cases = [("once", {}, [6], (5, 5)), ("whole", SPIKES, [16], (0, -1)), ("halves", SPIKES, [8, 8], (0, -1))]
    cases = [(str(folder / name), *rest) for name, *rest in cases]
    (folder / "config.yaml").write_text(yaml.safe_dump({**RUN, "run_dir": str(folder / "stuck")}))
    arguments = ["--config", folder / "config.yaml", "train.guard.max_skipped_in_row=4", "telemetry.log_every=100"]
    ids = rank_server.start(
        [*arguments, "checkpoint.every=1"], 2, folder / "log", f"CASES, VALUES = {cases!r}, {RUN!r}\n{BEFORE}"
    )
    assert rank_server.wait(ids, 240) == [2, 2], (folder / "log").read_text()
    return folder


def metrics(run_dir):
    lines = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIME_KEYS} for line in lines]


def test_one_engine_skips_and_the_other_goes_on(runs):
    lines = metrics(runs / "once")
    assert [line["skipped_updates/generator"] for line in lines] == [0, 0, 0, 0, 1, 1]
    assert [line["skipped_updates/fake_score"] for line in lines] == [0] * 6
    assert ["grad_norm/generator" in line for line in lines] == [True] * 4 + [False, True]
    assert all("grad_norm/fake_score" in line and "fake_loss" in line for line in lines)


def test_run_with_spikes_resumes_bit_for_bit(runs):
    whole, halves = metrics(runs / "whole"), metrics(runs / "halves")
    assert whole == halves and len(whole) == 16
    assert whole[-1]["skipped_spikes/fake_score"] > whole[7]["skipped_spikes/fake_score"] > 0
    for rank in range(2):
        name = f"checkpoints/step_00000016/ranks/{rank:05d}.safetensors"
        tensors = [load_file(runs / run / name) for run in ("whole", "halves")]
        assert {"guard.generator.numbers", "guard.fake_score.numbers"} <= tensors[0].keys() == tensors[1].keys()
        assert all(tensors[0][key].equal(tensors[1][key]) for key in tensors[0])


def test_updates_skipped_in_a_row_end_the_run_and_leave_the_last_checkpoint(runs):
    """Four from the fifth on: the run ends before it saves the eighth step."""
    log = (runs / "log").read_text()
    lines = [line for line in log.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "generator: 4 updates in a row were skipped" in lines[0], log
    assert "Traceback" not in log
    assert (runs / "stuck/checkpoints/latest").read_text().strip() == "step_00000007"


def test_weights_that_are_not_finite_are_not_saved():
    engine = SimpleNamespace(optimizer=None, module=torch.nn.Linear(2, 2))
    guard = SimpleNamespace(engine=engine, metrics=lambda name: {})
    guards = Guards({"teacher": SimpleNamespace(guard=guard)})
    world = SimpleNamespace(any=lambda flag: flag)
    guards.before_save(world)
    with torch.no_grad():
        engine.module.weight[0, 1] = math.inf
    with pytest.raises(InputError, match="teacher: its weights are not finite, nothing is saved"):
        guards.before_save(world)


def test_norm_that_deepspeed_would_not_compute_is_refused():
    zero = {"stage": 2, "compute_grad_norm": False}
    with pytest.raises(InputError, match="compute_grad_norm: must stay true"):
        validate_config({**RUN, "run_dir": "run", "deepspeed": {"zero_optimization": zero}}, "case")
