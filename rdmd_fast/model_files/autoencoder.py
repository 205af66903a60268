"""Images to latents and back, by an AutoencoderKL that diffusers has saved (latent diffusion, arXiv 2112.10752)."""

import math
from pathlib import Path

import torch

from rdmd_fast.errors import InputError
from rdmd_fast.extras import require
from rdmd_fast.model_files.diffusers_files import check_class, read_json, read_weights
from rdmd_fast.model_files.hub import local_folder
from rdmd_fast.model_files.weights import load_weights


class Autoencoder(torch.nn.Module):
    """``encode`` and ``decode`` between images and latents of about unit variance, in float32, without gradients.

    Args:
        folder: config.json and diffusion_pytorch_model.safetensors of an AutoencoderKL, or a pipeline with one in vae/,
            which may be one of the hub (hf:owner/name).

    Attributes:
        channels: of a latent.
        factor: pixels of an image's side for one of its latent's.

    Raises:
        InputError: diffusers is not installed, or no such autoencoder is in ``folder``.
    """

    CHUNK = 16 * 256**2  # pixels of images at a time, which bounds the memory of a picture or a whole set
    LARGEST = 1024**2  # pixels of an image that is not done by the library's tiles

    def __init__(self, folder: str | Path):
        super().__init__()
        path = autoencoder_folder(folder) / "config.json"
        if not path.is_file():
            raise InputError(f"{path}: missing, name the folder of a diffusers AutoencoderKL")
        config = read_json(path)
        check_class(path, config, "AutoencoderKL")
        self.model = _build(path, config)
        _load(self.model, read_weights(path.parent), path.parent)
        self.model.eval().requires_grad_(False)
        values = self.model.config
        self.channels, self.factor = values.latent_channels, 2 ** (len(values.block_out_channels) - 1)
        self.image_channels = values.in_channels
        self.scale, self.shift = values.scaling_factor, values.shift_factor or 0.0

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, H, W] in [-1, 1] to the posterior's means (z - shift) scale, float32 [N, C, h, w].

        Computed where the autoencoder is, returned on the device of the images.

        Raises:
            InputError: other channels, or a side that ``factor`` does not divide.
        """
        if images.shape[1] != self.image_channels or any(side % self.factor for side in images.shape[2:]):
            raise InputError(
                f"images have shape {list(images.shape)}, the autoencoder takes {self.image_channels} channels and "
                f"sides that divide by {self.factor}: choose another --resolution"
            )
        return self._chunked(self._encode, images, math.prod(images.shape[2:]))

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [N, C, h, w] to images, float32 [N, 3, H, W] in [-1, 1] on the device of the latents.

        Raises:
            InputError: latents of other channels.
        """
        if latents.shape[1] != self.channels:
            raise InputError(
                f"latents have shape {list(latents.shape)}, the autoencoder decodes {self.channels} channels: "
                "name the one that has encoded them"
            )
        return self._chunked(self._decode, latents, self.factor**2 * math.prod(latents.shape[2:]))

    def image_shape(self, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(3, H, W) of the image of a latent (C, h, w)."""
        return self.image_channels, latent_shape[1] * self.factor, latent_shape[2] * self.factor

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        return (self.model.encode(images).latent_dist.mean - self.shift) * self.scale

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.model.decode(latents / self.scale + self.shift).sample.clamp(-1, 1)

    def _chunked(self, function, batch: torch.Tensor, pixels: int) -> torch.Tensor:
        """``function`` of some at a time; ``pixels`` are those of an image."""
        self.model.use_tiling = pixels > self.LARGEST
        device = next(self.model.parameters()).device
        parts = batch.split(max(1, self.CHUNK // pixels))
        return torch.cat([function(part.to(device, torch.float32)).to(batch.device) for part in parts])


def autoencoder_folder(folder: str | Path) -> Path:
    """The folder of an autoencoder's own files: of a pipeline that in it."""
    folder = local_folder(folder)
    return folder / "vae" if (folder / "model_index.json").is_file() else folder


def _build(path: Path, config: dict) -> torch.nn.Module:
    library = require("diffusers", "diffusers")
    try:
        model = library.AutoencoderKL.from_config({key: value for key, value in config.items() if key[:1] != "_"})
        numbers = model.config.scaling_factor, model.config.shift_factor or 0.0
        if not all(math.isfinite(number) for number in numbers) or not numbers[0]:
            raise ValueError("scaling_factor or shift_factor is no number to scale by")
        return model
    except Exception as error:  # whatever the library makes of a damaged configuration
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{path}: describes no AutoencoderKL ({reason}), copy the folder again") from None


def _load(model: torch.nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
    for name, own in model.state_dict().items():
        # Old autoencoders hold the attention's projections as 1x1 convolutions.
        if name in weights and weights[name].numel() == own.numel():
            weights[name] = weights[name].view_as(own)
    load_weights(model, weights, str(folder))
