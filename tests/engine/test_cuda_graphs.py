"""train.cuda_graphs where there is no GPU; tests/gpu_stand_in/test_graphs.py has the rest."""

import pytest
from torch.autograd.graph import get_gradient_edge

from rdmd_fast.config import check_compatible, validate_config
from rdmd_fast.engine.cuda_graphs import replay_passes
from rdmd_fast.errors import InputError
from rdmd_fast.experiment import build_experiment
from rdmd_fast.monitoring.telemetry import Telemetry
from rdmd_fast.processes.world import join_world


def config(folder="r", stage=0, zero=None, **train):
    values = {"stage": "teacher", "run_dir": str(folder), "data": {"target": {"toy": "circles"}}}
    values |= {"network": {"kind": "mlp", "hidden": 8, "depth": 1}, "train": {"global_batch_size": 4, **train}}
    values |= {"deepspeed": {"zero_optimization": {"stage": stage, **(zero or {})}}}
    return validate_config(values | {"telemetry": {"tensorboard": False}}, "case")


def experiment(run, folder):
    world = join_world()
    return build_experiment(run, world, Telemetry(run.telemetry, world, folder, 1, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": "default"}, r"train\.cuda_graphs: train\.compile=reduce-overhead records its own graphs, remove"),
        ({"stage": 3}, r"train\.cuda_graphs: ZeRO 3 gathers weights inside networks, use a lower stage or remove"),
        ({"activation_checkpointing": True}, r"train\.cuda_graphs: train\.activation_checkpointing reads .* remove"),
        ({"stage": 2, "zero": {"offload_optimizer": {"device": "cpu"}}}, r"\.offload_optimizer copies .* remove one"),
    ],
)
def test_what_no_graph_can_record_is_refused(options, message):
    config(**options)
    with pytest.raises(InputError, match=message) as refusal:
        config(cuda_graphs=True, **options)
    assert "\n" not in str(refusal.value)


def test_a_run_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"^train\.cuda_graphs: needs an NVIDIA GPU, this run is on cpu: remove"):
        experiment(config(tmp_path, cuda_graphs=True), tmp_path)


def test_a_run_goes_on_with_graphs_or_without(tmp_path):
    saved, now = (config(cuda_graphs=graphs).model_dump(mode="json") for graphs in (False, True))
    check_compatible(tmp_path, {"config": saved}, now, {})


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (2, "bf16")])
def test_engines_leave_weights_in_place_and_hold_no_nodes_of_autograd(tmp_path, stage, dtype):
    """Nodes that put gradients down would be of the default stream, which a recording cannot wait for."""
    run = experiment(config(tmp_path, stage, dtype=dtype), tmp_path)
    network = run.state.engines["teacher"].module
    replay_passes(network, micro_batch=0, accumulates=False)  # no call is of such a batch
    parameters = list(network.parameters())
    for parameter in parameters:
        get_gradient_edge(parameter).node.metadata["seen"] = True
        assert "seen" not in get_gradient_edge(parameter).node.metadata
    places, before = [each.data_ptr() for each in parameters], [each.detach().clone() for each in parameters]
    for step in range(2):
        run.update_networks(step)
    assert places == [each.data_ptr() for each in parameters]
    assert any((was != now).any() for was, now in zip(before, parameters, strict=True))
    run.close()
