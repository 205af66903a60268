"""A checkpoint keeps the config that it was trained with; keys that came or went since then do not make it another."""

import copy
from pathlib import Path

import pytest

from rdmd_fast.config import _FREE_KEYS, _differences, _with_defaults, load_config

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*/*.yaml"))
CONFIGS = [path for path in FILES if path.name != "study.yaml"]  # of a training
TOY = Path(__file__).parents[2] / "configs/toy/gaussian_to_8gaussians.yaml"


def plain(path, *overrides):
    return load_config(path, list(overrides)).model_dump(mode="json")


def differences(saved, now):
    return [key for section in now for key, *_ in _differences(saved.get(section), now[section], section, _FREE_KEYS)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_config_differs_in_nothing_from_itself(path):
    now = plain(path)
    assert _with_defaults(now, now) == now


def test_a_key_that_is_new_and_at_its_default_is_no_difference():
    now = plain(TOY)
    saved = copy.deepcopy(now)
    del saved["data"]["flip"], saved["data"]["shuffle_shards"], saved["rdmd"]["cost"], saved["teacher_stage"]
    assert differences(_with_defaults(saved, now), now) == []


def test_a_key_that_is_new_and_set_is_one():
    now = plain(TOY, "data.shuffle_shards=8")
    saved = copy.deepcopy(now)
    del saved["data"]["shuffle_shards"], saved["data"]["flip"]
    assert differences(_with_defaults(saved, now), now) == ["data.shuffle_shards"]


def test_a_key_that_is_gone_is_passed_over_and_others_are_not():
    now = plain(TOY)
    saved = copy.deepcopy(now)
    saved["data"]["threads"] = 7
    assert differences(_with_defaults(saved, now), now) == []
    saved["data"]["target"]["toy"] = "swiss_roll"
    saved["rdmd"]["fake_updates"] += 1
    assert differences(_with_defaults(saved, now), now) == ["data.target.toy", "rdmd.fake_updates"]
