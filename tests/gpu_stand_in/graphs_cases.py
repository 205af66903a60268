"""CUDA graphs: what the stand-in makes of them, and networks whose passes replay (train.cuda_graphs).

Not collected by itself: test_graphs.py runs it in a process of its own, where the stand-in is in place.
"""

import json
from argparse import Namespace

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional

from benchmarks.step_sides import Ours
from rdmd_fast.engine.cuda_graphs import replay_passes
from rdmd_fast.kernels.scaled_residual import scaled_residual
from rdmd_fast.trainer import train
from tests.gpu_stand_in.device import recording
from tests.gpu_stand_in.iteration import build_config
from tests.gpu_stand_in.log import LAUNCH, WAIT

BATCH = 4


def ones(*shape, **options):
    return torch.ones(*shape, device="cuda", **options)


def capture(function, *pool):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, *pool):
        result = function()
    return graph, result


# -- the stand-in's graphs ---------------------------------------------------------------------------------------------


def foreach_add_(x):
    torch._foreach_add_([x], 1.0)
    return x


PASSES = {
    "new results": lambda x: (x * 2).sum(),
    "in place": lambda x: x.clone().mul_(2).add_(x),
    "a view written": lambda x: x.clone().t()[1:].fill_(5),
    "out": lambda x: torch.add(x, x, out=torch.empty(0, device="cuda")),
    "lists": lambda x: torch.stack(torch._foreach_mul([x, x + 1], 3.0)),
    "foreach in place": lambda x: foreach_add_(x.clone()),
    "a copy": lambda x: torch.empty_like(x, dtype=torch.bfloat16).copy_(x),
    "of nothing": lambda x: torch.arange(4, device="cuda") + torch.zeros(4, device="cuda"),
    "a number of the host": lambda x: x + torch.tensor(2.0),
    "attention": lambda x: functional.scaled_dot_product_attention(*3 * [x.expand(1, 1, 4, 4)]),
    "ours": lambda x: scaled_residual(*2 * [x.expand(1, 1, 4, 4).contiguous()], 0.5),
}


@pytest.mark.parametrize("name", PASSES)
def test_a_replay_computes_from_what_its_memory_holds_by_then(name):
    x = torch.randn(4, 4, device="cuda")
    PASSES[name](x)  # what is compiled is compiled
    graph, result = capture(lambda: PASSES[name](x))
    x.copy_(torch.randn(4, 4).pin_memory())
    expected = PASSES[name](x)
    result.zero_()
    with recording() as log:
        graph.replay()
    assert torch.equal(result, expected) and log.lines(LAUNCH) == [
        "1 x cuda::graph at tests/gpu_stand_in/graphs_cases.py:"
        "test_a_replay_computes_from_what_its_memory_holds_by_then"
    ]


def test_a_replay_draws_new_random_numbers():
    graph, drawn = capture(lambda: torch.rand(1000, device="cuda"))
    first = drawn.clone()
    graph.replay()
    assert not torch.equal(drawn, first) and 0.4 < float(drawn.mean()) < 0.6


def test_another_tensor_in_the_place_of_a_captured_one_is_not_seen():
    x = ones(3)
    graph, doubled = capture(lambda: x * 2)
    kept, x = x, ones(3) * 7
    graph.replay()
    assert doubled.tolist() == [2, 2, 2] and len(kept) == 3


def test_memory_that_was_freed_since_is_a_fault():
    held = [ones(3)]
    graph, _ = capture(lambda: held[0] * 2)
    held.clear()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        graph.replay()


def test_memory_that_a_capture_frees_serves_its_pool_and_nobody_else():
    def address():
        return torch.empty(100, device="cuda").data_ptr()

    graph, places = capture(lambda: [address(), address()])
    assert places[0] == places[1] not in [ones(100).data_ptr() for _ in range(10)]
    assert capture(address)[1] != places[0] == capture(address, graph.pool())[1]


