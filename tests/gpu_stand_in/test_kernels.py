import pytest

from tests.gpu_stand_in.child import run, run_cases, run_pytest
from tests.gpu_stand_in.instructions_used import instructions_in_tests


@pytest.mark.timeout(300)
def test_faults_of_triton_kernels_are_caught():
    assert "passed" in run_cases("triton_cases.py")


@pytest.mark.gpu_stand_in
@pytest.mark.timeout(900)
def test_every_kernel_equals_its_reference_on_its_ptx():
    said = run_pytest("tests/kernels/test_on_gpu.py")
    assert "passed" in said and "skipped" not in said


@pytest.mark.gpu_stand_in
@pytest.mark.timeout(900)
def test_every_instruction_of_the_kernels_has_a_test():
    tested = instructions_in_tests()
    used = {name for name in run("-m", "tests.gpu_stand_in.instructions_used").split() if "." in name}
    assert len(used) > 80
    assert not used - tested, f"test_ptx.py has no {sorted(used - tested)}"
