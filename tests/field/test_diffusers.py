"""Folders that diffusers reads: averaged networks of training checkpoints, variants, shards, widths of heads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rdmd_fast.errors import InputError
from rdmd_fast.model_files.diffusers_folder import is_diffusers_folder, read_diffusers, read_diffusers_config
from rdmd_fast.model_files.weights import rebuild
from rdmd_fast.networks import build_network

FOLDER = Path(__file__).parents[1] / "networks/fixtures/diffusers_unet"
WEIGHTS, STEM = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model"
EMA = dict(
    decay=0.9999, inv_gamma=1.0, min_decay=0.0, optimization_step=9, power=0.75, update_after_step=0,
    use_ema_warmup=True,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(FOLDER, tmp_path / "model", ignore=shutil.ignore_patterns("reference*")))


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def take_weights(folder):
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    return weights


def save_shards(folder, weights, names, index):
    held = [dict(list(weights.items())[number :: len(names)]) for number in range(len(names))]
    for name, part in zip(names, held, strict=True):
        save_file(part, folder / name)
    weight_map = {key: name for name, part in zip(names, held, strict=True) for key in part}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_same(one, other):
    assert one[0] == other[0] and one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def test_the_averaged_network_of_a_training_checkpoint(folder, tmp_path):
    expected = read_diffusers(folder)
    average = tmp_path / "out/checkpoint-500/unet_ema"
    shutil.copytree(folder, average)
    edit(average, **EMA)
    (tmp_path / "out/scheduler").mkdir()
    (average / "scheduler_config.json").rename(tmp_path / "out/scheduler/scheduler_config.json")
    assert is_diffusers_folder(average)
    assert_same(read_diffusers(average), expected)
    edit(average, gates=True)
    with pytest.raises(InputError, match="gates: is not a key that is known here"):
        read_diffusers(average)


def halves(weights):
    return {name: tensor.half() for name, tensor in weights.items()}


SHARDS = "fp16-00001-of-00002", "fp16-00002-of-00002"


@pytest.mark.parametrize(
    ("names", "index"),
    [
        ([f"{STEM}.fp16.safetensors"], None),
        ([f"{STEM}.{shard}.safetensors" for shard in SHARDS], f"{WEIGHTS}.index.fp16.json"),
        ([f"{STEM}-0000{n}-of-00002.fp16.safetensors" for n in (1, 2)], f"{WEIGHTS}.fp16.index.json"),
        (["a.safetensors", "b.safetensors"], f"{WEIGHTS}.index.json"),
    ],
    ids=["file", "index", "index of earlier versions", "plain index"],
)
def test_weights_of_a_variant_are_read_to_float32(folder, names, index):
    config, weights = read_diffusers(folder)
    rounded = halves(take_weights(folder))
    if index:
        save_shards(folder, rounded, names, index)
    else:
        save_file(rounded, folder / names[0])
    read = read_diffusers(folder)
    assert_same(read, (config, {name: tensor.half().float() for name, tensor in weights.items()}))
    assert {tensor.dtype for tensor in read[1].values()} == {torch.float32}


def test_plain_weights_come_before_a_variant(folder):
    expected = read_diffusers(folder)
    zeros = {name: torch.zeros_like(tensor).half() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(zeros, folder / f"{STEM}.fp16.safetensors")
    assert_same(read_diffusers(folder), expected)
    save_shards(folder, take_weights(folder), ["a.safetensors", "b.safetensors"], f"{WEIGHTS}.index.json")
    assert_same(read_diffusers(folder), expected)


def test_one_of_several_variants_is_not_guessed(folder):
    rounded = halves(take_weights(folder))
    for variant in ("fp16", "non_ema"):
        save_file(rounded, folder / f"{STEM}.{variant}.safetensors")
    with pytest.raises(InputError, match="has weights of variants fp16, non_ema, keep one"):
        read_diffusers(folder)


def test_width_of_heads_matters_where_there_is_attention_alone(folder):
    """diffusers floors the number of heads and gives projections their width together."""
    edit(folder, block_out_channels=[12, 20], attention_head_dim=8, attn_norm_num_groups=5)
    network = build_network(read_diffusers_config(folder).network, (3, 8, 8))
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    assert shapes["mid_block.attentions.0.to_q.weight"] == [16, 20]
    assert shapes["mid_block.attentions.0.to_out.0.weight"] == [20, 16]
    assert network(torch.zeros(1, 3, 8, 8), torch.zeros(1)).shape == (1, 3, 8, 8)
    edit(folder, attention_head_dim=16)  # wider than the first block, which has none
    read_diffusers_config(folder)
    edit(folder, attention_head_dim=21)
    with pytest.raises(InputError, match="attention_head_dim: 21 is wider than a block that attends"):
        read_diffusers_config(folder)
    blocks = dict(down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2, add_attention=False)
    edit(folder, **blocks, attn_norm_num_groups=3)
    config = read_diffusers_config(folder)
    rebuild(config, build_network(config.network, (3, 8, 8)).state_dict(), "here")
