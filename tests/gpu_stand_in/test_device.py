import pytest

from tests.gpu_stand_in.child import run_cases


@pytest.mark.timeout(300)
def test_device_keeps_what_it_promises():
    assert "passed" in run_cases("device_cases.py")
