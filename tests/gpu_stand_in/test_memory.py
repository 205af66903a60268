import json

import pytest

from tests.gpu_stand_in.child import run

MEGABYTE = 10**6


@pytest.mark.gpu_stand_in
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("stage", "dtype"), [(0, "bf16"), (2, "fp32")])
def test_memory_is_what_a_dry_run_predicts(stage, dtype):
    said = run("-m", "tests.gpu_stand_in.memory", "--stage", str(stage), "--dtype", dtype)
    memory = json.loads(said.splitlines()[-1])
    # The allocator rounds each of some thousand tensors up to 512 bytes, and nothing predicts losses, norms and tables.
    assert 0 <= memory["measured"] - memory["total"] < MEGABYTE
    assert memory["activations"] > 4 * MEGABYTE  # which therefore could not be left out
