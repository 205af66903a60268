"""Exact and minibatch transport maps against SciPy's assignment."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from rdmd_fast.baselines.transport import exact_map, minibatch_map
from rdmd_fast.errors import InputError


def clouds(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, 2)), 1.5 * rng.normal(size=(count, 2)) + [3.0, 0.0]


def cost(x, y):
    return float(((x - y) ** 2).sum(1).mean())


def as_set(points):
    return sorted(map(tuple, points))


def test_exact_map_is_scipys_assignment():
    x, target = clouds(150)
    rows, columns = linear_sum_assignment(cdist(x, target, "sqeuclidean"))
    np.testing.assert_array_equal(rows, np.arange(150))
    np.testing.assert_array_equal(exact_map(x, target), target[columns])


def test_exact_map_between_two_points_each_is_the_sorted_one():
    x, target = np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([[5.0, 0.0], [2.0, 0.0]])
    np.testing.assert_array_equal(exact_map(x, target), [[2.0, 0.0], [5.0, 0.0]])


def test_minibatch_map_is_exact_in_each_batch_and_never_cheaper_than_the_whole():
    x, target = clouds(130)
    exact = cost(x, exact_map(x, target))
    costs = {}
    for batch in (1, 10, 50, 130, 1000):
        mapped = minibatch_map(x, target, batch, seed=3)
        assert as_set(mapped) == as_set(target)
        costs[batch] = cost(x, mapped)
    assert costs[130] == costs[1000] == pytest.approx(exact, abs=1e-12)
    assert costs[1] > costs[10] > costs[50] > exact
    independent = cdist(x, target, "sqeuclidean").mean()
    assert costs[1] == pytest.approx(independent, rel=0.1)


def test_minibatch_map_is_a_function_of_its_seed():
    x, target = clouds(40)
    np.testing.assert_array_equal(minibatch_map(x, target, 8, 0), minibatch_map(x, target, 8, 0))
    assert not np.array_equal(minibatch_map(x, target, 8, 0), minibatch_map(x, target, 8, 1))


def test_maps_of_a_shifted_gaussian_are_the_shift():
    """Between a cloud and itself moved by m the optimal map is x + m."""
    x, _ = clouds(60)
    expected = x + np.array([2.0, -1.0])
    moved = np.random.default_rng(1).permutation(expected)
    np.testing.assert_allclose(exact_map(x, moved), expected)


def test_unequal_clouds_and_empty_batches_are_refused():
    x, target = clouds(10)
    for mapping in (exact_map, lambda x, y: minibatch_map(x, y, 2, 0)):
        with pytest.raises(InputError, match="10 points against 9"):
            mapping(x, target[:9])
    with pytest.raises(InputError, match="batch 0: must be at least 1"):
        minibatch_map(x, target, 0, 0)


def test_sources_and_targets_are_dealt_independently():
    """Else points that stand at the same row would meet, which correlates clouds that were listed alike."""
    x, _ = clouds(40)
    mapped = minibatch_map(x, x, 1, 0)
    assert as_set(mapped) == as_set(x)
    assert (mapped == x).all(1).mean() < 0.2
