"""What the streams of a run could not read, and how long the steps waited for them."""

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from rdmd_fast.data.stream import SampleStream
from rdmd_fast.errors import InputError
from rdmd_fast.processes.world import World

_LISTED = 8  # shards that the error names


class StreamReport:
    """For metrics.jsonl. Every method is a collective call.

    Args:
        streams: by role, "source" or "target".
        max_dropped: share of a set's samples that may be unreadable before the run stops.
        world: whose ranks have each seen other samples.
    """

    def __init__(self, streams: Mapping[str, SampleStream], max_dropped: float, world: World):
        self._streams, self._max_dropped, self._world = dict(streams), max_dropped, world
        self._dropped = {role: np.zeros(stream.len, dtype=bool) for role, stream in self._streams.items()}
        self._warned: set[tuple[str, Path]] = set()
        self._waited = self._seconds_waited()
        for role, stream in self._streams.items():
            for shard in stream.shards.shards:
                if shard.faults:
                    self._warn(role, shard.path, shard.faults[0])

    def __call__(self, interval: float) -> dict:
        """The keys of a line: of the main rank's ``interval`` seconds the share that waited for data, and drops if any.

        Raises:
            InputError: too many samples cannot be read, on every rank alike.
        """
        waited, self._waited = self._seconds_waited() - self._waited, self._seconds_waited()
        dropped = self.check()
        return {"data_wait_share": min(1.0, waited / max(interval, 1e-9))} | (
            {"dropped_samples": dropped} if dropped else {}
        )

    def check(self) -> dict[str, dict[str, int]]:
        """Distinct samples that some rank could not read so far, by role and shard.

        Raises:
            InputError: they are more than ``max_dropped`` allows, on every rank alike.
        """
        own = {role: stream.dropped for role, stream in self._streams.items()}
        if self._world.any(any((own[role] & ~self._dropped[role]).any() for role in own)):
            for role, dropped in own.items():
                self._tell(role, dropped)
                seen = torch.from_numpy(dropped.astype(np.int32)).to(self._world.device)
                self._dropped[role] |= self._world.sum(seen).cpu().numpy() > 0
        counts = {role: self._by_shard(role) for role in self._streams}
        for role, of_role in counts.items():
            self._check_share(role, of_role)
        return {role: of_role for role, of_role in counts.items() if of_role}

    def _seconds_waited(self) -> float:
        return sum(stream.waited for stream in self._streams.values())

    def _by_shard(self, role: str) -> dict[str, int]:
        shards = self._streams[role].shards
        counts = np.array([shard.lost for shard in shards.shards])
        counts += np.bincount(shards.shard_of(np.flatnonzero(self._dropped[role])), minlength=len(counts))
        return {shards.shard_names[shard]: int(counts[shard]) for shard in np.flatnonzero(counts)}

    def _check_share(self, role: str, counts: dict[str, int]) -> None:
        shards = self._streams[role].shards
        total, gone = len(shards) + shards.lost, sum(counts.values())
        if gone <= self._max_dropped * total:
            return
        worst = sorted(counts, key=counts.get, reverse=True)
        listing = ", ".join(f"{name} ({counts[name]})" for name in worst[:_LISTED])
        if len(worst) > _LISTED:
            listing += f" and {len(worst) - _LISTED} more shards"
        raise InputError(
            f"data.{role} {shards.path}: {gone} of {total} samples cannot be read, more than data.max_dropped = "
            f"{self._max_dropped:g} allows: {listing}; copy or pack these shards again"
        )

    def _tell(self, role: str, dropped: np.ndarray) -> None:
        stream = self._streams[role]
        for index in np.flatnonzero(dropped & ~self._dropped[role]).tolist():
            shard = int(stream.shards.shard_of(index))
            if fault := stream.fault(index):  # else the process that has met it tells
                self._warn(role, stream.shards.shards[shard].path, fault)

    def _warn(self, role: str, shard: Path, fault: str) -> None:
        if (role, shard) not in self._warned:
            self._warned.add((role, shard))
            print(
                f"warning: data.{role}: {shard} is damaged ({fault}); what cannot be read is replaced by other samples",
                file=sys.stderr,
                flush=True,
            )
