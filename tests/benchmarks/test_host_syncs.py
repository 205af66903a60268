"""Between lines of metrics nothing of ours waits for the device; DeepSpeed's own waits are counted beside."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ is no part of the package

from benchmarks.host_syncs import COUNTED, HostSyncs, count_host, counts_of


@pytest.mark.parametrize("wait", [
    lambda t: t.sum().item(),
    lambda t: float(t[0]),
    lambda t: bool((t > 0).all()),
    lambda t: (t + 1).tolist(),
    lambda t: t.nonzero(),
    lambda t: t[t > 0],
    lambda t: torch.equal(t, t + 1),
    lambda t: torch.unique(t),
    lambda t: (t * 2).cpu(),
    lambda t: (t * 2).to("cpu"),
    lambda t: (t * 2).to(device="cpu", dtype=torch.float64),
    lambda t: torch.empty(4).copy_(t).max().item(),
    lambda t: t.copy_(torch.ones(4)),
    lambda t: torch.tensor(-1.0, device=t.device) * t,
])  # fmt: skip
def test_every_way_to_wait_counts(wait):
    tensor = torch.randn(4)
    with HostSyncs([tensor]) as syncs:
        wait(tensor)
    assert sum(syncs.counts.values()) >= 1


def test_what_needs_no_waiting_does_not_count():
    tensor, host = torch.randn(4), torch.arange(4)
    with HostSyncs([tensor]) as syncs:
        _ = tensor.shape, tensor.numel(), tensor.dtype
        torch.where(tensor > 0, tensor, 0.0).add_(1)
        tensor.to(device=tensor.device, dtype=torch.float32)
        tensor.copy_(torch.ones(4), non_blocking=True)
        tensor.copy_(tensor.flip(0))
        torch.tensor([1.0]), torch.tensor(2, device="cpu")
        assert int(host[2]) == 2 and host.tolist() == [0, 1, 2, 3]  # never was on the device
    assert not syncs.counts
    assert syncs.launches == 6  # the comparison, where, add_, two copies and flip


def test_who_waits_is_told():
    tensor = torch.randn(4)
    with HostSyncs([tensor]) as syncs:
        with syncs.inside("DeepSpeed"):
            tensor.sum().item()
        tensor.sum().item()
    assert syncs.counts == {"DeepSpeed": 1, "ours": 1}
    assert any("test_host_syncs.py" in place for place in syncs.places)


# Every stage, dtype and kind of run, by place: tests/gpu_stand_in/iteration_counts.csv.
@pytest.mark.parametrize(("stage", "dtype", "clip"), [(0, "bf16", 1), (2, "fp32", 1), (3, "bf16", 0)])
def test_an_iteration_waits_nowhere_of_ours(step_run, stage, dtype, clip):
    clips = [f"rdmd.{engine}_optimizer.grad_clip={clip}" for engine in ("generator", "fake")]
    run = step_run("toy", dtype, *clips, stage=stage)
    for _ in range(3):  # what is made once is made, and DeepSpeed's clock would run
        run.iteration()
    counted = count_host(run)
    assert "ours" not in counted["host_syncs_of"], counted["places"]
    # ZeRO reads whether the norm is a number, once a step; in bf16 at stages 1 and 2 its options spare that.
    expected = {"DeepSpeed (generator)": 1, "DeepSpeed (fake_score)": 1} if stage else {}
    if stage == 3:
        # Beside that at the end of both backward passes and, there being one rank, at a gather of each step.
        expected = {"DeepSpeed (generator)": 2, "DeepSpeed (fake_score)": 2, "DeepSpeed (passes)": 2}
    assert counted["host_syncs_of"] == expected, counted["places"]


def test_zero_3_gathers_ahead_in_passes_with_and_without_gradients(step_run, monkeypatch):
    run = step_run("toy", "fp32", "rdmd.fake_updates=2", "rdmd.fake_warmup=2", stage=3)
    while run.stage.warm_up():
        pass
    for _ in range(2):
        run.iteration()
    coordinators = [engine.optimizer.parameter_offload.get_param_coordinator() for engine in run.state.engines.values()]
    assert len(coordinators) == 2 and all(each.is_complete_trace() for each in coordinators)
    lost = []
    monkeypatch.setattr(type(coordinators[0]), "_invalidate_trace", lost.append)
    run.iteration()
    assert not lost


def test_images_and_a_range_of_transport_weights_wait_nowhere(step_run):
    changes = "rdmd.transport_weight={log_uniform: [0.01, 1.0]}", "rdmd.fake_updates=2"
    run = step_run("digits", "bf16", *changes)
    for _ in range(3):
        run.iteration()
    counted = count_host(run)
    assert not counted["host_syncs_of"], counted["places"]


def test_deepspeeds_clock_would_wait(step_run):
    """Five times an iteration; switched off unless asked for."""
    run = step_run("toy", "fp32", "deepspeed.timers={throughput: {enabled: true}}")
    for _ in range(3):
        run.iteration()
    counted = count_host(run)
    assert counted["host_syncs"] == 5 and any("deepspeed/utils/timer.py" in place for place in counted["places"])


def test_a_wait_for_what_is_drawn_is_found(step_run):
    """Noise levels come from the host, and are on the device when networks read them."""
    run = step_run("toy", "fp32")
    teacher = run.stage.teacher

    def waiting(network_input, c_noise, class_labels=None):
        c_noise.max().item()
        return teacher(network_input, c_noise, class_labels).cpu()

    run.stage.teacher = waiting
    assert count_host(run)["host_syncs_of"] == {"ours": 2}


def test_waits_on_a_gpu_are_the_profilers_of_the_iteration():
    def event(name, start, end, device=DeviceType.CPU, annotation=False):
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, time_range=span, device_type=device, is_user_annotation=annotation)

    events = [
        event("cudaDeviceSynchronize", 0, 5),  # as the profiler begins
        event(COUNTED, 10, 90, annotation=True),
        event("cudaStreamSynchronize", 20, 25),
        event("DeepSpeed (generator)", 30, 50, annotation=True),
        event("cudaStreamSynchronize", 40, 45),
        event("cudaMemcpyAsync", 60, 61),
        event("DeepSpeed (generator)", 31, 49, DeviceType.CUDA, annotation=True),
        event("sgemm", 35, 48, DeviceType.CUDA),
        event("Memcpy DtoH", 60, 62, DeviceType.CUDA),
        event("cudaDeviceSynchronize", 91, 95),  # and as it ends
    ]
    waits = {"ours": 1, "DeepSpeed (generator)": 1}
    assert counts_of(events) == {"host_syncs": 2, "host_syncs_of": waits, "launches": 2}


def test_a_wait_that_is_added_to_the_stage_is_found(step_run):
    run = step_run("toy", "fp32")
    for name in ("_backward_generator", "_backward_fake"):
        backward = getattr(run.stage, name)

        def waiting(output, gradient, *losses, backward=backward):
            losses[0].mean().item()
            backward(output, gradient, *losses)

        setattr(run.stage, name, waiting)
    assert count_host(run)["host_syncs_of"] == {"ours": 2}
