"""Bytes of activations in an iteration, by running it on shapes alone.

Forward and backward passes of the stage's own networks run on the meta device in the order of rdmd.py and teacher.py,
while ``LiveStorages`` follows every tensor. With ``fused`` the kernels' operations stand in for the references, as on a
GPU; attention keeps queries, keys, values, output and a number a query, as flash attention does on CPU and GPU.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rdmd_fast.engine.options import DTYPES
from rdmd_fast.kernels._dispatch import using
from rdmd_fast.planning.live_memory import LiveStorages
from rdmd_fast.planning.planned_networks import PlannedNetwork, PlannedNetworks


@dataclass(frozen=True)
class Activations:
    """Bytes.

    Attributes:
        saved: what is alive after a forward pass of each trained network, its input left out.
        peak: all of an iteration at its height, batches and gradients with respect to activations included;
            parameters and their gradients are not.
    """

    saved: dict[str, int]
    peak: int


def activations(
    networks: PlannedNetworks,
    micro_batch: int,
    accumulation: int,
    dtype: str,
    checkpointing: bool,
    fused: bool,
    device: str = "meta",
) -> Activations:
    """Activations of one iteration: ``accumulation`` micro-batches of ``micro_batch`` samples.

    On another device than "meta" the passes really run, on networks as initialised and uninitialised samples, and
    nothing stands in (``fused`` has no effect): what is measured there is what is predicted here.

    Raises:
        InputError: a network does not fit its samples.
    """
    held = {role: _prepare(network, dtype, checkpointing, device) for role, network in networks.trained.items()}
    teacher = _prepare(networks.frozen, dtype, False, device) if networks.frozen else None
    if teacher:
        teacher.requires_grad_(False).eval()
    shape = next(iter(networks.trained.values())).shape
    tracker = LiveStorages(tensor for network in (*held.values(), teacher) if network for tensor in _states(network))
    standing_in = _shapes_alone(fused) if device == "meta" else contextlib.nullcontext()
    with torch.device(device), standing_in, tracker:
        iteration = _Iteration(tracker, micro_batch, accumulation, shape, DTYPES[dtype])
        if "generator" in held:
            iteration.distil(held["generator"], held.get("fake_score"), teacher)
        else:
            iteration.train_teacher(held["teacher"])
    return Activations(iteration.saved, tracker.peak)


class _Iteration:
    """The passes of an iteration; local variables live as long as in the stages."""

    def __init__(self, tracker: LiveStorages, batch: int, accumulation: int, shape: tuple, dtype: torch.dtype):
        self.tracker, self.batch, self.accumulation = tracker, batch, accumulation
        self.shape, self.dtype = (batch, *shape), dtype
        self.saved: dict[str, int] = {}

    def samples(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(self.shape, dtype=dtype)

    def forward(self, role: str, network: nn.Module, network_input: Tensor) -> Tensor:
        before = self.tracker.live
        output = network(network_input, torch.empty(self.batch))
        self.saved[role] = self.tracker.live - before
        return output

    def distil(self, generator: nn.Module, fake_score: nn.Module | None, teacher: nn.Module | None) -> None:
        outputs = [self.samples() for _ in range(self.accumulation - 1)]
        x = self.samples()
        f_generator = self.forward("generator", generator, self.samples(self.dtype))
        with torch.no_grad():
            network_input, y = self.samples(self.dtype), self.samples()
            scores = [score(network_input, torch.empty(self.batch)) for score in (teacher, fake_score) if score]
            gradient = torch.empty_like(f_generator)
        outputs.append(y)
        torch.autograd.backward(f_generator, gradient)
        del x, f_generator, network_input, scores, gradient
        if fake_score is None:
            return
        network_input = self.samples(self.dtype)
        f_fake = self.forward("fake_score", fake_score, network_input)
        torch.autograd.backward(f_fake, torch.empty_like(f_fake))

    def train_teacher(self, network: nn.Module) -> None:
        y, network_input = self.samples(), self.samples(self.dtype)
        output = self.forward("teacher", network, network_input)
        torch.autograd.backward(output, torch.empty_like(output))
        del y


def _prepare(planned: PlannedNetwork, dtype: str, checkpointing: bool, device: str) -> nn.Module:
    network = planned.build(device).to(DTYPES[dtype]).train()
    if checkpointing and hasattr(network, "checkpointing"):
        network.checkpointing = True
    for parameter in filter(lambda parameter: parameter.requires_grad, network.parameters()):
        # Gradients of parameters are counted with the model states.
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
    return network


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _states(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


class _FlashShapes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        normalizers = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, normalizers)
        return output

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(part) for part in ctx.saved_tensors[:3])


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, *options, **more) -> Tensor:
    return _FlashShapes.apply(query, key, value)


@contextlib.contextmanager
def _shapes_alone(fused: bool) -> Iterator[None]:
    """Have the meta device do as a GPU does; by itself it attends by products, which form L × L matrices."""
    with torch.library._scoped_library("aten", "IMPL") as aten, using("shapes" if fused else "reference"):
        aten.impl("scaled_dot_product_attention", _flash_attention, "AutogradMeta")
        yield
