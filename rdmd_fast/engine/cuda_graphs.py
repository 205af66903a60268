"""train.cuda_graphs: a network's passes are recorded once as CUDA graphs and replayed, a launch each for hundreds.

PyTorch's ``make_graphed_callables`` records in the same order, but does not fit networks that DeepSpeed trains:

- Its gradients' memory becomes ``.grad`` itself. A second micro-batch writes over what it should add to
  (pytorch/pytorch#181723), and parameters that have one gradient share it, which fused Adam then divides twice.
- It keeps the recorded autograd graph, and with it the nodes that put gradients down, on the recording's stream: each
  backward pass would change streams at every parameter.
- It takes neither None nor keywords, and broadcasts a batch of another size.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves, tree_map_only

WARM_UP = 3  # passes before a recording, as PyTorch's: what is compiled, chosen or allocated at a first call


def replay_passes(network: nn.Module, micro_batch: int, accumulates: bool) -> None:
    """Replay a network's passes over a micro-batch; in place, names of parameters and modules stay.

    Args:
        network: on its GPU, where its parameters stay; in training or evaluation as it will be called.
        micro_batch: samples of the calls that are replayed. Others run as written.
        accumulates: whether gradients of several backward passes add up.
    """
    _release_nodes(network)
    network.forward = ReplayedForward(network, micro_batch, accumulates)


def _release_nodes(network: nn.Module) -> None:
    """Drop what of autograd DeepSpeed keeps at ZeRO 1 and 2: views of the weights, made while it was on.

    By them the nodes that put gradients down outlive every pass, and are of the default stream: a backward pass that is
    recorded on another stream would have that one wait for it, which CUDA refuses.
    """
    for parameter in network.parameters():
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            mapping.lp_fragment = mapping.lp_fragment.detach()


class ReplayedForward:
    """A network's ``forward``: records the first call with ``micro_batch`` samples, and replays it for calls alike.

    The next call overwrites what the last one returned and, unless gradients accumulate, what its backward pass put
    into ``.grad``. A backward pass comes before the next call.
    """

    def __init__(self, network: nn.Module, micro_batch: int, accumulates: bool):
        self._network, self._written, self._training = network, network.forward, network.training
        self._micro_batch, self._accumulates = micro_batch, accumulates
        self._passes: RecordedPasses | None = None

    def __call__(self, *arguments: Tensor | None, **keywords: Tensor | None) -> Tensor:
        if not self._is_replayed(arguments, keywords):
            return self._written(*arguments, **keywords)
        if self._passes is None:
            parameters = [each for each in self._network.parameters() if each.requires_grad]
            self._passes = RecordedPasses(self._written, parameters, self._accumulates, arguments, keywords)
        return self._passes.replay(arguments, keywords)

    def _is_replayed(self, arguments: tuple, keywords: dict) -> bool:
        if len(arguments[0]) != self._micro_batch or self._network.training != self._training:
            return False
        if torch.is_grad_enabled() and any(each.requires_grad for each in _tensors(arguments, keywords)):
            return False
        return self._passes is None or self._passes.layout == _layout(arguments, keywords)


class RecordedPasses:
    """A forward pass and, of trained parameters, its backward pass, as CUDA graphs with memory of their own.

    Args:
        forward: as written.
        parameters: what gradients are wanted of; they may be updated, but not moved.
        accumulates: give gradients in new memory, not where the next passes write.
        arguments, keywords: of a first call, tensors or None.

    Attributes:
        layout: what calls alike have in common.
        calls: how many there were.
        output: of the latest call.
    """

    def __init__(
        self, forward: Callable, parameters: list[Tensor], accumulates: bool, arguments: tuple, keywords: dict
    ):
        self.layout, self._parameters, self._accumulates = _layout(arguments, keywords), parameters, accumulates
        arguments, keywords = tree_map_only(Tensor, lambda each: each.detach().clone(), (arguments, keywords))
        self._inputs = _tensors(arguments, keywords)
        self.calls = 0
        self._forward_graph, self._backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        random_state = torch.cuda.get_rng_state()  # a run that goes on records again: dropout must not notice
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.set_grad_enabled(bool(parameters)):
            for _ in range(WARM_UP):
                output = forward(*arguments, **keywords)
                self._output_gradient = torch.zeros_like(output)
                self._find_gradients(output)
            del output  # with nodes of the autograd graph, which are to be made anew in the recording
            with _recording(self._forward_graph, stream):
                output = forward(*arguments, **keywords)
            if parameters:
                with _recording(self._backward_graph, stream, self._forward_graph.pool()):
                    self._gradients = self._find_gradients(output)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.set_rng_state(random_state)
        self.output = output.detach()

    def replay(self, arguments: tuple, keywords: dict) -> Tensor:
        for recorded, given in zip(self._inputs, _tensors(arguments, keywords), strict=True):
            recorded.copy_(given)
        self.calls += 1
        if self._parameters and torch.is_grad_enabled():
            return _Replay.apply(self, *self._parameters)
        return self.replay_forward()

    def replay_forward(self) -> Tensor:
        self._forward_graph.replay()
        return self.output.detach()

    def replay_backward(self, call: int, gradient: Tensor) -> list[Tensor | None]:
        """Gradients of the parameters from that of the output of call number ``call``.

        Raises:
            RuntimeError: another call came in between, and has overwritten the activations.
        """
        if call != self.calls:
            raise RuntimeError(
                "train.cuda_graphs: a network was called again before the backward pass of its last call"
            )
        self._output_gradient.copy_(gradient)
        self._backward_graph.replay()
        if not self._accumulates:
            return [each if each is None else each.detach() for each in self._gradients]
        kept = [each if each is None else torch.empty_like(each) for each in self._gradients]
        torch._foreach_copy_([each for each in kept if each is not None], _tensors(self._gradients))
        return kept

    def _find_gradients(self, output: Tensor) -> list[Tensor | None]:
        """As ``.grad`` wants them, so that autograd need not copy them: contiguous, each in a place of its own."""
        if not self._parameters:
            return []
        found = torch.autograd.grad(output, self._parameters, self._output_gradient, allow_unused=True)
        places, gradients = {self._output_gradient.data_ptr()}, []
        for each in found:
            if each is not None:
                each = each.contiguous()
                each = each.clone() if each.data_ptr() in places else each
                places.add(each.data_ptr())
            gradients.append(each)
        return gradients


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, passes: RecordedPasses, *parameters: Tensor) -> Tensor:
        ctx.passes, ctx.call = passes, passes.calls
        return passes.replay_forward()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.passes.replay_backward(ctx.call, gradient)


def _recording(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, *pool) -> torch.cuda.graph:
    # Threads that read data or watch over NCCL go on meanwhile.
    return torch.cuda.graph(graph, *pool, stream=stream, capture_error_mode="thread_local")


def _tensors(*values) -> list[Tensor]:
    return [each for each in tree_leaves(values) if each is not None]


def _layout(arguments: tuple, keywords: dict) -> tuple:
    """Which arguments there are, with shapes and types."""
    named = [*enumerate(arguments), *sorted(keywords.items())]
    return tuple((name, each.shape, each.dtype) for name, each in named if each is not None)
