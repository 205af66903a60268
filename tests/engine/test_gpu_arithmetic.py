"""train.tf32 and train.cudnn_benchmark."""

import warnings

import pytest
import torch

from rdmd_fast.config import check_compatible, validate_config
from rdmd_fast.engine.gpu_arithmetic import allow_tf32, set_arithmetic, tf32_allowed
from rdmd_fast.errors import InputError
from rdmd_fast.experiment import build_experiment
from rdmd_fast.monitoring.telemetry import Telemetry
from rdmd_fast.processes.world import join_world


@pytest.fixture(autouse=True)
def restored():
    before = tf32_allowed(), torch.backends.cudnn.benchmark
    yield
    allow_tf32(*before[0])
    torch.backends.cudnn.benchmark = before[1]


def config(folder="r", **train):
    values = {"stage": "teacher", "run_dir": str(folder), "data": {"target": {"toy": "circles"}}}
    values |= {"network": {"kind": "mlp", "hidden": 8, "depth": 1}, "train": {"global_batch_size": 4, **train}}
    return validate_config(values | {"telemetry": {"tensorboard": False}}, "case")


def settings() -> dict[str, object]:
    """What PyTorch's libraries and Inductor read, of the newer setting and of the older one."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return {
        "new": (matmul.fp32_precision, cudnn.fp32_precision, cudnn.conv.fp32_precision),
        "old": (matmul.allow_tf32, cudnn.allow_tf32), "benchmark": cudnn.benchmark,
    }  # fmt: skip


@pytest.mark.parametrize(("tf32", "name"), [(True, "tf32"), (False, "ieee")])
def test_a_run_sets_products_and_convolutions_alike(tmp_path, tf32, name):
    allow_tf32(not tf32, not tf32)
    run = config(tmp_path, tf32=tf32, cudnn_benchmark=tf32)
    world = join_world()
    build_experiment(run, world, Telemetry(run.telemetry, world, tmp_path, 1, 4)).close()
    assert settings() == {"new": (name,) * 3, "old": (tf32, tf32), "benchmark": tf32}


def test_products_and_convolutions_are_set_apart_and_read_back():
    """As PyTorch begins, and as benchmarks put them back; none of it warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for setting in [(False, True), (True, True), (False, False), (True, False), (False, True)]:
            allow_tf32(*setting)
            assert tf32_allowed() == setting and settings()["old"] == setting


@pytest.mark.parametrize(
    ("train", "times"),
    [({}, True), ({"cudnn_benchmark": False}, False), ({"deterministic": True}, False),
     ({"deterministic": True, "cudnn_benchmark": False}, False)],
)  # fmt: skip
def test_convolutions_are_timed_unless_a_run_is_deterministic(monkeypatch, train, times):
    monkeypatch.setattr("rdmd_fast.engine.gpu_arithmetic.make_deterministic", lambda: None)  # changes more than this
    torch.backends.cudnn.benchmark = not times
    set_arithmetic(config(**train).train)
    assert torch.backends.cudnn.benchmark is times


def test_a_deterministic_run_times_nothing():
    with pytest.raises(
        InputError, match=r"train\.cudnn_benchmark: chooses convolutions by timing, remove it or train\.d"
    ):
        config(deterministic=True, cudnn_benchmark=True)


def test_a_run_goes_on_in_its_precision_however_convolutions_are_chosen(tmp_path):
    saved, now = ({"config": config(tf32=tf32).model_dump(mode="json")} for tf32 in (False, True))
    other = config(cudnn_benchmark=False, deterministic=True).model_dump(mode="json")
    check_compatible(tmp_path, now, other, {})
    with pytest.raises(InputError, match=r"was trained with train\.tf32 = False, the config says True; set it back"):
        check_compatible(tmp_path, saved, other, {})
