"""Bytes and launches of a training turn outside its networks, measured by running it.

    TRITON_INTERPRET=1 RDMD_KERNELS=triton python -m benchmarks.traffic      prints JSON

The turns are those of ``rdmd_fast.rdmd.RDMD``, run as they are with stand-ins for networks and engines. Triton
kernels run under the interpreter, where every load and store is seen with its mask: each element read or written
counts, twice if a kernel touches it twice. PyTorch operations are seen by a dispatch mode: all operands and results
of an operation count once, views are free. Per-sample tables and per-chunk partial sums (anything smaller than the
batch) count neither bytes nor launches; on the GPU they stay in cache.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

BATCH, SHAPE = 4, (3, 32, 32)  # small, since the interpreter is slow; the counts per element do not depend on it


@dataclass
class Traffic:
    """Running totals; a launch is one kernel or operation that touches a tensor of the batch's size."""

    bytes: int = 0
    launches: int = 0


class TorchTraffic(TorchDispatchMode):
    """Adds to ``traffic`` what PyTorch operations on tensors of at least ``large`` elements move."""

    def __init__(self, traffic: Traffic, large: int):
        super().__init__()
        self.traffic, self.large = traffic, large

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        launches = self.traffic.launches
        result = function(*args, **kwargs)
        if function.namespace == "prim":
            return result  # a question to a fake tensor, such as its device
        if function.namespace != "aten":
            # An operation of ours: its Triton launches were counted. Had there been none, its cost would be missed.
            if self.traffic.launches == launches and self._large((args, kwargs, result)):
                raise RuntimeError(f"{function} ran without a Triton launch; set RDMD_KERNELS=triton")
            return result
        if self._is_free(function, args, result):
            return result
        read = self._large((args, {key: value for key, value in kwargs.items() if key != "out"}))
        written = self._large(result) or self._large(self._mutated(function, args))
        name = function.overloadpacket.__name__
        if name.endswith("_like"):
            read = []  # it takes the shape alone
        elif name in ("copy_", "fill_", "zero_", "normal_"):
            read = read[1:]  # overwritten; other in-place operations read their first operand and write it
        if read or written:
            self.traffic.launches += 1
            self.traffic.bytes += sum(t.numel() * t.element_size() for t in read + written)
        return result

    def _large(self, tree) -> list[torch.Tensor]:
        leaves = torch.utils._pytree.tree_leaves(tree)
        # Storage, not shape: an expanded scalar is one number.
        return [
            leaf
            for leaf in leaves
            if isinstance(leaf, torch.Tensor)
            and leaf.numel() >= self.large
            and leaf.untyped_storage().nbytes() >= self.large * leaf.element_size()
        ]

    @staticmethod
    def _mutated(function, args) -> list:
        """What an operation that returns nothing writes, as foreach and fused optimizers do."""
        arguments = zip(function._schema.arguments, args, strict=False)
        return [value for argument, value in arguments if argument.alias_info and argument.alias_info.is_write]

    @staticmethod
    def _is_free(function, args, result) -> bool:
        name = function.overloadpacket.__name__
        if name.startswith(("empty", "new_empty")) or function.is_view or name in ("detach", "alias", "_unsafe_view"):
            return True
        # A cast to the same dtype returns its operand.
        return not function._schema.is_mutable and any(result is argument for argument in args)


