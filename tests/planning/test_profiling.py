"""``train.py --profile``: what it counts, writes and refuses."""

import contextlib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from rdmd_fast.monitoring.telemetry import Telemetry, TelemetryOptions
from rdmd_fast.planning.profiling import phase_rows, table
from rdmd_fast.trainer import main

TOY = str(Path(__file__).parents[2] / "configs/toy/gaussian_to_gaussian.yaml")


def event(key, count, host, device, where=DeviceType.CPU):
    """An average of the profiler; times of all calls in microseconds."""
    annotation = key.startswith(("rdmd", "nccl:"))
    times = {"cpu_time_total": host, "device_time_total": device}
    return SimpleNamespace(key=key, count=count, device_type=where, is_user_annotation=annotation, **times)


def test_device_time_is_the_devices_own():
    """Not the profiler's sums by thread, which lack what autograd's thread launches, nor its annotations there."""
    on_host = [
        event("rdmd.iteration", 2, 20_000, 16_000),
        event("rdmd.fake_backward", 8, 12_000, 10),
        event("rdmd.generator", 2, 6_000, 4_000),
        event("aten::mm", 100, 3_000, 9_000),
        event("c10d::allreduce_", 4, 500, 700),
        event("record_param_comms", 4, 400, 700),
        event("nccl:all_reduce", 4, 300, 0),
    ]
    on_device = [
        event("rdmd.iteration", 2, 0, 19_000, DeviceType.CUDA),
        event("rdmd.fake_backward", 8, 0, 11_500, DeviceType.CUDA),
        event("rdmd.generator", 2, 0, 5_500, DeviceType.CUDA),
        event("nccl:all_reduce", 4, 0, 900, DeviceType.CUDA),
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 4, 0, 800, DeviceType.CUDA),
        event("ampere_sgemm_128x64_tn", 100, 0, 9_000, DeviceType.CUDA),
    ]
    expected = [
        {"phase": "fake_backward", "host_ms": 6.0, "calls": 4.0, "device_ms": 5.0},
        {"phase": "generator", "host_ms": 3.0, "calls": 1.0, "device_ms": 2.0},
        {"phase": "other", "calls": 1.0, "host_ms": 1.0, "device_ms": 1.0},
        {"phase": "iteration", "host_ms": 10.0, "calls": 1.0, "device_ms": 8.0},
        {"phase": "communication (within the above)", "host_ms": 0.15, "calls": 2.0, "device_ms": 0.4},
    ]
    device_seconds = {"iteration": 0.016, "fake_backward": 0.010, "generator": 0.004}
    for events in (on_host + on_device, on_device + on_host):
        rows = phase_rows(events, 2, device_seconds)
        assert rows == [pytest.approx(row) for row in expected]
    assert "62.5%" in table(rows)[1]

    on_cpu = phase_rows(on_host, 2)
    assert on_cpu == [pytest.approx({key: row[key] for key in row if key != "device_ms"}) for row in expected]


def test_phases_on_a_gpu_are_nvtx_ranges_and_timed_by_events(tmp_path, monkeypatch):
    seen, clock = [], itertools.count()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = next(clock)

        def synchronize(self):
            seen.append("waited")

        def elapsed_time(self, end):
            return 1000.0 * (end.time - self.time)  # milliseconds

    @contextlib.contextmanager
    def nvtx_range(name):
        seen.append(f"begin {name}")
        yield
        seen.append(f"end {name}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda.nvtx, "range", nvtx_range)
    world = SimpleNamespace(device=torch.device("cuda"), is_main=True)
    telemetry = Telemetry(TelemetryOptions(), world, tmp_path, 1, 1, annotated=True)
    with telemetry.phase("iteration"):
        for _ in range(2):
            with telemetry.phase("teacher"):
                pass
    ranges = ["begin iteration", *["begin teacher", "end teacher"] * 2, "end iteration"]
    assert seen == ranges  # and nothing has waited so far
    assert telemetry.phase_seconds() == {"teacher": 2.0, "iteration": 5.0}
    assert telemetry.phase_seconds() == {}


def test_a_few_iterations_leave_a_trace_and_the_time_of_each_phase(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["--config", TOY, f"run_dir={run}", "rdmd.fake_warmup=0", "--profile", "2"]) == 0
    assert sorted(path.relative_to(run).as_posix() for path in run.rglob("*")) == [
        "profile", "profile/phases.json", "profile/trace_rank0.json"
    ]  # fmt: skip
    record = json.loads((run / "profile/phases.json").read_text())
    rows = {row["phase"]: row for row in record["phases"]}
    assert record["iterations"] == 2 and rows["iteration"]["calls"] == 1
    phases = rows.keys() - {"iteration", "communication (within the above)"}
    assert phases == {
        "data", "generator_forward", "losses", "teacher", "fake_score", "generator_backward", "optimizer",
        "fake_forward", "fake_backward", "ema", "other",
    }  # fmt: skip
    assert all(rows[name]["host_ms"] > 0 for name in phases)
    assert sum(rows[name]["host_ms"] for name in phases) == pytest.approx(rows["iteration"]["host_ms"], rel=1e-9)

    events = json.loads((run / "profile/trace_rank0.json").read_text())["traceEvents"]
    traced = [entry["name"] for entry in events if entry.get("cat") == "user_annotation"]
    assert traced.count("rdmd.iteration") == 2
    for name in phases - {"other"}:
        assert traced.count(f"rdmd.{name}") == 2 * rows[name]["calls"]
    printed = capsys.readouterr().out
    assert "host ms" in printed and all(name in printed for name in phases)


def test_no_iterations_are_one_line(tmp_path, capsys):
    assert main(["--config", TOY, f"run_dir={tmp_path}/run", "--profile", "0"]) == 2
    error = capsys.readouterr().err
    assert "--profile 0: must be at least 1" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()
