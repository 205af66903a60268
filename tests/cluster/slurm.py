"""A Slurm of two nodes, controller on the first, for the trials of two_nodes.py; it ends with their namespaces."""

from __future__ import annotations

import secrets
from pathlib import Path

from nodes import Node, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sinfo")

CONFIGURATION = """\
ClusterName=trial
SlurmctldHost=node-a
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
NodeName=node-a CPUs=2
NodeName=node-b CPUs=2
PartitionName=all Nodes=ALL Default=YES OverSubscribe=FORCE MaxTime=INFINITE State=UP
"""


def start(nodes: list[Node], shared: Path) -> None:
    """Start munge and Slurm on both nodes, and let their later commands find it."""
    folder = shared / "slurm"
    (folder / "state").mkdir(parents=True)
    configuration, key = folder / "slurm.conf", folder / "munge.key"
    configuration.write_text(CONFIGURATION.format(folder=folder))
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    for node in nodes:
        node.environment = {**node.environment, "SLURM_CONF": str(configuration)}
        for place in ("munge", "slurmd"):
            node.run("mkdir", "-m", "755", f"/run/{place}")
        files = [f"--{name}-file=/run/munge/{name}" for name in ("pid", "log", "seed")]
        munged = ["munged", "--foreground", "--force", f"--key-file={key}", *files]
        node.start(munged, "/", folder / f"munged_{node.name}.log")
        wait_until(lambda node=node: node.run("munge", "-n", check=False), 20, f"no munge on {node.name}")
    nodes[0].start(["slurmctld", "-D"], "/", folder / "slurmctld.log")
    for node in nodes:
        node.start(["slurmd", "-D", "-N", node.name], "/", folder / f"slurmd_{node.name}.log")
    wait_until(lambda: _idle(nodes[0]) == 2, 60, f"no two idle nodes, see {folder}")


def _idle(node: Node) -> int:
    return node.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).count("node-")
