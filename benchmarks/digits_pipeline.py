"""A small text-to-image pipeline of coloured digits, trained from nothing: a teacher for trying prompts without a GPU.

    rdmd pack digits --out shards/digits
    rdmd pack digits --out shards/digits16 --resolution 16
    python -m benchmarks.digits_pipeline --data shards/digits16 --judge shards/digits --out models/digits_pipeline

Pictures of 16×16 become latents of 4×8×8; the prompt is "a handwritten two". OUT is a StableDiffusionPipeline as
diffusers saves it; beside its parts are report.json, how good it is, and samples.png, a column a digit.
"""

from __future__ import annotations

import argparse
import json
import string
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.errors import InputError
from rdmd_fast.extras import quiet, require
from rdmd_fast.files import make_folder, write_atomically
from rdmd_fast.kernels.image_normalize import image_normalize
from rdmd_fast.metrics.image_distances import mean_colour_cosine, psnr
from rdmd_fast.metrics.judges import DigitJudge
from rdmd_fast.model_files.autoencoder import Autoencoder
from rdmd_fast.monitoring.drawing import image_grid

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 16  # pixels
TOKENS = 24  # of a prompt; the longest has 21, a letter each
WIDTH = 64  # of a token's embedding
DROPPED = 0.1  # share of samples without a prompt, for guidance
KL_WEIGHT = 1e-3  # of the posterior's KL a pixel, beside the squared error in [-1, 1]
VAE_RATE, UNET_RATE = 2e-3, 1e-3  # largest learning rates
GUIDANCE = (1.0, 1.5, 3.0)
SAMPLING_STEPS = 30


def prompt_of(digit: int) -> str:
    return f"a handwritten {WORDS[digit]}"


# -- parts -------------------------------------------------------------------------------------------------------------


def build_parts() -> dict[str, object]:
    """The parts of a StableDiffusionPipeline by their names, with random weights."""
    diffusers, transformers = require("diffusers", "text"), require("transformers", "text")
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    tokens = {token: number for number, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    start, end = (tokens[f"<|{place}oftext|>"] for place in ("start", "end"))
    text_config = transformers.CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=WIDTH, intermediate_size=4 * WIDTH, projection_dim=WIDTH,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=TOKENS, bos_token_id=start,
        eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=8,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, sample_size=SIDE,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIDE // 2, block_out_channels=(48, 96), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=4,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1,
        set_alpha_to_one=False, prediction_type="v_prediction", timestep_spacing="trailing",
    )  # fmt: skip
    tokenizer = transformers.CLIPTokenizer(tokens, [], model_max_length=TOKENS)
    text_encoder = transformers.CLIPTextModel(text_config)
    return dict(vae=vae, unet=unet, scheduler=scheduler, tokenizer=tokenizer, text_encoder=text_encoder)


def save(parts: dict[str, object], folder: Path) -> None:
    make_folder(folder)
    none = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    require("diffusers", "text").StableDiffusionPipeline(**parts, **none).save_pretrained(folder)


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# -- data --------------------------------------------------------------------------------------------------------------


def read_digits(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 16, 16] in [-1, 1] of all ten digits, and which digit each is, int64 [N].

    Raises:
        InputError: a digit is missing, or of another size.
    """
    images, digits = [], []
    for digit in range(10):
        shards = ShardSet(folder / str(digit) / split)
        if tuple(shards.shape) != (SIDE, SIDE, 3):
            raise InputError(f"{shards.path}: images are {list(shards.shape)}, pack digits with --resolution {SIDE}")
        images += [shards.read(index) for index in range(len(shards))]
        digits += [digit] * len(shards)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return image_normalize(pixels, torch.float32).contiguous(), torch.tensor(digits)


# -- training ----------------------------------------------------------------------------------------------------------


def train(name: str, modules: Iterable[nn.Module], loss_of: Callable[[], Tensor], steps: int, rate: float) -> float:
    """Minimise ``loss_of()`` by AdamW over one cycle of the rate; leaves the averaged weights. Returns seconds."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps + 1, pct_start=0.05)
    average = require("diffusers.training_utils", "text").EMAModel(parameters, decay=0.998)
    began, report_every, losses = time.perf_counter(), max(1, steps // 10), []
    for step in range(1, steps + 1):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.step(parameters)
        losses.append(loss.item())
        if step % report_every == 0 or step == steps:
            mean, seconds = np.mean(losses[-report_every:]), time.perf_counter() - began
            print(f"{name}: step {step} of {steps}, loss {mean:.5f}, {seconds:.0f} s", flush=True)
    average.copy_to(parameters)
    return time.perf_counter() - began


def train_vae(vae: nn.Module, images: Tensor, steps: int, batch: int) -> float:
    """Train the autoencoder on images [N, 3, 16, 16]; then latents have unit variance by its scaling_factor."""

    def loss() -> Tensor:
        real = images[torch.randint(len(images), (batch,))]
        posterior = vae.encode(real).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        return F.mse_loss(decoded, real) + KL_WEIGHT * posterior.kl().mean() / real[0].numel()

    seconds = train("vae", [vae], loss, steps, VAE_RATE)
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=1 / latents_of(vae, images).std().item())
    return seconds


@torch.no_grad()
def latents_of(vae: nn.Module, images: Tensor) -> Tensor:
    """The posteriors' means [N, 4, 8, 8], not scaled."""
    return torch.cat([vae.encode(block).latent_dist.mean for block in images.split(256)])


