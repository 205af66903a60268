import pytest

from rdmd_fast.data.threads import map_in_order


def test_results_come_in_order_whatever_job_ends_first(tmp_path):
    import time

    def double(job):
        time.sleep(0.002 * (job % 3 == 0))
        return 2 * job

    assert list(map_in_order(double, range(40), workers=3)) == list(range(0, 80, 2))


def test_a_failing_job_raises_in_its_place_and_ends_the_rest():
    started = []

    def invert(job):
        started.append(job)
        return 1 / (5 - job)

    results = map_in_order(invert, range(1000), workers=2)
    assert [next(results) for _ in range(5)] == [1 / (5 - job) for job in range(5)]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert len(started) < 20
