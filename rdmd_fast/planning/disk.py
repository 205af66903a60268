"""Bytes on disk: a checkpoint, what is kept of them, an export."""

from dataclasses import dataclass

from rdmd_fast.planning.planned_networks import PlannedNetworks

MASTER_AND_MOMENTS = 12


@dataclass(frozen=True)
class DiskUse:
    """Bytes. ``kept`` checkpoints stay, and one more lies beside them while it is written."""

    checkpoint: int
    kept: int
    export: int

    @property
    def peak(self) -> int:
        return self.checkpoint * (self.kept + 1)


def disk_use(networks: PlannedNetworks, keep: int) -> DiskUse:
    """Masters and moments of the trained networks, one EMA, buffers: independent of ranks and ZeRO stage.

    File headers, random states and manifests (some 100 KB) are left out.
    """
    averaged = networks.trained[networks.averaged]
    states = sum(MASTER_AND_MOMENTS * network.parameters + network.buffers for network in networks.trained.values())
    export = 4 * averaged.parameters + averaged.buffers
    return DiskUse(states + 4 * averaged.parameters, keep, export)
