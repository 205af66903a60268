import importlib

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from rdmd_fast.errors import InputError
from rdmd_fast.metrics.frechet import frechet_distance
from rdmd_fast.metrics.kernel_distance import kernel_distance, squared_mmd


class Flat(torch.nn.Module):
    """Images are their own features: an extractor that torchmetrics takes in place of Inception."""

    num_features = 12

    def forward(self, images):
        return images.flatten(1)


@pytest.fixture
def sets():
    rng = np.random.default_rng(0)
    return rng.normal(size=(60, 12)), rng.normal(size=(50, 12)) * 1.3 + 0.2


def torchmetrics_value(metric, a, b):
    metric.set_dtype(torch.float64)
    metric.update(torch.tensor(a).view(-1, 3, 2, 2), real=True)
    metric.update(torch.tensor(b).view(-1, 3, 2, 2), real=False)
    return metric.compute()


def test_it_equals_the_sum_over_pairs(sets):
    a, b = sets[0][:9], sets[1][:7]

    def kernel(u, v):
        return (sum(x * y for x, y in zip(u, v, strict=True)) / 12 + 1) ** 3

    pairs_a = [kernel(a[i], a[j]) for i in range(9) for j in range(9) if i != j]
    pairs_b = [kernel(b[i], b[j]) for i in range(7) for j in range(7) if i != j]
    across = [kernel(u, v) for u in a for v in b]
    expected = np.mean(pairs_a) + np.mean(pairs_b) - 2 * np.mean(across)
    assert squared_mmd(a, b) == pytest.approx(expected, rel=1e-10)


def test_kid_and_fid_match_torchmetrics(sets):
    a, b = sets[0][:50], sets[1]
    mean, deviation = torchmetrics_value(KernelInceptionDistance(Flat(), subsets=3, subset_size=50), a, b)
    value, spread = kernel_distance(a, b)
    assert value == pytest.approx(mean.item(), rel=1e-9)
    assert deviation < 1e-9 and np.isnan(spread)  # torchmetrics takes the one subset there is three times
    fid = torchmetrics_value(FrechetInceptionDistance(Flat()), *sets)
    assert frechet_distance(*sets) == pytest.approx(fid.item(), rel=1e-6)


def test_subsets_are_drawn_from_all_by_the_seed_and_average_to_the_whole(sets):
    whole = squared_mmd(*sets)
    mean, deviation = kernel_distance(*sets, subsets=100, subset_size=20)
    assert deviation > 0
    # Unbiased subsets: their mean lies within four standard errors of the whole's (they overlap, so far within).
    assert abs(mean - whole) < 4 * deviation / np.sqrt(100)
    assert kernel_distance(*sets, subsets=5, subset_size=20) == kernel_distance(*sets, subsets=5, subset_size=20)
    assert kernel_distance(*sets, subsets=5, subset_size=20, seed=1) != kernel_distance(
        *sets, subsets=5, subset_size=20
    )
    # The larger set is subsampled to the smaller one's size, as the definition has equal numbers.
    assert kernel_distance(*sets, subsets=3)[1] > 0


def test_one_distribution_has_distance_zero_in_the_mean():
    rng = np.random.default_rng(0)
    values = [squared_mmd(rng.normal(size=(40, 4)), rng.normal(size=(40, 4))) for _ in range(200)]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(200)


def test_bad_features_are_refused(sets):
    a, b = sets
    with pytest.raises(InputError, match="dimensions"):
        kernel_distance(a, b[:, :3])
    with pytest.raises(InputError, match="two"):
        kernel_distance(a, b[:1])


def imported(name):
    """A package that is optional here; one that is installed for another torch may raise anything."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name} cannot be imported here: {error}")


def test_fid_and_kid_match_torch_fidelity_where_it_is_installed(sets):
    fid, kid = imported("torch_fidelity.metric_fid"), imported("torch_fidelity.metric_kid")
    statistics = [fid.fid_features_to_statistics(torch.tensor(each)) for each in sets]
    expected = fid.fid_statistics_to_metric(*statistics, verbose=False)[fid.KEY_METRIC_FID]
    assert frechet_distance(*sets) == pytest.approx(expected, rel=1e-8)
    a, b = sets[0][:50], sets[1]
    options = {"kid_subsets": 1, "kid_subset_size": 50, "kid_degree": 3, "kid_gamma": None, "kid_coef0": 1}
    values = kid.kid_features_to_metric(torch.tensor(a), torch.tensor(b), **options, rng_seed=0, verbose=False)
    assert kernel_distance(a, b)[0] == pytest.approx(values[kid.KEY_METRIC_KID_MEAN], rel=1e-9)


def test_fid_and_kid_match_clean_fid_where_it_is_installed(sets):
    fid = imported("cleanfid.fid")
    assert frechet_distance(*sets) == pytest.approx(fid.fid_from_feats(*sets), rel=1e-8)
    a, b = sets[0][:50], sets[1]
    assert kernel_distance(a, b)[0] == pytest.approx(fid.kernel_distance(a, b, num_subsets=1), rel=1e-9)
