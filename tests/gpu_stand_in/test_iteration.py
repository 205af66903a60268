import json

import pytest

from tests.gpu_stand_in.child import run
from tests.gpu_stand_in.iteration_table import CASES, arguments_of, counts_of, read_table
from tests.gpu_stand_in.log import KINDS, WAIT

OURS = ("rdmd_fast/", "kernels/")


@pytest.fixture(scope="module")
def table():
    return read_table()


@pytest.mark.gpu_stand_in
@pytest.mark.parametrize("case", CASES)
@pytest.mark.timeout(900)
def test_an_iteration_asks_what_the_table_says(case, table):
    said = run(*arguments_of(case))
    counts = counts_of(said)
    for what in KINDS:
        measured, expected = (
            {place: count for (its, place), count in each.items() if its == what} for each in (counts, table[case])
        )
        assert measured == expected, f"{what}: if that is meant, python -m tests.gpu_stand_in.iteration_table {case}"
    losses = json.loads(said.splitlines()[-1])["losses"]
    assert losses and all(abs(loss) < 1e6 for loss in losses.values())  # NaN is not


def test_nothing_of_ours_waits_for_the_gpu(table):
    assert set(table) == set(CASES)
    waits = {
        (case, place): count
        for case, counts in table.items()
        for (what, place), count in counts.items()
        if what == WAIT
    }
    assert not [row for row in waits if row[1].startswith(OURS)]
    assert all(place.startswith("deepspeed/") for _, place in waits)  # not in autograd, nor elsewhere
