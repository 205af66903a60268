from pathlib import Path

import pytest
import yaml

from rdmd_fast.config import dump_config, load_config, option_table, validate_config
from rdmd_fast.errors import InputError

TOY = Path(__file__).parent.parent / "configs/toy/gaussian_to_gaussian.yaml"


def test_overrides_reach_nested_keys_and_parse_as_yaml():
    config = load_config(TOY, ["rdmd.transport_weight=0.7", "data.target.std=[1.5, 0.5]", "train.steps=7"])
    assert config.rdmd.transport_weight == 0.7
    assert config.data.target.std == (1.5, 0.5)
    assert config.train.steps == 7


def test_scientific_notation_without_a_point_is_a_number():
    assert load_config(TOY, ["rdmd.generator_optimizer.lr=1e-4"]).rdmd.generator_optimizer.lr == 1e-4


def test_every_shipped_config_is_valid_and_round_trips():
    paths = [path for path in sorted(TOY.parent.parent.rglob("*.yaml")) if path.name != "study.yaml"]
    assert len(paths) >= 6
    for path in paths:
        config = load_config(path)
        assert validate_config(yaml.safe_load(dump_config(config)), "dump") == config


@pytest.mark.parametrize("override,parts", [
    ("rdmd.transport_wieght=1", ["rdmd.transport_wieght", "did you mean rdmd.transport_weight"]),
    ("train.step=5", ["train.step", "train.steps"]),
    ("transport_weight=5", ["transport_weight", "rdmd.transport_weight"]),
    ("train.steps=many", ["train.steps", "integer", "'many'"]),
    ("train.steps=-1", ["train.steps", "greater than or equal to 0"]),
    ("train.steps=true", ["train.steps", "integer"]),
    ("rdmd.weighting=dmd3", ["rdmd.weighting", "'dmd3'"]),
    ("rdmd.sigma.kind=normal", ["rdmd.sigma", "lognormal"]),
    ("rdmd.sigma.sigma_min=0.1", ["rdmd.sigma.sigma_min"]),
    ("deepspeed.train_batch_size=4", ["deepspeed.train_batch_size", "train.global_batch_size"]),
    ("deepspeed.zero_optimization.stage=4", ["deepspeed.zero_optimization.stage"]),
    ("deepspeed.zero_optimization.round_robin_gradients=true", ["round_robin_gradients: must stay false"]),
    ("deepspeed.zero_optimization.offload_optimizer.device=nvme", ["offload_optimizer.device", "use cpu"]),
    ("deepspeed.zero_optimization.offload_param.device=nvme", ["offload_param.device", "use cpu"]),
    ("teacher=null", ["teacher", "missing"]),
    ("network=null", ["network", "missing"]),
    ("network={kind: dhariwal_unet, num_bloks: 3}", ["network.num_bloks", "did you mean network.num_blocks"]),
    ("train=3", ["train"]),
    ("train.steps.x=3", ["train.steps"]),
    ("justtext", ["key=value"]),
    ("seed=[1", ["YAML"]),
])  # fmt: skip
def test_a_bad_override_is_one_line_that_names_the_key(override, parts):
    with pytest.raises(InputError) as caught:
        load_config(TOY, [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_bad_files_are_one_line(tmp_path):
    for content in (b"\xff\xfe\x00", b"- 1\n- 2\n", b"a: [", b"stage: rdmd\nstage2: &x [*x]\n"):
        path = tmp_path / "bad.yaml"
        path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            load_config(path)
        assert "\n" not in str(caught.value) and "bad.yaml" in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_every_option_is_documented_with_its_origin():
    table = {key: description for key, _, description in option_table()}
    expected = {"rdmd.transport_weight", "data.source", "train.steps", "rdmd.sigma.sigma_min", "network.hidden"}
    assert expected <= set(table)
    undocumented = [key for key, text in table.items() if not text and not key.endswith(("kind", ".toy"))]
    assert not undocumented


@pytest.mark.parametrize("train,section,message", [
    ({"dtype": "bf16"}, {"data_types": {"grad_accum_dtype": "fp32"}}, "bf16 without ZeRO accumulates bf16"),
    ({}, {"zero_optimization": {"stage": 3, "offload_optimizer": {"ratio": 0.5}}}, "ratio must stay 1"),
    ({}, {"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zenflow off"),
])  # fmt: skip
def test_sections_that_our_engines_cannot_honour_are_refused(train, section, message):
    values = {"stage": "teacher", "run_dir": "r", "data": {"target": {"toy": "circles"}}, "network": {"kind": "mlp"}}
    with pytest.raises(InputError, match=message):
        validate_config({**values, "train": train, "deepspeed": section}, "case")
    if "data_types" in section:
        validate_config({**values, "train": train, "deepspeed": {**section, "zero_optimization": {"stage": 1}}}, "case")
