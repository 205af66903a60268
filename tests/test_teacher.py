"""The teacher stage: labels, dropout and flips reach the network, the loss and the pictures."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rdmd_fast import experiment, load_denoiser
from rdmd_fast.data.domain import DeviceStream
from rdmd_fast.errors import InputError
from rdmd_fast.networks.class_labels import training_labels, varied_labels
from rdmd_fast.trainer import main

CONFIG = str(Path(__file__).parent.parent / "configs/digits/teacher_3.yaml")
CPU = torch.device("cpu")
SMALL = ["network.channel_mult=[1]", "network.attn_resolutions=[]", "train.steps=2", "train.global_batch_size=6"]
QUIET = ["telemetry.tensorboard=false", "telemetry.log_every=1", "telemetry.sample_count=4"]


@pytest.fixture
def teach(shards, tmp_path):
    def train(name, *overrides):
        options = [f"run_dir={tmp_path / name}", f"data.target={shards}/3/train", *SMALL, *QUIET, *overrides]
        assert main(["--config", CONFIG, *options]) == 0
        return tmp_path / name

    return train


def losses(run_dir):
    return [json.loads(text)["loss"] for text in (run_dir / "metrics.jsonl").read_text().splitlines()]


class Labelled:
    """A stream whose samples have classes: that of a position p is p mod ``classes``."""

    def __init__(self, stream=None, classes=3, lowest=0):
        self.stream, self.shape = stream, getattr(stream, "shape", (3, 8, 8))
        self.shards = SimpleNamespace(labels=np.arange(lowest, classes))
        self.classes, self.batches = classes, []

    def batch(self, positions):
        return self.stream.batch(positions)

    def labels(self, positions):
        self.batches.append(positions)
        return positions % self.classes

    def close(self):
        self.stream.close()


# -- class labels ------------------------------------------------------------------------------------------------------


def labels_of(stream, classes, target_class=None):
    target = DeviceStream(stream, CPU)
    return training_labels(classes, target_class, target.own_labels, target.labels, CPU)


def test_own_labels_are_one_hot_rows_by_position():
    labels = labels_of(Labelled(), 4)
    positions = torch.arange(7, 13)
    rows = labels(positions)
    assert rows.dtype == torch.float32 and rows.shape == (6, 4)
    assert torch.equal(rows.argmax(1), positions % 3) and torch.equal(rows.sum(1), torch.ones(6))


def test_target_class_takes_the_place_of_own_labels():
    stream = Labelled()
    rows = labels_of(stream, 4, 2)(torch.arange(5))
    assert torch.equal(rows, torch.tensor([0.0, 0, 1, 0]).expand(5, 4)) and not stream.batches
    assert labels_of(stream, 0)(torch.arange(5)) is None


@pytest.mark.parametrize("stream,classes,target_class,words", [
    (Labelled(classes=5), 4, None, "labels from 0 to 4"),
    (Labelled(lowest=-1), 4, None, "labels from -1"),
    (SimpleNamespace(shape=(3, 8, 8), shards=SimpleNamespace(labels=None)), 4, None, "no labels"),
    (SimpleNamespace(shape=(2,)), 4, None, "no labels"),
    (Labelled(), 4, 4, "name one from 0 to 3"),
    (Labelled(), 0, 1, "no classes"),
])  # fmt: skip
def test_labels_that_do_not_fit_the_network_are_refused(stream, classes, target_class, words):
    with pytest.raises(InputError, match=words):
        labels_of(stream, classes, target_class)


def test_pictures_show_one_class_after_another():
    assert varied_labels(3, None, 5, CPU).argmax(1).tolist() == [0, 1, 2, 0, 1]
    assert varied_labels(3, 2, 5, CPU).argmax(1).tolist() == [2] * 5
    assert varied_labels(0, None, 5, CPU) is None


def test_conditional_teacher_trains_on_the_shards_own_labels(teach, shards, monkeypatch):
    """Each class row of the network moves, and each position's label was asked for once."""
    opened = experiment.open_domain
    streams = []

    def labelled(*arguments):
        target = opened(*arguments)
        streams.append(Labelled(target.stream))
        return DeviceStream(streams[-1], target.device)

    monkeypatch.setattr(experiment, "open_domain", labelled)
    run = teach("labelled", "network.label_dim=4", "train.steps=0")
    start = load_denoiser(run / "export").state_dict()
    run = teach("labelled_2", "network.label_dim=4", "train.micro_batch_size=3", "teacher_stage.ema.half_life=0.01")
    end = load_denoiser(run / "export").state_dict()
    key = next(name for name in start if name.endswith("map_label.weight"))
    moved = (end[key] - start[key]).abs().amax(0)
    assert (moved[:3] > 1e-6).all() and moved[3] < 1e-8  # class 3 does not occur
    assert torch.equal(torch.cat(streams[1].batches), torch.arange(12))
    assert (run / "samples/final.png").exists()
    assert json.loads((run / "export/config.json").read_text())["target_class"] is None


# -- dropout and flips -------------------------------------------------------------------------------------------------


def test_dropout_of_the_stage_replaces_the_networks(teach):
    own = losses(teach("own", "network.dropout=0.4"))
    chosen = losses(teach("chosen", "network.dropout=0.0", "teacher_stage.dropout=0.4"))
    none = losses(teach("none", "network.dropout=0.4", "teacher_stage.dropout=0.0"))
    assert own == chosen and own != none
    assert none == losses(teach("plain", "network.dropout=0.0"))


def test_dropout_is_chosen_anew_when_fine_tuning(teach):
    start = f"teacher={teach('start', 'network.dropout=0.4') / 'export'}"
    kept, none = (teach(name, start, *more) for name, more in (("kept", []), ("none", ["teacher_stage.dropout=0"])))
    dropouts = [json.loads((run / "export/config.json").read_text())["network"]["dropout"] for run in (kept, none)]
    assert dropouts == [0.4, 0.0] and losses(kept) != losses(none)


def test_network_without_dropout_is_refused(tmp_path, capsys):
    toy = ["data.target={toy: gaussian}", "network={kind: mlp}", f"run_dir={tmp_path}/run"]
    assert main(["--config", CONFIG, *toy, "teacher_stage.dropout=0.1"]) == 2
    assert "teacher_stage.dropout: a network of kind mlp has none" in capsys.readouterr().err


def test_flips_reach_training_and_go_with_the_seed(teach):
    plain, flipped, again, other = (
        losses(teach(name, *more))
        for name, more in (
            ("plain", []),
            ("flipped", ["data.flip=true"]),
            ("again", ["data.flip=true", "train.micro_batch_size=2"]),
            ("other", ["data.flip=true", "seed=1"]),
        )
    )
    assert flipped != plain and flipped != other
    assert again == pytest.approx(flipped, rel=1e-5)


def test_flipping_points_is_refused(tmp_path, capsys):
    toy = ["data.target={toy: gaussian}", "network={kind: mlp}", f"run_dir={tmp_path}/run", "data.flip=true"]
    assert main(["--config", CONFIG, *toy]) == 2
    assert "data.flip" in capsys.readouterr().err
