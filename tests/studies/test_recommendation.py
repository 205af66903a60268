"""The rule of rdmd sweep on numbers whose answer is plain."""

import pytest

from rdmd_fast.studies.recommendation import Reference, Trial, recommend

IMAGES = Reference(untouched=100.0, floor=0.0)


def trials(*numbers):
    return [Trial(weight, 1.0, distance, cost) for weight, distance, cost in numbers]


def test_the_most_faithful_of_those_as_close_as_the_best():
    chosen, reason = recommend(trials((0.1, 10.0, 5.0), (0.3, 14.9, 4.0), (1.0, 15.1, 3.0), (3.0, 60.0, 1.0)), IMAGES)
    assert chosen.transport_weight == 0.3  # 1.0 covers 5.1 % of the way less than the best
    assert "of the 2 of 4 settings" in reason and "covers 90%" in reason
    assert "tried" not in reason


def test_the_floor_of_real_samples_ends_the_way():
    # From 100 to 80: 81 is 95 % of it, 82 is 90 %; from 100 to 0 they would be alike.
    chosen, _ = recommend(trials((0.1, 80.5, 5.0), (0.3, 81.0, 4.0), (1.0, 82.0, 3.0)), Reference(100.0, 80.0))
    assert chosen.transport_weight == 0.3


@pytest.mark.parametrize("weight, note", [(1.0, "largest λ that was tried"), (0.1, "smallest λ that was tried")])
def test_an_end_of_the_grid_is_told(weight, note):
    costs = {0.1: 5.0, 1.0: 3.0}
    far = {0.1: 10.0, 1.0: 11.0 if weight == 1.0 else 40.0}
    chosen, reason = recommend(trials(*((each, far[each], costs[each]) for each in costs)), IMAGES)
    assert chosen.transport_weight == weight and note in reason


def test_none_is_good_enough():
    chosen, reason = recommend(trials((0.1, 51.0, 5.0), (1.0, 90.0, 1.0)), IMAGES)
    assert chosen is None and "covers 49% of the way" in reason


def test_all_are_alike():
    chosen, reason = recommend(trials((0.1, 10.0, 5.0), (1.0, 12.0, 4.8)), IMAGES)
    assert chosen is None and "All 2 settings are alike" in reason
    chosen, _ = recommend(trials((0.1, 10.0, 5.0), (1.0, 12.0, 4.7)), IMAGES)  # costs differ by 6 %
    assert chosen.transport_weight == 1.0


def test_a_metric_that_sees_no_difference_between_the_domains():
    chosen, reason = recommend(trials((0.1, 10.0, 5.0)), Reference(untouched=3.0, floor=3.0))
    assert chosen is None and "cannot tell the domains apart" in reason


def test_of_a_toy_twice_the_noise_floor_is_good():
    toy = Reference(untouched=None, floor=0.01)
    chosen, reason = recommend(trials((0.1, 0.012, 5.0), (0.3, 0.02, 4.0), (1.0, 0.021, 3.0)), toy)
    assert chosen.transport_weight == 0.3 and "twice the noise floor 0.0100" in reason
    chosen, reason = recommend(trials((0.1, 0.021, 5.0)), toy)
    assert chosen is None and "squared W2 0.0210, more than twice" in reason


def test_runs_that_diverged_are_left_out():
    chosen, reason = recommend(trials((0.1, None, 1.0), (0.3, 10.0, float("nan")), (1.0, 10.0, 3.0)), IMAGES)
    assert chosen.transport_weight == 1.0 and "of the 1 of 3 settings" in reason
    assert recommend(trials((0.1, None, None)), IMAGES).trial is None
