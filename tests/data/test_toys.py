import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.datasets import make_circles, make_moons, make_swiss_roll

from rdmd_fast.data.toys import ToyDistribution
from rdmd_fast.randomness import Philox, Stream

TOYS = ["gaussian", "8gaussians", "swiss_roll", "two_moons", "circles"]


def mixture_moments(distribution):
    means, covariances, weights = (part.numpy() for part in distribution.mixture())
    mean = weights @ means
    centred = means - mean
    return mean, np.einsum("k,kij->ij", weights, covariances) + (weights[:, None] * centred).T @ centred


def test_gaussian_mixture_is_the_rotated_normal():
    toy = ToyDistribution(toy="gaussian", std=[2.0, 0.5], mean=[1.0, -3.0], rotation=30)
    means, covariances, weights = toy.mixture()
    c, s = math.cos(math.pi / 6), math.sin(math.pi / 6)
    rotation = np.array([[c, -s], [s, c]])
    np.testing.assert_allclose(means.numpy(), [[1.0, -3.0]])
    np.testing.assert_allclose(covariances.numpy()[0], rotation @ np.diag([4.0, 0.25]) @ rotation.T, atol=1e-15)
    assert weights.tolist() == [1.0]


def test_eight_gaussians_covariance_has_its_closed_form():
    mean, covariance = mixture_moments(ToyDistribution(toy="8gaussians", scale=3, std=0.4, rotation=17))
    np.testing.assert_allclose(mean, 0, atol=1e-14)
    np.testing.assert_allclose(covariance, (9 / 2 + 0.16) * np.eye(2), atol=1e-13)


def test_circles_have_equal_mass_and_half_the_radius_inside():
    means, _, weights = ToyDistribution(toy="circles", scale=2).mixture()
    radius = means.norm(dim=1)
    assert weights[radius > 1.5].sum().item() == pytest.approx(0.5)
    assert sorted({round(r, 9) for r in radius.tolist()}) == [1.0, 2.0]
    _, covariance = mixture_moments(ToyDistribution(toy="circles", scale=2, std=0.1))
    np.testing.assert_allclose(covariance, ((4 + 1) / 4 + 0.01) * np.eye(2), atol=1e-12)


@pytest.mark.parametrize(("toy", "make", "unit"), [
    ("swiss_roll", lambda: make_swiss_roll(200_000, random_state=0)[0][:, [0, 2]], 5 / (4.5 * math.pi)),
    ("two_moons", lambda: make_moons(200_000, random_state=0)[0], 3.0),
    ("circles", lambda: make_circles(200_000, random_state=0, factor=0.5)[0], 4.0),
])  # fmt: skip
def test_curves_match_scikit_learn(toy, make, unit):
    curve = unit * make()
    mean, covariance = mixture_moments(ToyDistribution(toy=toy, std=0.1))
    np.testing.assert_allclose(mean, 0, atol=1e-13)
    np.testing.assert_allclose(covariance - 0.01 * np.eye(2), np.cov(curve.T), atol=0.05)
    # Every component stands on the curve, and every part of the curve has one within a standard deviation.
    means = ToyDistribution(toy=toy, std=0.1).mixture()[0].numpy()
    distance = np.linalg.norm((curve - curve.mean(0))[::20, None] - means[None], axis=2)
    assert distance.min(axis=0).max() < 0.05
    assert distance.min(axis=1).max() < 0.1


@pytest.mark.parametrize("toy", TOYS)
def test_samples_have_the_moments_of_the_mixture(toy):
    toy = ToyDistribution(toy=toy, mean=[0.5, -1.0], rotation=40)
    count = 100_000
    points = toy.sample(Philox(5), Stream.SOURCE_POINTS, torch.arange(count))
    assert points.dtype == torch.float32
    points = points.double().numpy()
    mean, covariance = mixture_moments(toy)
    np.testing.assert_allclose(mean, [0.5, -1.0], atol=1e-13)
    error = 5 * math.sqrt(np.trace(covariance) / count)
    np.testing.assert_allclose(points.mean(0), mean, atol=error)
    np.testing.assert_allclose(np.cov(points.T), covariance, atol=8 * np.trace(covariance) / math.sqrt(count))


def test_component_and_noise_of_a_sample_are_independent():
    toy = ToyDistribution(toy="8gaussians", scale=100, std=1)
    means = toy.mixture()[0].numpy()
    points = toy.sample(Philox(1), Stream.TARGET_POINTS, torch.arange(80_000)).numpy()
    nearest = np.linalg.norm(points[:, None] - means[None], axis=2).argmin(axis=1)
    assert np.abs(np.bincount(nearest) - 10_000).max() < 500
    for component in range(8):
        noise = points[nearest == component] - means[component]
        np.testing.assert_allclose(noise.mean(0), 0, atol=0.05)
        np.testing.assert_allclose(np.cov(noise.T), np.eye(2), atol=0.08)


def test_unequal_weights_are_the_shares_of_samples():
    toy = ToyDistribution(toy="swiss_roll", std=0.2)
    points = toy.sample(Philox(2), Stream.SOURCE_POINTS, torch.arange(50_000)).double()
    means, covariances, weights = toy.mixture()

    def log_density(x):
        exponent = -((x[:, None] - means) ** 2).sum(2) / (2 * 0.2**2)
        return torch.logsumexp(exponent + weights.log(), dim=1)

    # The entropy estimated from samples equals the mixture's own expectation by an independent sampler.
    generator = torch.Generator().manual_seed(0)
    component = torch.multinomial(weights, 50_000, replacement=True, generator=generator)
    independent = means[component] + 0.2 * torch.randn(50_000, 2, generator=generator, dtype=torch.float64)
    assert covariances[0].diagonal().tolist() == pytest.approx([0.04, 0.04])
    assert log_density(points).mean().item() == pytest.approx(log_density(independent).mean().item(), abs=0.02)
    np.testing.assert_allclose(
        np.histogram(points.norm(dim=1), bins=8, range=(0, 6))[0] / 50_000,
        np.histogram(independent.norm(dim=1), bins=8, range=(0, 6))[0] / 50_000,
        atol=0.015,
    )


def test_a_sample_depends_on_its_position_alone():
    toy = ToyDistribution(toy="two_moons", rotation=33)
    positions = torch.arange(1000) + 2**40
    whole = toy.sample(Philox(7), Stream.SOURCE_POINTS, positions)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    pieces = [toy.sample(Philox(7), Stream.SOURCE_POINTS, part) for part in positions[order].split(37)]
    assert torch.equal(torch.cat(pieces), whole[order])
    assert not torch.equal(whole, toy.sample(Philox(8), Stream.SOURCE_POINTS, positions))
    assert not torch.equal(whole, toy.sample(Philox(7), Stream.TARGET_POINTS, positions))


@pytest.mark.parametrize(("options", "message"), [
    ({"toy": "gaussian", "scale": 2.0}, "no scale"),
    ({"toy": "circles", "std": [0.1, 0.2]}, "one std"),
    ({"toy": "circles", "std": 0.0}, "greater than 0"),
    ({"toy": "swiss_roll", "std": 1e-4}, "raise std"),
    ({"toy": "gaussian", "mean": [math.nan, 0.0]}, "finite"),
    ({"toy": "blob"}, "8gaussians"),
    ({"toy": "gaussian", "radius": 1.0}, "radius|Extra"),
])  # fmt: skip
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        ToyDistribution(**options)
