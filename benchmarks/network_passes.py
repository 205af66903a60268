"""Passes of networks, counted by hooks."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from torch import Tensor, nn


@contextlib.contextmanager
def count_passes(networks: dict[str, nn.Module]) -> Iterator[dict[str, Counter[str]]]:
    """Count passes of each network while entered, by kind.

    ``forward_with_graph`` keeps activations for a backward pass, ``forward`` does not, and ``backward`` is one through
    the network's output. More of the first than of the last: graphs that nothing needed.
    """
    counts: dict[str, Counter[str]] = {name: Counter() for name in networks}
    with contextlib.ExitStack() as stack:
        for name, network in networks.items():

            def count(module: nn.Module, inputs: tuple, output: Tensor, passes: Counter = counts[name]) -> None:
                passes["forward_with_graph" if output.requires_grad else "forward"] += 1
                if output.requires_grad:
                    output.register_hook(lambda gradient: passes.update(["backward"]))

            stack.callback(network.register_forward_hook(count).remove)
        yield counts


def passes_of(counts: dict[str, Counter[str]]) -> dict[str, dict[str, int]]:
    """Give the counts as plain numbers, with those of all networks together under ``all``."""
    total = sum(counts.values(), Counter())
    kinds = ("forward", "forward_with_graph", "backward")
    return {name: {kind: passes[kind] for kind in kinds} for name, passes in {**counts, "all": total}.items()}
