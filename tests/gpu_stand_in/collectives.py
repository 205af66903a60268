"""NCCL without GPUs: gloo on host aliases of the device's tensors, under NCCL's name."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from tests.gpu_stand_in import device
from tests.gpu_stand_in.log import LAUNCH, WAIT

# PyTorch has a backend of the name nccl already, and takes no other under it.
NAME = "standinnccl"
FORWARDED = (
    "allreduce", "allreduce_coalesced", "broadcast", "reduce", "allgather", "_allgather_base", "reduce_scatter",
    "_reduce_scatter_base", "allgather_into_tensor_coalesced", "reduce_scatter_tensor_coalesced", "alltoall",
    "alltoall_base", "gather", "scatter", "send", "recv",
)  # fmt: skip
# Names of late, with options that gloo takes under the earlier ones.
RENAMED = {"all_gather_single": "_allgather_base", "reduce_scatter_single": "_reduce_scatter_base"}


def install() -> None:
    """Have ``nccl`` mean this backend wherever a group is made or asked for its name."""
    dist.Backend.register_backend(NAME, NcclOverGloo, devices=["cuda"])
    for name in ("init_process_group", "new_group"):
        _replace(name, _renaming(getattr(c10d, name)))
    get_backend = c10d.get_backend
    _replace("get_backend", lambda *group, **named: _outside(get_backend(*group, **named)))
    _replace("is_nccl_available", lambda: True)
    _replace("ProcessGroupNCCL", NcclOverGloo)


def _replace(name: str, function) -> None:
    setattr(c10d, name, function)
    setattr(dist, name, function)


def _renaming(function):
    def call(*arguments, **named):
        arguments = [NAME if value == "nccl" else value for value in arguments]
        return function(*arguments, **{key: NAME if value == "nccl" else value for key, value in named.items()})

    return call


def _outside(name: str) -> str:
    return "nccl" if name == NAME else name


class NcclOverGloo(dist.ProcessGroup):
    """A group whose tensors must be on the device."""

    def __init__(self, store, rank: int, size: int, timeout):
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(dist.PrefixStore(NAME, store), rank, size, timeout)

    def getBackendName(self) -> str:
        return "nccl"

    def _set_default_timeout(self, timeout) -> None:
        self._gloo._set_default_timeout(timeout)

    def barrier(self, *_, **__):
        device.report(WAIT, "nccl::barrier")
        return self._gloo.barrier()


def _on_host(value):
    if isinstance(value, torch.Tensor):
        if not value.is_cuda:
            raise RuntimeError("No backend type associated with device type cpu")
        return device.library().host_alias(value)
    return [_on_host(part) for part in value] if isinstance(value, (list, tuple)) else value


def _forwarding(name: str):
    def collective(self, *arguments, **options):
        device.report(LAUNCH, f"nccl::{name}")
        return getattr(self._gloo, name)(*map(_on_host, arguments), **options)

    return collective


def _forwarding_single(name: str, earlier: str):
    options_type = c10d.AllgatherOptions if "gather" in earlier else c10d.ReduceScatterOptions

    def collective(self, output, given, options=None, **_):
        device.report(LAUNCH, f"nccl::{name}")
        known = [options] if isinstance(options, options_type) else []
        return getattr(self._gloo, earlier)(_on_host(output), _on_host(given), *known)

    return collective


for _name in FORWARDED:
    setattr(NcclOverGloo, _name, _forwarding(_name))
for _name, _earlier in RENAMED.items():
    setattr(NcclOverGloo, _name, _forwarding_single(_name, _earlier))
