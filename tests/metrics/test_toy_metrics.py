import sys

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from rdmd_fast.errors import InputError
from rdmd_fast.metrics.exact_transport import (
    minibatch_ot_cost,
    monotonicity_violations,
    noise_floor,
    optimal_transport,
    squared_w2,
    toy_report,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_squared_w2_in_one_dimension_is_that_of_sorted_samples(rng):
    a, b = rng.normal(size=400), rng.exponential(size=400)
    assert squared_w2(a[:, None], b[:, None]) == pytest.approx(np.mean((np.sort(a) - np.sort(b)) ** 2))


def test_squared_w2_of_clouds_of_unequal_size_splits_the_mass():
    assert squared_w2([[0.0, 0.0]], [[1.0, 0.0], [0.0, 3.0]]) == pytest.approx(5.0)


def test_optimal_transport_matches_the_assignment_of_scipy(rng):
    x, target = rng.normal(size=(300, 2)), 2 + 1.5 * rng.normal(size=(300, 2))
    costs = cdist(x, target, "sqeuclidean")
    rows, columns = linear_sum_assignment(costs)
    cost, assignment = optimal_transport(torch.tensor(x), target)
    np.testing.assert_array_equal(assignment, columns)
    assert cost == pytest.approx(costs[rows, columns].mean())
    assert squared_w2(x, target) == pytest.approx(cost)


def test_squared_w2_between_gaussians_nears_the_closed_form_and_the_floor_nears_zero(rng):
    a, b = rng.normal(size=(1500, 2)), [2.0, 0.0] + rng.normal(size=(1500, 2)) * [3.0, 0.5]
    assert squared_w2(a, b) == pytest.approx(4 + 2**2 + 0.5**2, rel=0.1)
    assert 0 < noise_floor(a, rng.normal(size=(1500, 2))) < 0.05


def test_the_minibatch_cost_is_the_mean_over_batches_and_falls_to_the_exact_cost(rng):
    x, y = rng.normal(size=(256, 2)), 2 * rng.normal(size=(256, 2))
    costs = [minibatch_ot_cost(x, y, batch, seed=0) for batch in (1, 16, 256)]
    assert costs[0] > costs[1] > costs[2]
    assert costs[2] == pytest.approx(squared_w2(x, y))
    assert np.mean([minibatch_ot_cost(x, y, 1, seed) for seed in range(8)]) == pytest.approx(
        cdist(x, y, "sqeuclidean").mean(), rel=0.1
    )
    assert minibatch_ot_cost(x, y, 16, seed=0) == costs[1] != minibatch_ot_cost(x, y, 16, seed=1)
    with pytest.raises(InputError):
        minibatch_ot_cost(x, y, 257, seed=0)


def test_the_minibatch_cost_does_not_depend_on_the_order_of_the_samples(rng):
    x, y = rng.normal(size=(2, 512, 1))
    sorted_cost = minibatch_ot_cost(np.sort(x, axis=0), np.sort(y, axis=0), 32, seed=0)
    assert sorted_cost == pytest.approx(minibatch_ot_cost(x, y, 32, seed=0), rel=0.5)
    assert sorted_cost < 0.5


def test_violations_of_monotonicity_match_the_definition_pair_by_pair(rng):
    x, y = rng.normal(size=(2, 300, 2))
    pairs = [(i, j) for i in range(300) for j in range(i)]
    share = np.mean([np.dot(x[i] - x[j], y[i] - y[j]) < 0 for i, j in pairs])
    assert monotonicity_violations(x, y) == pytest.approx(share)
    assert share == pytest.approx(0.5, abs=0.05)


def test_gradients_of_convex_functions_never_violate_monotonicity_and_reflections_always_do(rng):
    x = rng.normal(size=(500, 2))
    assert monotonicity_violations(x, x @ np.array([[2.0, 0.5], [0.5, 1.0]]) + 3) == 0
    assert monotonicity_violations(x, -x) == 1
    _, assignment = optimal_transport(x, y := rng.normal(size=(500, 2)))
    assert monotonicity_violations(x, y[assignment]) == 0


def test_the_report_of_an_optimal_map_and_of_a_rotation(rng):
    x, first, second = rng.normal(size=(3, 200, 2))
    _, assignment = optimal_transport(x, first)
    report = toy_report(x, torch.tensor(first[assignment]), first, second[:150])
    assert report["samples"] == report["target_samples"] == 200
    assert report["squared_w2"] == pytest.approx(0)
    assert report["noise_floor"] == pytest.approx(squared_w2(first, second[:150]))
    assert report["transport_cost"] == pytest.approx(report["ot_cost"])
    assert report["ot_cost_to_output"] == pytest.approx(report["ot_cost"])

    rotated = toy_report(x, -x, first, second)
    assert rotated["transport_cost"] == pytest.approx(4 * np.sum(x**2, axis=1).mean())
    assert rotated["ot_cost_to_output"] < 0.1 * rotated["transport_cost"]
    assert rotated["monotonicity_violations"] == 1


def test_bad_clouds_are_refused(rng):
    x = rng.normal(size=(8, 2))
    with pytest.raises(InputError, match="NaN"):
        squared_w2(x, np.full((8, 2), np.nan))
    with pytest.raises(InputError, match="dimensions"):
        squared_w2(x, x[:, :1])
    with pytest.raises(InputError, match="as many"):
        optimal_transport(x, x[:5])
    with pytest.raises(InputError, match="shape"):
        squared_w2(x[0], x)


def test_a_missing_pot_names_the_extra(monkeypatch, rng):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(InputError, match=r"pip install rdmd_fast\[toy\]"):
        squared_w2(rng.normal(size=(4, 2)), rng.normal(size=(4, 2)))
