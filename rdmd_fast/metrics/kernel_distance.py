"""Kernel distance between two feature sets (Bińkowski et al. 2018, arXiv 1801.01401; KID on Inception's features)."""

import numpy as np

from rdmd_fast.errors import InputError
from rdmd_fast.metrics.checks import fp64_rows
from rdmd_fast.randomness import Philox, Stream

SUBSETS, SUBSET_SIZE = 100, 1000


def squared_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of a [m, d] and b [n, d], kernel (<u, v> / d + 1)^3, in fp64.

    It can be negative: its expectation is zero where the two distributions are one.
    """
    dimensions = a.shape[1]
    within_a, within_b, across = ((u @ v.T / dimensions + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
    off_diagonal = [
        (kernel.sum() - np.trace(kernel)) / (len(kernel) * (len(kernel) - 1)) for kernel in (within_a, within_b)
    ]
    return float(sum(off_diagonal) - 2 * across.mean())


def kernel_distance(
    features_a, features_b, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = 0
) -> tuple[float, float]:
    """(mean, standard deviation) of ``squared_mmd`` over random subsets of features a [n, d] and b [m, d].

    Each subset draws ``subset_size`` rows of both without replacement, as many as the smaller set has if that is
    fewer. Where both sets are no larger than a subset all subsets are one: it is taken once, and the deviation is NaN.
    Raises InputError for fewer than two samples, different d and values that are not finite.
    """
    a, b = fp64_rows(features_a, "features_a"), fp64_rows(features_b, "features_b")
    if a.shape[1] != b.shape[1]:
        raise InputError(f"features have {a.shape[1]} and {b.shape[1]} dimensions: use one feature network")
    if min(len(a), len(b)) < 2:
        raise InputError(f"features of {len(a)} and {len(b)} samples: an unbiased estimate needs two of each")
    size = min(subset_size, len(a), len(b))
    if size == max(len(a), len(b)):
        return squared_mmd(a, b), float("nan")
    philox = Philox(seed)
    orders = [
        [_order(philox, 2 * subset + side, len(rows)) for subset in range(subsets)] for side, rows in enumerate((a, b))
    ]
    values = [squared_mmd(a[i[:size]], b[j[:size]]) for i, j in zip(*orders, strict=True)]
    return float(np.mean(values)), float(np.std(values))


def _order(philox: Philox, position: int, count: int) -> np.ndarray:
    return philox.permutation(Stream.METRIC_SUBSET, position, count).numpy()