def train_unet(parts: dict[str, object], latents: Tensor, digits: Tensor, steps: int, batch: int) -> float:
    """Train U-Net and text encoder on scaled latents [N, 4, 8, 8] of the digits [N]."""
    unet, text_encoder, scheduler = parts["unet"], parts["text_encoder"], parts["scheduler"]
    prompts = [*map(prompt_of, range(10)), ""]
    padding = dict(padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    tokens = parts["tokenizer"](prompts, **padding).input_ids

    def loss() -> Tensor:
        chosen = torch.randint(len(latents), (batch,))
        told = torch.where(torch.rand(batch) < DROPPED, len(prompts) - 1, digits[chosen])
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch,))
        real, noise = latents[chosen], torch.randn(batch, *latents.shape[1:])
        noisy = scheduler.add_noise(real, noise, timesteps)
        predicted = unet(noisy, timesteps, encoder_hidden_states=text_encoder(tokens)[0][told]).sample
        return F.mse_loss(predicted, scheduler.get_velocity(real, noise, timesteps))

    seconds = train("unet", [unet, text_encoder], loss, steps, UNET_RATE)
    unet.eval(), text_encoder.eval()
    return seconds


# -- quality -----------------------------------------------------------------------------------------------------------


def right(judge: DigitJudge, images: Tensor, digits: Tensor) -> dict[str, float]:
    """Share of images [N, 3, 16, 16] that 3-NN calls the digit they are, shrunk by means: of all, and of the threes."""
    found = torch.from_numpy(judge.knn_labels(F.interpolate(images, size=judge.image_size, mode="area"))) == digits
    return {"all": found.double().mean().item(), "3": found[digits == 3].double().mean().item()}


def check_vae(folder: Path, judge: DigitJudge, images: Tensor, digits: Tensor) -> dict:
    """How held-out images survive the saved autoencoder: decibels, cosine of mean colours, shares called right."""
    autoencoder = Autoencoder(folder)
    decoded = autoencoder.decode(autoencoder.encode(images))
    shares = {"called_right": right(judge, decoded, digits), "without_vae": right(judge, images, digits)}
    return {"psnr_db": psnr(images, decoded), "colour_cosine": mean_colour_cosine(images, decoded), **shares}


def draw_samples(pipeline, digits: Tensor, guidance: float, seed: int) -> Tensor:
    """The library's own samples of the prompts of digits [N], [N, 3, 16, 16] in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    options = dict(num_inference_steps=SAMPLING_STEPS, guidance_scale=guidance, generator=generator, output_type="pt")
    return pipeline([*map(prompt_of, digits.tolist())], height=SIDE, width=SIDE, **options).images * 2 - 1


def check_samples(folder: Path, judge: DigitJudge, count: int, seed: int) -> dict:
    """Shares of ``count`` samples a digit called right, by guidance, of the saved pipeline; draws some of them."""
    pipeline = require("diffusers", "text").StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    digits, shares, rows = torch.arange(10).repeat(count), {}, []
    for guidance in GUIDANCE:
        images = draw_samples(pipeline, digits, guidance, seed)
        shares[str(guidance)] = right(judge, images, digits)
        rows += [(f"guidance {guidance}", block) for block in images[:40].split(10)]
    image_grid(rows, folder / "samples.png")
    return shares


# -- command -----------------------------------------------------------------------------------------------------------


def make_pipeline(arguments: argparse.Namespace) -> dict:
    """Train, save and check; what report.json holds."""
    torch.manual_seed(arguments.seed)
    judge, out = DigitJudge(arguments.judge), arguments.out
    (images, digits), held_out = read_digits(arguments.data, "train"), read_digits(arguments.data, "test")
    parts = build_parts()
    vae = parts["vae"]
    seconds = {"vae": train_vae(vae, images, arguments.vae_steps, arguments.vae_batch)}
    latents = latents_of(vae, images) * vae.config.scaling_factor
    seconds["unet"] = train_unet(parts, latents, digits, arguments.unet_steps, arguments.unet_batch)
    save(parts, out)
    began = time.perf_counter()
    report = {"parameters": {name: parameters_of(parts[name]) for name in ("vae", "unet", "text_encoder")}}
    report |= {"real_digits": {"all": judge.knn_accuracy, "3": judge.recall(3)}}
    report |= {"vae": check_vae(out, judge, *held_out), "scaling_factor": vae.config.scaling_factor}
    report |= {"samples_called_right": check_samples(out, judge, arguments.samples, arguments.seed)}
    return report | {"seconds": seconds | {"checks": time.perf_counter() - began}}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="digits of 16×16 as `rdmd pack digits` leaves them")
    add("--judge", type=Path, required=True, metavar="DIR", help="the same of 8×8, which samples are compared with")
    add("--out", type=Path, required=True, metavar="DIR", help="where the pipeline goes")
    add("--vae-steps", type=int, default=2400, help="updates of the autoencoder (%(default)s)")
    add("--unet-steps", type=int, default=2000, help="updates of U-Net and text encoder (%(default)s)")
    add("--vae-batch", type=int, default=32, help="images of an update of the autoencoder (%(default)s)")
    add("--unet-batch", type=int, default=64, help="latents of an update of the U-Net (%(default)s)")
    add("--samples", type=int, default=32, help="samples of each digit that are judged (%(default)s)")
    add("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    for option in ("vae_steps", "unet_steps", "vae_batch", "unet_batch", "samples"):
        if getattr(arguments, option) < 1:
            parser.error(f"--{option.replace('_', '-')} {getattr(arguments, option)} must be at least 1")
    try:
        with quiet(require("diffusers", "text"), require("transformers", "text")):
            report = make_pipeline(arguments)
    except InputError as error:
        parser.error(str(error))
    text = json.dumps(report, indent=1)
    write_atomically(arguments.out / "report.json", text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
