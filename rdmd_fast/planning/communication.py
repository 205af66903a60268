"""Bytes that a rank sends in an iteration at each ZeRO stage, by formula.

A ring of N ranks sends, for a payload of S bytes, 2 (N - 1)/N S a rank in an all-reduce and (N - 1)/N S in an
all-gather, a reduce-scatter, a reduce and a broadcast (the last two on average over ranks). Of a trained network of Ψ
parameters, w bytes each, an update moves, as DeepSpeed 0.19 does it with ``a`` micro-batches:

    stage 0   all-reduce of the gradients, once                                          2 Ψ
    stage 1   the same, then an all-gather of the new weights                            3 Ψ
    stage 2   an all-reduce each micro-batch, then an all-gather                         (2 a + 1) Ψ
    stage 3   an all-gather each pass of each micro-batch, a reduce-scatter each micro-batch

With ``use_multi_rank_bucket_allreduce: false`` stages 1 and 2 reduce to owners: Ψ in place of 2 Ψ. At stage 3 an
iteration of RDMD with k fake-score updates makes these passes a micro-batch: G forward and backward, and k - 1 forward
for fresh outputs; teacher one forward; fake score one forward without gradient, then k forward and k backward.
Activation checkpointing gathers most of the blocks' parameters once more in every backward pass. DeepSpeed's
prefetching, reuse distance and small parameters that stay (``ZeroSettings``) spare part of stage 3's gathers: the
formula is an upper bound there, and equal where they are set to 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from rdmd_fast.planning.planned_networks import PlannedNetwork, PlannedNetworks
from rdmd_fast.planning.zero_memory import WEIGHT_BYTES, ZeroSettings, shard_size


@dataclass(frozen=True)
class Payload:
    """Bytes of whole tensors that collectives of an iteration work on, by kind."""

    all_reduce: int = 0
    all_gather: int = 0
    reduce_scatter: int = 0
    reduce: int = 0

    def __add__(self, other: Payload) -> Payload:
        return Payload(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def sent(self, ranks: int) -> float:
        """Bytes sent by each of ``ranks``."""
        return (2 * self.all_reduce + self.all_gather + self.reduce_scatter + self.reduce) * (ranks - 1) / ranks


@dataclass(frozen=True)
class Passes:
    """How often an iteration runs a network, a micro-batch each, and updates it."""

    forward: int
    backward: int = 0
    updates: int = 0


def passes(stage: str, fake_updates: int) -> dict[str, Passes]:
    """Passes of each network in an iteration of ``stage``, by role; ``frozen`` is the teacher of the rdmd stage."""
    if stage == "teacher":
        return {"teacher": Passes(1, 1, 1)}
    return {
        "generator": Passes(fake_updates, 1, 1),
        "fake_score": Passes(1 + fake_updates, fake_updates, fake_updates),
        "frozen": Passes(1),
    }


def iteration_payload(
    networks: PlannedNetworks,
    settings: ZeroSettings,
    ranks: int,
    dtype: str,
    accumulation: int,
    fake_updates: int,
    checkpointing: bool,
) -> dict[str, Payload]:
    """Payloads of one iteration by role; votes, norms and overflow checks (some bytes each) are left out."""
    stage = "rdmd" if "generator" in networks.trained else "teacher"
    runs = passes(stage, fake_updates if "fake_score" in networks.trained else 1)
    weight = WEIGHT_BYTES[dtype]
    found = {}
    for role, network in networks.trained.items():
        run = runs[role]
        if settings.stage == 3:
            found[role] = _sharded(network, run, ranks, weight, accumulation, checkpointing)
        else:
            update = _replicated(network, settings, ranks, weight, accumulation)
            found[role] = sum((update for _ in range(run.updates)), Payload())
    if networks.frozen and stage == "rdmd" and settings.stage == 3:
        found["teacher"] = _sharded(networks.frozen, runs["frozen"], ranks, weight, accumulation, False)
    return found


def _replicated(network: PlannedNetwork, settings: ZeroSettings, ranks: int, weight: int, accumulation: int) -> Payload:
    gradients = weight * network.parameters * (accumulation if settings.stage == 2 else 1)
    if settings.stage == 0:
        return Payload(all_reduce=gradients)
    weights = weight * ranks * shard_size(network, settings.stage, ranks)
    if settings.reduces_to_owners:
        return Payload(reduce=gradients, all_gather=weights)
    return Payload(all_reduce=gradients, all_gather=weights)


def _sharded(
    network: PlannedNetwork, run: Passes, ranks: int, weight: int, accumulation: int, checkpointing: bool
) -> Payload:
    own = weight * ranks * shard_size(network, 3, ranks)
    whole = own + weight * sum(network.base)
    again = weight * network.gathered_again if checkpointing else 0
    gathered = (run.forward + run.backward) * whole + run.backward * again
    return Payload(all_gather=accumulation * gathered, reduce_scatter=accumulation * run.updates * own)
