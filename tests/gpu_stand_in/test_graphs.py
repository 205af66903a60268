"""train.cuda_graphs: replayed passes compute what they compute as written."""

import json

import pytest

from tests.gpu_stand_in.child import run, run_cases

pytestmark = [pytest.mark.gpu_stand_in, pytest.mark.timeout(900)]


def test_graphs_keep_what_they_promise():
    assert "passed" in run_cases("graphs_cases.py")


@pytest.mark.parametrize(
    ("stage", "dtype", "options", "launches"),
    [
        (0, "fp32", ["rdmd.fake_updates=2"], (1491, 108)),
        (2, "bf16", ["rdmd.fake_updates=2"], (2432, 1038)),
        pytest.param(0, "bf16", ["train.micro_batch_size=2"], (2191, 409), marks=pytest.mark.slow),
        pytest.param(2, "fp32", ["rdmd.transport_weight={log_uniform: [0.01, 1]}"], None, marks=pytest.mark.slow),
    ],
)
def test_an_iteration_that_replays_equals_the_written_one_to_the_bit(stage, dtype, options, launches):
    """Losses of two iterations, and the last gradients' norms; launches left are the optimizers' and the losses'."""
    command = ["-m", "tests.gpu_stand_in.iteration", "--before", "1", "--stage", str(stage), "--dtype", dtype, *options]
    written, replayed = (json.loads(run(*command, *more).splitlines()[-1]) for more in ([], ["train.cuda_graphs=true"]))
    for what in ("losses", "norms", "wait", "copy"):
        assert written[what] == replayed[what] and (what in ("wait", "copy") or all(written[what].values()))
    counts = tuple(sum(each["launch"].values()) for each in (written, replayed))
    assert counts == launches if launches else counts[1] < counts[0]
