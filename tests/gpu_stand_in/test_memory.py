import json

import pytest

from tests.gpu_stand_in.child import run


@pytest.mark.gpu_stand_in
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("stage", "dtype"), [(0, "bf16"), (2, "fp32")])
def test_memory_is_what_a_dry_run_predicts(stage, dtype):
    said = run("-m", "tests.gpu_stand_in.memory", "--stage", str(stage), "--dtype", dtype)
    memory = json.loads(said.splitlines()[-1])
    # More, since the allocator rounds each tensor up to 512 bytes; less, since the passes are at their height before the
    # last gradients of parameters are there, which the prediction adds up. Activations are a tenth and more.
    assert memory["measured"] == pytest.approx(memory["total"], rel=0.02)
    assert memory["activations"] > 0.1 * memory["total"]
