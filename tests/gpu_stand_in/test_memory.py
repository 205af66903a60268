import json

import pytest

from tests.gpu_stand_in.child import run


@pytest.mark.gpu_stand_in
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("stage", "dtype"), [(0, "bf16"), (2, "fp32")])
def test_memory_is_what_a_dry_run_predicts(stage, dtype):
    said = run("-m", "tests.gpu_stand_in.memory", "--stage", str(stage), "--dtype", dtype)
    memory = json.loads(said.splitlines()[-1])
    # Above it by no more than rounding each tensor to 512 bytes; below it by no more than gradients of parameters,
    # which the prediction adds to activations at their height, before a backward pass has made them all.
    assert memory["measured"] < 1.02 * memory["total"]
    assert memory["measured"] > memory["total"] - memory["gradients"] - memory["buckets"]
    assert memory["activations"] > 0.1 * memory["total"]  # which could not be left out
