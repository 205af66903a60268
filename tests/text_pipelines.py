"""Small random text-to-image pipelines of diffusers' own classes. Who imports it is skipped where those are missing."""

import string
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from material import pack, write_pictures

from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.extras import require
from rdmd_fast.trainer import main

for package in ("diffusers", "transformers", "peft"):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)
diffusers, transformers = require("diffusers", "text"), require("transformers", "text")
TOKENS = 16
PROMPT, NEGATIVE = "a lion", "blurry"
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


def t5_tokenizer() -> transformers.T5Tokenizer:
    """Of single letters."""
    pieces = ("<pad>", "</s>", "<unk>", "\u2581", *string.ascii_lowercase)
    return transformers.T5Tokenizer(vocab=[(piece, -float(number)) for number, piece in enumerate(pieces)], extra_ids=0)


def t5_encoder(width: int):
    config = transformers.T5Config(
        vocab_size=30, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2, dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return transformers.T5EncoderModel(config).eval()


def flow_parts(**scheduler) -> dict:
    """What pipelines of the straight path have alike: an autoencoder of 16 channels, and a scheduler."""
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=4,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    return {"vae": vae, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler))}


def sd3_pipeline(t5: bool = True, **scheduler):
    """Stable Diffusion 3 with latents of 16×8×8 of pictures of 16×16."""
    torch.manual_seed(3)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=64,
        caption_projection_dim=32, pooled_projection_dim=32, pos_embed_max_size=6, dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=_of_visible_size(transformer),
        text_encoder=text_encoder(24, True), tokenizer=tokenizer(),
        text_encoder_2=text_encoder(16, True), tokenizer_2=tokenizer(),
        text_encoder_3=t5_encoder(64) if t5 else None, tokenizer_3=t5_tokenizer() if t5 else None,
        **flow_parts(**scheduler),
    )  # fmt: skip


def flux_pipeline(guidance_embeds: bool = True, **scheduler):
    """FLUX.1 with latents of 16×8×8 of pictures of 16×16."""
    torch.manual_seed(4)
    transformer = diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=64,
        pooled_projection_dim=24, guidance_embeds=guidance_embeds, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    shift = {"use_dynamic_shifting": guidance_embeds} | scheduler
    return diffusers.FluxPipeline(
        transformer=_of_visible_size(transformer), text_encoder=text_encoder(24), tokenizer=tokenizer(),
        text_encoder_2=t5_encoder(64), tokenizer_2=t5_tokenizer(), **flow_parts(**shift),
    )  # fmt: skip


def _of_visible_size(network: torch.nn.Module) -> torch.nn.Module:
    """Biases are no longer zero, so that each matters."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return network


def saved(folder: Path, xl: bool, scheduler: dict | None = None, **options) -> Path:
    pipeline(xl, **(scheduler or {})).save_pretrained(folder, **options)
    return folder


def pipeline_and_latents(folder: Path, xl: bool = False, made=None) -> Path:
    """A pipeline, and eight pictures of 16×16 packed by its autoencoder to latents of C×8×8, in ``folder``.

    Args:
        made: the pipeline; None for one of ``pipeline(xl)``.
    """
    (made or pipeline(xl)).save_pretrained(folder / "pipeline")
    write_pictures(folder / "pictures", *(f"{number}.png" for number in range(8)))
    encoder = ("--encoder", folder / "pipeline", "--resolution", 16, "--device", "cpu")
    assert pack(folder / "pictures", "--out", folder / "shards", *encoder) == 0
    return folder


def run_values(folder: Path, run: Path, **sections) -> dict:
    """A configuration of four iterations on what ``pipeline_and_latents`` left in ``folder``, guided."""
    telemetry = {"tensorboard": False, "log_every": 1, "sample_every": 0}
    train = {"steps": 4, "global_batch_size": 2, "micro_batch_size": 2}
    found = {"stage": "rdmd", "run_dir": str(run), "data": {"source": str(folder / "shards")}, "train": train}
    found |= {"teacher": str(folder / "pipeline"), "teacher_prompt": PROMPT, "teacher_negative_prompt": NEGATIVE}
    return found | {"telemetry": telemetry, "teacher_guidance": 2.0, "checkpoint": {"every": 2}} | sections


def train_run(values: dict, *words: str) -> int:
    """Train by a configuration; returns the exit status."""
    path = Path(values["run_dir"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    return main(["--config", str(path), *words])


def sources(folder: Path) -> torch.Tensor:
    """The latents [8, 4, 8, 8] that ``pipeline_and_latents`` has packed."""
    shards = ShardSet(folder / "shards")
    return torch.stack([torch.tensor(shards.read(index)) for index in range(len(shards))])
