"""Small random text-to-image pipelines of diffusers' own classes. Who imports it is skipped where those are missing."""

import string
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from material import pack, write_pictures

from rdmd_fast.extras import require

for package in ("diffusers", "transformers", "peft"):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)
diffusers, transformers = require("diffusers", "text"), require("transformers", "text")
TOKENS = 16
BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1)


def tokenizer() -> transformers.CLIPTokenizer:
    """Of single letters."""
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer({word: number for number, word in enumerate(words)}, [], model_max_length=TOKENS)


def text_encoder(width: int, projected: bool = False):
    ends = dict(bos_token_id=52, eos_token_id=53, pad_token_id=53)
    config = transformers.CLIPTextConfig(
        vocab_size=54, hidden_size=width, intermediate_size=2 * width, projection_dim=16, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=TOKENS, **ends,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(config).eval()


def pipeline(xl: bool, **scheduler):
    """A pipeline with latents of 4×8×8 of pictures of 16×16."""
    torch.manual_seed(int(xl))
    sizes = dict(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8)
    blocks = dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")
    )
    added = dict(addition_embed_type="text_time", addition_time_embed_dim=8, use_linear_projection=True)
    added |= dict(projection_class_embeddings_input_dim=16 + 6 * 8, transformer_layers_per_block=(1, 2))
    width = 24 + 16 if xl else 24
    unet = diffusers.UNet2DConditionModel(
        cross_attention_dim=width, attention_head_dim=(2, 4), **sizes, **blocks, **(added if xl else {})
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=4,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4,
    )  # fmt: skip
    parts = dict(vae=vae, unet=unet, scheduler=diffusers.DDIMScheduler(**(BETAS | scheduler)), tokenizer=tokenizer())
    if xl:
        second = dict(text_encoder_2=text_encoder(16, True), tokenizer_2=tokenizer())
        return diffusers.StableDiffusionXLPipeline(
            text_encoder=text_encoder(24), **second, **parts, add_watermarker=False
        )
    off = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return diffusers.StableDiffusionPipeline(text_encoder=text_encoder(24), **parts, **off)


def saved(folder: Path, xl: bool, scheduler: dict | None = None, **options) -> Path:
    pipeline(xl, **(scheduler or {})).save_pretrained(folder, **options)
    return folder


def pipeline_and_latents(folder: Path, xl: bool = False) -> Path:
    """A pipeline, and eight pictures of 16×16 packed by its autoencoder to latents of 4×8×8, in ``folder``."""
    saved(folder / "pipeline", xl)
    write_pictures(folder / "pictures", *(f"{number}.png" for number in range(8)))
    encoder = ("--encoder", folder / "pipeline", "--resolution", 16, "--device", "cpu")
    assert pack(folder / "pictures", "--out", folder / "shards", *encoder) == 0
    return folder