@contextlib.contextmanager
def triton_traffic(traffic: Traffic, large: int):
    """Add to ``traffic`` what interpreted Triton kernels move in storages of at least ``large`` elements."""
    from triton.runtime import interpreter

    executor, builder = interpreter.GridExecutor, type(interpreter.interpreter_builder)
    launch, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
    small: list[tuple[int, int]] = []  # address ranges of tables and partial sums

    def storages(arguments):
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                storage = argument.untyped_storage()
                yield storage.data_ptr(), storage.nbytes(), argument.element_size()

    def counted_launch(self, *arguments, **keywords):
        all_storages = list(storages([*arguments, *keywords.values()]))
        small[:] = [(first, first + size) for first, size, element in all_storages if size < large * element]
        traffic.launches += any(size >= large * element for _, size, element in all_storages)
        with _disable_current_modes():
            return launch(self, *arguments, **keywords)

    def count(pointers, mask):
        addresses = pointers.data[mask.data] if mask.data.shape else pointers.data.reshape(-1)[mask.data.reshape(-1)]
        if not addresses.size:
            return
        first = int(addresses.flat[0])
        if not any(start <= first < end for start, end in small):
            traffic.bytes += addresses.size * max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    def counted_load(self, pointers, mask, *rest):
        count(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        count(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    executor.__call__ = counted_launch
    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    try:
        yield
    finally:
        executor.__call__ = launch
        builder.create_masked_load, builder.create_masked_store = load, store


CONVOLUTIONS = ("convolution",)
MATMULS = (*CONVOLUTIONS, "mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product")
"""Beginnings of the names of operations that are left out; backward passes begin alike."""


class NetworkTraffic(TorchTraffic):
    """All that a network's step moves outside ``but`` and collective operations."""

    def __init__(self, traffic: Traffic, but: tuple[str, ...] = CONVOLUTIONS):
        super().__init__(traffic, large=1)
        self.but = but

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__.startswith(self.but) or function.namespace == "c10d":
            return function(*args, **(kwargs or {}))
        return super().__torch_dispatch__(function, types, args, kwargs)


def network_traffic(step: Callable[[], object], but: tuple[str, ...] = CONVOLUTIONS) -> int:
    """Bytes that ``step()`` moves outside ``but``, were its fused operations launched as on a GPU.

    PyTorch operations are seen by a dispatch mode: operands and results count once each. In place of a Triton launch
    its reference runs, unseen, and the launch counts by the same rule: a tensor that a kernel passes over twice counts
    once, as it does for PyTorch's GroupNorm, which passes twice as well. Tables with a number a channel do not count.
    """
    from rdmd_fast.kernels import group_norm_silu as norm
    from rdmd_fast.kernels import scaled_residual as residual
    from rdmd_fast.networks import diffusers_unet, unet_layers

    traffic, attention = Traffic(), torch.nn.functional.scaled_dot_product_attention

    def forward(x, weight, bias, groups, eps, scale, shift, addend, silu, x_bias):
        traffic.bytes += 2 * x.numel() * x.element_size()
        with _disable_current_modes():
            y = norm.group_norm_silu_reference(x, weight, bias, groups, eps, scale, shift, addend, silu, x_bias)
            return y, x.new_zeros((4, *x.shape[:2]), dtype=torch.float32)

    def backward(
        dy, x, table, weight, bias, groups, scale, silu, wants_parameters, modulation_dtype, has_x_bias, branch=None
    ):
        traffic.bytes += (3 if branch is None else 4) * x.numel() * x.element_size()
        with _disable_current_modes():
            parameters = table.new_zeros((2 + has_x_bias, x.shape[1] if wants_parameters else 0))
            return torch.zeros_like(x), parameters, table.new_zeros((3, *x.shape[:2]), dtype=modulation_dtype)

    def scaled_sum(h, x, y, scale):
        traffic.bytes += (2 if x is None else 3) * h.numel() * h.element_size()
        with _disable_current_modes():
            return y.copy_((h if x is None else h + x) * scale)

    def biased_sum(h, x, scale, biases):
        traffic.bytes += 3 * h.numel() * h.element_size()
        with _disable_current_modes():
            return residual.scaled_residual_reference(h, x, scale, biases)

    def scaled_rows(dy, dx, scale, sums):
        traffic.bytes += (1 if dx is None else 2) * dy.numel() * dy.element_size()
        with _disable_current_modes():
            if dx is not None:
                dx.copy_(dy * scale)
            if sums is not None:
                sums.copy_(scale * dy.transpose(0, 1).flatten(1).float().sum(1))

    patches = (
        (norm, "backend", lambda device: "triton"), (residual, "backend", lambda device: "triton"),
        (norm, "group_norm_silu_forward", forward), (norm, "group_norm_silu_backward", backward),
        (residual, "_sum", scaled_sum), (residual, "_biased_sum", biased_sum), (residual, "_scaled_rows", scaled_rows),
        (unet_layers, "backend", lambda device: "triton"),
        (unet_layers, "attention", attention), (diffusers_unet, "attention", attention),
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        for module, name, replacement in patches:
            stack.enter_context(unittest.mock.patch.object(module, name, replacement))
        stack.enter_context(NetworkTraffic(traffic, but))
        step()
    return traffic.bytes


class Meter:
    """Counts one turn; ``pause`` and ``split`` serve the stand-ins of the networks."""

    def __init__(self, batch: int = BATCH, shape: tuple[int, ...] = SHAPE):
        self.elements = batch * math.prod(shape)
        self.traffic = Traffic()
        self.before_split: dict | None = None

    def split(self) -> None:
        """Report what came so far on its own."""
        self.before_split = self.report()
        self.traffic.bytes = self.traffic.launches = 0

    def report(self) -> dict:
        bytes_over_n = self.traffic.bytes / (4 * self.elements)
        return {"bytes_over_N": round(bytes_over_n, 4), "launches": self.traffic.launches}

    @contextlib.contextmanager
    def counting(self):
        with triton_traffic(self.traffic, self.elements), TorchTraffic(self.traffic, self.elements):
            yield


class _Network(torch.autograd.Function):
    """A network that costs nothing: fixed output forward, and backward it only keeps the gradient."""

    @staticmethod
    def forward(ctx, parameter, output, received):
        ctx.received = received
        return output.detach()

    @staticmethod
    def backward(ctx, gradient):
        ctx.received.append(gradient)
        return torch.zeros(()), None, None


class StandIn:
    """Network and DeepSpeed engine in one, of fixed random output in bf16.

    Attributes:
        received: gradients with respect to the output, one a backward pass.
    """

    def __init__(self, output: torch.Tensor, on_call=None):
        self.output, self.on_call = output, on_call
        self.parameter = torch.zeros((), requires_grad=True)
        self.received: list[torch.Tensor] = []

    def __call__(self, network_input, c_noise=None, class_labels=None):
        if self.on_call:
            self.on_call()
        return _Network.apply(self.parameter, self.output, self.received)

    def backward(self, loss, scale_wrt_gas=True):
        loss.backward()

    def fp16_enabled(self):
        return False

    def is_gradient_accumulation_boundary(self):
        return False

    def step(self):
        pass


def random_images(seed: int, dtype: torch.dtype, batch: int = BATCH, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    values = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.to(memory_format=torch.channels_last)


def stand_in(weighting: str, meter: Meter):
    """An ``RDMD`` whose networks, data and engines are stand-ins."""
    from rdmd_fast.diffusion import DiffusionOptions, Reading
    from rdmd_fast.engine.batch_layout import BatchLayout
    from rdmd_fast.engine.stage_context import StageContext
    from rdmd_fast.randomness import Philox
    from rdmd_fast.rdmd import RDMD, Networks, RDMDOptions

    diffusion = DiffusionOptions()
    generator, fake_score, teacher = (
        StandIn(random_images(seed, torch.bfloat16), on_call)
        for seed, on_call in ((1, meter.split), (2, None), (3, None))
    )
    x = random_images(4, torch.float32)
    source = SimpleNamespace(shape=SHAPE, batch=lambda positions: x)
    telemetry = SimpleNamespace(phase=lambda name: contextlib.nullcontext(), add=lambda *_: None)
    rdmd = RDMD(
        RDMDOptions(weighting=weighting), diffusion, Reading.of("teacher", diffusion, 1.0),
        Networks(generator, fake_score, teacher), source,
        StageContext(
            Philox(2**40 + 1), BatchLayout(BATCH, BATCH, 1, 0, 1), torch.device("cpu"), torch.bfloat16, telemetry
        ),
    )  # fmt: skip
    for process in (rdmd.generator_process, rdmd.fake_process):
        # On the CPU noise is drawn ahead, in large blocks; here the kernels shall draw it, as on a GPU.
        table, noise = process.draw(rdmd.context.layout.positions(0, 0))
        process.draw = functools.partial(lambda drawn, *_: drawn, (table, noise._replace(drawn=None)))
    return rdmd


def our_turns() -> dict:
    """Turns of the training path as it is."""
    turns = {}
    for name, weighting in (("generator", "sigma2"), ("generator_uniform", "uniform"), ("generator_dmd", "dmd")):
        meter = Meter()
        rdmd = stand_in(weighting, meter)
        with meter.counting():
            outputs = rdmd.update_generator(0)
        turns[name] = meter.report()
        turns["generator_input"] = meter.before_split
    meter = Meter()
    rdmd = stand_in("uniform", meter)
    outputs = [(y.contiguous(memory_format=torch.channels_last), weight) for y, weight in outputs]
    with meter.counting():
        rdmd.update_fake_score(outputs)
    turns["fake"] = meter.report()
    return turns


def eager_turns() -> dict:
    """Turns of the plain formulation."""
    from benchmarks import plain_kernels

    meter = Meter()
    generator = StandIn(random_images(1, torch.bfloat16), meter.split)
    teacher, fake_score = (StandIn(random_images(seed, torch.bfloat16)) for seed in (2, 3))
    x, y = (random_images(seed, torch.float32) for seed in (4, 5))
    sigma = torch.linspace(0.1, 2.0, BATCH)
    with meter.counting():
        plain_kernels.generator_turn(generator, teacher, fake_score, x, sigma, 0.05)
    turns = {"eager_generator": meter.report(), "eager_generator_input": meter.before_split}
    meter = Meter()
    with meter.counting():
        plain_kernels.fake_turn(fake_score, y, sigma)
    return {**turns, "eager_fake": meter.report()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump({**our_turns(), **eager_turns()}, sys.stdout)