REFUSED = {
    "item": lambda x: x.sum().item(),
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: torch.tensor([1.0, 2.0], device="cuda"),
    "pinned": lambda x: x.copy_(torch.ones(3).pin_memory(), non_blocking=True),
    "mask": lambda x: x[x > 0],
    "synchronize": lambda x: torch.cuda.synchronize(),
    "event": lambda x: torch.cuda.Event().synchronize(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_capture_refuses_to_wait_and_to_copy(name):
    x = ones(3)
    REFUSED[name](x)
    with pytest.raises(RuntimeError, match="operation not permitted when stream is capturing"):
        capture(lambda: REFUSED[name](x))
    assert not torch.cuda.is_current_stream_capturing()
    capture(lambda: x * 2)[0].replay()


def test_a_capture_is_known_as_one():
    assert capture(torch.cuda.is_current_stream_capturing)[1] and not torch.cuda.is_current_stream_capturing()


# -- why passes are not recorded by PyTorch's function -----------------------------------------------------------------


def accumulated(network, batches):
    for batch in batches:
        network(batch).sum().backward()
    return [parameter.grad for parameter in network.parameters()]


def test_pytorchs_own_function_replaces_gradients_that_should_add_up():
    """pytorch/pytorch#181723: where it is mended, ``rdmd_fast.engine.cuda_graphs`` may give way to it."""
    batches = [ones(BATCH, 3), 2 * ones(BATCH, 3)]
    network = nn.Linear(3, 1, bias=False).cuda()
    (expected,) = accumulated(network, batches)
    network.weight.grad = None
    (found,) = accumulated(torch.cuda.make_graphed_callables(network, (ones(BATCH, 3),)), batches)
    assert expected.tolist() == [[12, 12, 12]] and found.tolist() == [[16, 16, 16]]


# -- networks whose passes replay --------------------------------------------------------------------------------------


class Network(nn.Module):
    """Dropout, a parameter without gradient, two that have the same gradient, an input that may be missing."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 8), nn.Linear(8, 2)
        self.second_bias, self.unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def forward(self, x, labels=None, *, condition=None):
        h = functional.dropout(self.inner(x).relu(), 0.5, self.training)
        h = h if labels is None else h * labels
        h = h if condition is None else h + condition[:, None]
        return self.outer(h) + self.second_bias


def networks(accumulates=False, **options):
    """As written, and one of its weights that replays."""
    torch.manual_seed(0)
    written, replayed = Network().cuda(), Network().cuda()
    replayed.load_state_dict(written.state_dict())
    replay_passes(replayed, BATCH, accumulates)
    return written, replayed


def gradients(network):
    return {name: each.grad for name, each in network.named_parameters()}


def same(first, second):
    assert first.keys() == second.keys()
    return all(
        (a is None and b is None) or torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True)
    )


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("accumulates", [False, True])
def test_replayed_passes_are_the_written_ones_to_the_bit(labelled, accumulates):
    """Dropout too, whose numbers a recording does not use up; weights change in between."""
    results = []
    for network in networks(accumulates):
        torch.manual_seed(1)
        outputs, found = [], []
        for number in range(3):
            labels, condition = (ones(BATCH, 8) * number, ones(BATCH) * number) if labelled else (None, None)
            for _ in range(1 + accumulates):
                x = torch.randn(BATCH, 3).pin_memory().cuda()
                output = network(x, labels, condition=condition)
                output.backward(output.detach() + number)
                outputs.append(output.detach().clone())
            found.append({name: g if g is None else g.clone() for name, g in gradients(network).items()})
            with torch.no_grad():
                for parameter in network.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=0.1)
                        parameter.grad = None
                outputs.append(network(x, labels, condition=condition).clone())
        results.append((outputs, found, {name: each.data for name, each in network.named_parameters()}))
    (outputs, found, weights), (their_outputs, their_found, their_weights) = results
    assert all(map(torch.equal, outputs, their_outputs)) and same(weights, their_weights)
    assert all(map(same, found, their_found)) and found[0]["unused"] is None


def test_a_pass_costs_a_launch_and_no_wait():
    _, network = networks()
    x = ones(BATCH, 3)
    network(x).sum().backward()
    network.zero_grad()
    with recording() as log:
        output = network(x)
        output.backward(output.detach())
    assert log.total(LAUNCH) == 4 and log.total(WAIT) == 0  # copies of input and gradient, two graphs


def test_no_two_gradients_share_memory():
    _, network = networks()
    network(ones(BATCH, 3)).sum().backward()
    assert torch.equal(network.second_bias.grad, network.outer.bias.grad)
    places = [
        each.untyped_storage().data_ptr() + each.storage_offset()
        for each in gradients(network).values()
        if each is not None
    ]
    assert len(places) == len(set(places)) == 5


@pytest.mark.parametrize("x", [torch.ones(BATCH + 1, 3), torch.ones(1, 3)], ids=["more", "one"])
def test_other_batches_and_evaluation_run_as_written(x):
    written, network = networks()
    network(ones(BATCH, 3))
    assert torch.equal(network.eval()(x.cuda()), written.eval()(x.cuda()))
    with recording() as log:
        network(ones(BATCH, 3)), network.train()(x.cuda())
    assert not [line for line in log.lines(LAUNCH) if "cuda::graph" in line]


def test_an_input_that_wants_a_gradient_gets_it():
    _, network = networks()
    network(ones(BATCH, 3))
    x = ones(BATCH, 3).requires_grad_()
    network(x).sum().backward()
    assert x.grad is not None


def test_a_backward_pass_after_another_call_is_refused():
    _, network = networks()
    output = network(ones(BATCH, 3))
    with torch.no_grad():
        network(ones(BATCH, 3))
    with pytest.raises(RuntimeError, match=r"train\.cuda_graphs: a network was called again before the backward pass"):
        output.sum().backward()


def holds_nodes(network):
    """Whether somebody holds the nodes that put gradients down, and so their streams."""
    for parameter in network.parameters():
        get_gradient_edge(parameter).node.metadata["seen"] = True
    return any("seen" in get_gradient_edge(parameter).node.metadata for parameter in network.parameters())


def test_a_recording_leaves_names_and_no_nodes_of_autograd():
    written, network = networks()
    network(ones(BATCH, 3))
    assert list(network.state_dict()) == list(written.state_dict())
    assert [name for name, _ in network.named_modules()] == [name for name, _ in written.named_modules()]
    assert not holds_nodes(network)
    output = network(ones(BATCH, 3))
    assert output.grad_fn and holds_nodes(network)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_engines_hold_no_nodes_of_autograd(tmp_path, stage, dtype):
    """They would be of the default stream, which a recording cannot wait for."""
    overrides = ["train.cuda_graphs=true", "network.model_channels=32", "network.channel_mult=[1]"]
    ours = Ours(
        build_config(Namespace(config=None, kind="teacher", dtype=dtype, stage=stage, overrides=overrides), tmp_path)
    )
    assert not holds_nodes(ours.state.engines["teacher"].module)
    ours.experiment.close()


def test_a_frozen_network_has_no_backward_pass():
    written, network = (each.eval().requires_grad_(False) for each in networks())
    replay_passes(network, BATCH, accumulates=False)
    for number in range(2):
        assert torch.equal(network(ones(BATCH, 3) * number), written(ones(BATCH, 3) * number))


def test_a_network_that_reads_numbers_of_the_device_cannot_be_recorded():
    class Reading(nn.Linear):
        def forward(self, x):
            return super().forward(x) * x.max().item()

    network = Reading(3, 3).cuda()
    replay_passes(network, BATCH, accumulates=False)
    with pytest.raises(RuntimeError, match="operation not permitted when stream is capturing"):
        network(ones(BATCH, 3))


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_ends_as_one_never_stopped_and_as_written(tmp_path):
    """Of a teacher, whose dropout draws from PyTorch's generator."""

    def lines(name, graphs, *steps):
        folder = tmp_path / name
        folder.mkdir()
        for count in steps:
            overrides = [
                f"train.cuda_graphs={graphs}", f"train.steps={count}", "telemetry.log_every=1", "checkpoint.every=2",
                "telemetry.sample_every=0", "network.model_channels=32", "network.channel_mult=[1]",
                "network.attn_resolutions=[]", "teacher_stage.dropout=0.3", "telemetry.sample_count=1",
            ]  # fmt: skip
            train(
                build_config(
                    Namespace(config=None, kind="teacher", dtype="fp32", stage=0, overrides=overrides), folder
                ),
                "auto",
            )
        metrics = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
        return [(line["loss"], line["grad_norm/teacher"]) for line in metrics if "loss" in line]

    written, whole, resumed = lines("written", "false", 4), lines("whole", "true", 4), lines("resumed", "true", 2, 4)
    assert len(written) == 4 and written == whole == resumed
