"""A generator as a graph of plain operators, for programs that have no rdmd_fast: torch.export or ONNX.

The graph is a function of ``images``, float32 [N, C, H, W] in [-1, 1] (points: [N, D]) with N free, and, for a
generator of a range of λ, of ``transport_weight``, float32 [N]; it returns float32 of the images' shape. It is traced
on the CPU, where every operation of ours is its PyTorch reference, so it holds ATen or ONNX operators and no others.
"""

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from rdmd_fast.errors import InputError
from rdmd_fast.extras import require
from rdmd_fast.model_files.models import Generator
from rdmd_fast.randomness import Philox, Stream
from rdmd_fast.transport_weight import with_condition

FILES = {"torch-export": "generator.pt2", "onnx": "generator.onnx"}
BATCHES = (1, 2, 5)  # of which none but the second is traced
TOLERANCE = 1e-3
"""Largest difference to the generator itself, over the largest output or 1: an eighth of a level of 8-bit images."""

Call = Callable[..., torch.Tensor]


class Graph(torch.nn.Module):
    """What is traced: ``Generator`` without checks of values, which a graph cannot make. λ is cut to its range."""

    def __init__(self, generator: Generator):
        super().__init__()
        self.model, self.reading, self.bounds = generator.model, generator.reading, generator.config.weight_range
        classes, target = generator.config.classes, generator.config.target_class
        labels = torch.zeros(1, classes) if classes else None
        if classes and target is not None:
            labels[0, target] = 1
        self.register_buffer("labels", labels)

    def forward(self, images: torch.Tensor, transport_weight: torch.Tensor | None = None) -> torch.Tensor:
        network = self.model
        if transport_weight is not None:
            network = with_condition(self.model, {"condition": self.bounds.to_condition(transport_weight)})
        labels = None if self.labels is None else self.labels.expand(images.shape[0], -1)
        return self.reading(network, images, labels)


def write_graph(generator: Generator, kind: str, folder: Path) -> float:
    """Write ``FILES[kind]`` into ``folder`` and compare what is read back from it with the generator.

    Args:
        generator: on the CPU, float32.

    Returns:
        The largest difference over inputs of every size in ``BATCHES``, as ``TOLERANCE`` counts it.

    Raises:
        InputError: packages are missing, the network cannot be traced, or the difference is above ``TOLERANCE``.
    """
    if kind == "onnx":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            require(module, "onnx")
    with _quiet(), torch.no_grad():
        try:
            program = _trace(generator)
        except Exception as error:  # whatever torch makes of it
            raise InputError(f"--format {kind}: this network cannot be traced ({_reason(error)})") from None
        path = folder / FILES[kind]
        write, read = {"torch-export": (_write_torch, _read_torch), "onnx": (_write_onnx, _read_onnx)}[kind]
        write(program, generator, path)
        difference = _difference(generator, read(path))
    if not difference <= TOLERANCE:  # NaN, too
        raise InputError(
            f"--format {kind}: what was written differs from the generator by {difference:.2g} where {TOLERANCE:g} is "
            "allowed, so it was removed; export safetensors, or try other versions of torch and onnxruntime"
        )
    return difference


def plain_operators(program: torch.export.ExportedProgram) -> None:
    """Raise InputError for an operator of anyone but PyTorch."""
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prims"):
            raise InputError(f"the graph holds {node.target}, which is no operator of PyTorch")


def _trace(generator: Generator) -> torch.export.ExportedProgram:
    inputs = probe(generator, 2)
    batch = torch.export.Dim("batch")
    with reference_kernels():
        program = torch.export.export(Graph(generator).eval(), inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
    plain_operators(program)
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node"):  # paths of this machine
                    node.meta.pop(key, None)
    return program


@contextlib.contextmanager
def reference_kernels() -> Iterator[None]:
    """Kernels of ours are their references, whatever RDMD_KERNELS says."""
    before = os.environ.get("RDMD_KERNELS")
    os.environ["RDMD_KERNELS"] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ["RDMD_KERNELS"]
        else:
            os.environ["RDMD_KERNELS"] = before


def probe(generator: Generator, count: int) -> tuple[torch.Tensor, ...]:
    """Inputs of a graph: uniform in [-1, 1], and λ over its range."""
    positions, shape = torch.arange(count) + (count << 8), tuple(generator.config.sample_shape)
    uniform = Philox(0).uniform(Stream.EVALUATION, positions, math.prod(shape) + 1)
    images = (2 * uniform[:, 1:] - 1).float().view(count, *shape)
    if generator.transport_weights is None:
        return (images,)
    low, high = generator.transport_weights
    return images, (low * (high / low) ** uniform[:, 0]).float()


def _difference(generator: Generator, call: Call) -> float:
    worst = 0.0
    for count in BATCHES:
        inputs = probe(generator, count)
        with reference_kernels():
            expected = generator(*inputs)
        found = call(*inputs)
        if found.shape != expected.shape:
            raise InputError(f"the graph returns shape {list(found.shape)} for a batch of {list(expected.shape)}")
        difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
        worst = difference if difference != difference else max(worst, difference)
        if worst != worst:
            break
    return worst


def _write_torch(program: torch.export.ExportedProgram, generator: Generator, path: Path) -> None:
    torch.export.save(program, path)


def _read_torch(path: Path) -> Call:
    return torch.export.load(path).module()


def _write_onnx(program: torch.export.ExportedProgram, generator: Generator, path: Path) -> None:
    names = ["images", "transport_weight"] if generator.transport_weights else ["images"]
    try:
        exported = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=names, output_names=["translated"]
        )
    except Exception as error:  # an operator that ONNX lacks, in many words
        raise InputError(f"--format onnx: this network cannot be converted ({_reason(error)})") from None
    for node in exported.model.graph.all_nodes():
        node.metadata_props.clear()
    exported.save(path)  # weights of more than 2 GiB go into a file beside it


def _read_onnx(path: Path) -> Call:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        arrays = {name: each.numpy() for name, each in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, arrays)[0])

    return call


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks about packages and deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
