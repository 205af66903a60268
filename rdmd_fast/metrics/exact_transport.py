"""Exact optimal transport between point clouds, and the report on a toy generator.

Discrete transport costs are biased upwards by sampling: read ``squared_w2`` against ``noise_floor``, the same
number between two independent samples of the target.
"""

import numpy as np

from rdmd_fast.errors import InputError
from rdmd_fast.extras import require
from rdmd_fast.metrics.checks import fp64_rows

MAX_SIMPLEX_ITERATIONS = 10_000_000
PAIR_BLOCK = 256


def _costs(a, b) -> np.ndarray:
    a, b = fp64_rows(a, "first point cloud"), fp64_rows(b, "second point cloud")
    if a.shape[1] != b.shape[1]:
        raise InputError(f"point clouds have {a.shape[1]} and {b.shape[1]} dimensions: give the same space")
    return require("scipy.spatial.distance", "toy").cdist(a, b, "sqeuclidean")


def _plan(costs: np.ndarray) -> np.ndarray:
    ot = require("ot", "toy")
    plan, log = ot.emd([], [], costs, numItermax=MAX_SIMPLEX_ITERATIONS, log=True)
    if log["warning"]:
        raise InputError(f"exact transport of {costs.shape} points failed ({log['warning']}): give fewer points")
    return plan


def squared_w2(a, b) -> float:
    """Squared 2-Wasserstein distance of uniform point clouds a [n, d] and b [m, d], in data units squared.

    Exact (network simplex): fast up to some 3,000 points. Raises InputError when POT is missing or an input
    is not a finite matrix.
    """
    costs = _costs(a, b)
    return float(np.vdot(_plan(costs), costs))


def optimal_transport(x, target) -> tuple[float, np.ndarray]:
    """(mean cost |x_i - target_j|^2, assignment j of each i, int64 [n]) of the exact transport of x [n, d].

    Raises InputError unless both clouds have the same number of points: only then is the plan a permutation.
    """
    costs = _costs(x, target)
    if costs.shape[0] != costs.shape[1]:
        raise InputError(f"{costs.shape[0]} points against {costs.shape[1]}: an assignment needs as many of each")
    assignment = _plan(costs).argmax(axis=1)
    return float(costs[np.arange(len(costs)), assignment].mean()), assignment


def noise_floor(target_a, target_b) -> float:
    """Squared W2 between two independent samples of the target: what a perfect generator scores."""
    return squared_w2(target_a, target_b)


def minibatch_ot_cost(x, y, batch: int, seed: int) -> float:
    """Mean exact transport cost inside random batches of x [n, d] and y [m, d], as minibatch-OT pairing pays.

    The samples are shuffled by ``seed`` and the last incomplete batch is left out. At least the exact cost
    between the whole clouds used, and it falls towards it as ``batch`` grows. Raises InputError for too few
    samples.
    """
    x, y = fp64_rows(x, "x"), fp64_rows(y, "y")
    batches = min(len(x), len(y)) // batch if batch > 0 else 0
    if batches == 0:
        raise InputError(f"batch {batch} does not fit {min(len(x), len(y))} samples: give 1 to that many")
    rng = np.random.default_rng(seed)
    x, y = rng.permutation(x)[: batches * batch], rng.permutation(y)[: batches * batch]
    pairs = zip(np.split(x, batches), np.split(y, batches), strict=True)
    return float(np.mean([squared_w2(a, b) for a, b in pairs]))


def monotonicity_violations(x, y) -> float:
    """Share of pairs i < j with <x_i - x_j, y_i - y_j> < 0, for samples x, y [n, d] of a map.

    Zero for an optimal transport map of the squared cost (it is monotone), one half for independent pairs.
    """
    x, y = fp64_rows(x, "x"), fp64_rows(y, "y")
    if x.shape != y.shape or len(x) < 2:
        raise InputError(f"x and y have shapes {list(x.shape)} and {list(y.shape)}: give two pairs or more")
    violations = 0
    for start in range(0, len(x), PAIR_BLOCK):
        block = slice(start, start + PAIR_BLOCK)
        # Differences before products: expanding the inner product would lose the sign of close pairs.
        inner = sum(
            np.subtract.outer(x[block, k], x[:, k]) * np.subtract.outer(y[block, k], y[:, k]) for k in range(x.shape[1])
        )
        violations += np.count_nonzero(inner < 0)
    return float(violations / (len(x) * (len(x) - 1)))


def toy_report(x, y, target_1, target_2) -> dict[str, float | int]:
    """Quality and cost of a toy generator y = G(x) [n, d]; target_1, target_2 [m, d] are independent samples.

    Keys (costs in data units squared): ``samples`` n, ``target_samples`` m, ``squared_w2`` of y to target_1,
    ``noise_floor`` of target_1 to target_2, ``transport_cost`` mean |x - y|^2, ``ot_cost`` of the exact
    transport of x onto target_1, ``ot_cost_to_output`` of x onto y (equal to transport_cost when G is the
    optimal map onto its own output, Theorem 3.1 of the paper), and ``monotonicity_violations``.
    """
    x, y = fp64_rows(x, "x"), fp64_rows(y, "y")
    violations = monotonicity_violations(x, y)
    return {
        "samples": len(y),
        "target_samples": len(target_1),
        "squared_w2": squared_w2(y, target_1),
        "noise_floor": noise_floor(target_1, target_2),
        "transport_cost": float(np.sum((x - y) ** 2, axis=1).mean()),
        "ot_cost": squared_w2(x, target_1),
        "ot_cost_to_output": squared_w2(x, y),
        "monotonicity_violations": violations,
    }
