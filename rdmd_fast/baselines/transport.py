"""Transport maps of 2-D points: exact optimal transport, and minibatch optimal transport (POT, network simplex).

Both map samples onto samples: an exact discrete optimum of the squared cost, with no model behind it.
"""

import numpy as np

from rdmd_fast.errors import InputError
from rdmd_fast.metrics.checks import fp64_rows
from rdmd_fast.metrics.exact_transport import optimal_transport
from rdmd_fast.randomness import Philox, Stream


def exact_map(x, target) -> np.ndarray:
    """The optimal assignment of x [n, d] to as many samples of the target: float64 [n, d], rows of ``target``.

    Minimises Σ |x_i - y_i|². Fast up to some 3,000 points. Raises InputError for unequal numbers of points.
    """
    target = fp64_rows(target, "target points")
    return target[optimal_transport(x, target)[1]]


def minibatch_map(x, target, batch: int, seed: int) -> np.ndarray:
    """The optimal assignment inside random batches of ``batch`` points, as minibatch-OT pairs them (Fatras et al.,
    arXiv 2101.01792): float64 [n, d], a permutation of ``target``.

    Sources and targets are dealt to batches independently by ``seed``; the last batch holds what remains. Costs no less
    than ``exact_map``, which it is if one batch holds all.

    Raises:
        InputError: unequal numbers of points, or a batch below 1.
    """
    x, target = fp64_rows(x, "x"), fp64_rows(target, "target points")
    if len(x) != len(target):
        raise InputError(f"{len(x)} points against {len(target)}: an assignment needs as many of each")
    if batch < 1:
        raise InputError(f"batch {batch}: must be at least 1")
    philox = Philox(seed)
    orders = [philox.permutation(Stream.MINIBATCH_PAIRS, which, len(x)).numpy() for which in (0, 1)]
    mapped = np.empty_like(x)
    for first in range(0, len(x), batch):
        sources, targets = (order[first : first + batch] for order in orders)
        mapped[sources] = exact_map(x[sources], target[targets])
    return mapped
