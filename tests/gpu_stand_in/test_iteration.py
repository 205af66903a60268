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
    # In DeepSpeed's stead: in fp16 the host decides about the loss scale.
    overflow = "rdmd_fast/engine/fewer_waits.py:_overflows"
    assert {waits.pop((f"{kind}-0-fp16", overflow), 0) for kind in ("rdmd", "teacher")} == {2, 1}
    assert not [row for row in waits if row[1].startswith(OURS)]
    assert all(place.startswith("deepspeed/") for _, place in waits)  # not in autograd, nor elsewhere


def test_deepspeed_waits_no_more_than_it_must(table):
    """At most once an update below ZeRO 3, where an iteration of the distillation has two; eight times there."""
    for case in CASES:
        kind, stage, dtype = case.split("-")
        count = sum(number for (what, _), number in table[case].items() if what == WAIT)
        updates = 2 if kind == "rdmd" else 1
        assert count <= updates * (4 if stage == "3" or dtype == "fp16" else 1), case
