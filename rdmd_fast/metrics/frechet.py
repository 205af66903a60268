"""Fréchet distance between Gaussian fits of two feature sets (Dowson and Landau 1982; FID uses it)."""

import numpy as np

from rdmd_fast.errors import InputError
from rdmd_fast.metrics.checks import fp64_rows


def _covariance_factor(features: np.ndarray) -> np.ndarray:
    """R [min(n, d), d] with R^T R = the unbiased covariance."""
    centred = features - features.mean(axis=0)
    return np.linalg.qr(centred / np.sqrt(len(features) - 1), mode="r")


def frechet_distance(features_a, features_b) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of features a [n, d] and b [m, d], in fp64.

    With S = R^T R the trace of the root is the sum of the singular values of R_a R_b^T. Squares are never
    formed, so near-singular covariances (n < d too) lose no digits, as they do in a matrix square root. Small
    n biases the distance upwards: compare only at equal n. Raises InputError for fewer than two samples,
    different d and values that are not finite.
    """
    a, b = fp64_rows(features_a, "features_a"), fp64_rows(features_b, "features_b")
    if a.shape[1] != b.shape[1]:
        raise InputError(f"features have {a.shape[1]} and {b.shape[1]} dimensions: use one feature network")
    if min(len(a), len(b)) < 2:
        raise InputError(f"features of {len(a)} and {len(b)} samples: a covariance needs two of each")
    factor_a, factor_b = _covariance_factor(a), _covariance_factor(b)
    root_trace = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    shift = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2)
    return float(max(0.0, shift + np.sum(factor_a**2) + np.sum(factor_b**2) - 2 * root_trace))
