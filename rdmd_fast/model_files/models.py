"""What an export is loaded as: a one-step translator or a denoiser."""

from collections.abc import Callable
from pathlib import Path

import torch

from rdmd_fast.diffusion import Reading, denoise
from rdmd_fast.errors import InputError
from rdmd_fast.model_files.export_format import ExportConfig, read_export
from rdmd_fast.model_files.weights import rebuild
from rdmd_fast.networks.text_options import TextOptions
from rdmd_fast.transport_weight import with_condition


def condition_inputs(
    config: ExportConfig, weight: float | torch.Tensor | None, count: int, device="cpu"
) -> dict[str, torch.Tensor]:
    """What a network is given for λ, by keyword: a number, [N], or None for the middle of its range.

    Raises:
        InputError: λ lies outside the range, or the network is of one λ only.
    """
    bounds = config.weight_range
    if bounds is None:
        if weight is not None:
            raise InputError(
                "transport_weight: the network was trained for a single one and takes none; train with "
                "rdmd.transport_weight={log_uniform: [low, high]} to choose it afterwards"
            )
        return {}
    condition = bounds.condition(bounds.middle if weight is None else weight, count)
    return {"condition": condition.to(device)}


class Generator(torch.nn.Module):
    """One-step translator: ``generator(x)`` maps [N, C, H, W] (or points [N, D]) in data units to the target domain.

    One that was trained for a range of λ takes ``transport_weight``, a number or a tensor [N], for every call: more
    keeps more of x, less follows the target domain closer. Without it λ is the range's geometric mean.
    """

    def __init__(self, network: torch.nn.Module, config: ExportConfig):
        super().__init__()
        self.model, self.config = network, config
        self.reading = Reading.of(config.reading, config.diffusion, config.generator_sigma)

    @property
    def transport_weights(self) -> tuple[float, float] | None:
        """(lowest, highest) λ that it takes; None for a generator of a single one."""
        return tuple(self.config.transport_weights) if self.config.transport_weights else None

    def forward(self, x: torch.Tensor, transport_weight: float | torch.Tensor | None = None) -> torch.Tensor:
        """InputError for a λ outside ``transport_weights``, or for any if that is None."""
        dtype = next(self.model.parameters()).dtype
        network = with_condition(self.model, condition_inputs(self.config, transport_weight, len(x), x.device))
        return self.reading(network, x.float(), self.config.label_rows(None, len(x), x.device), dtype)


def translator(
    weights: dict[str, torch.Tensor], export: ExportConfig, device, transport_weight: float | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """One-step translation of samples [N, …] on the CPU by a run's averaged weights, some at a time; CPU again."""
    generator = Generator(rebuild(export, weights, "EMA"), export).to(device)

    @torch.no_grad()
    def translate(x: torch.Tensor, chunk: int = 256) -> torch.Tensor:
        return torch.cat([generator(part.to(device), transport_weight).cpu() for part in x.split(chunk)])

    return translate


class Denoiser(torch.nn.Module):
    """``denoiser(x_noisy, sigma, class_labels=None)``: E[y | y + σ ε] of [N, …] at σ a number or [N], data units.

    A fake score of a range of λ takes ``transport_weight`` as a ``Generator`` does.
    """

    def __init__(self, network: torch.nn.Module, config: ExportConfig):
        super().__init__()
        self.model, self.config = network, config

    def forward(
        self,
        x_noisy: torch.Tensor,
        sigma,
        class_labels: torch.Tensor | None = None,
        transport_weight: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        sigma = torch.as_tensor(sigma, dtype=torch.float64).cpu()
        labels = self.config.label_rows(class_labels, len(x_noisy), x_noisy.device)
        dtype = next(self.model.parameters()).dtype
        network = with_condition(
            self.model, condition_inputs(self.config, transport_weight, len(x_noisy), x_noisy.device)
        )
        return denoise(network, x_noisy, sigma, self.config.diffusion, labels, dtype)


def load_generator(folder: str | Path) -> Generator:
    """The generator of a RUN/export folder, on the CPU, in evaluation mode; InputError if there is none."""
    config, weights = read_export(folder, "generator")
    return Generator(rebuild(config, weights, str(folder)), config).eval()


def load_denoiser(
    source: str | Path,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    guidance: float = 1.0,
    guidance_embedding: float | None = None,
) -> Denoiser:
    """A teacher as a denoiser, on the CPU, in evaluation mode.

    Args:
        source: a RUN/export folder of the teacher stage, an NVIDIA EDM pickle, or a diffusers folder.
        prompt, negative_prompt, guidance: of a text-to-image pipeline, as ``TextOptions`` describes them; without
            them it is told an empty prompt.
        guidance_embedding: what one is told that is told its guidance; None for 3.5.

    Raises:
        InputError: there is none, or a prompt is given for a network that takes none.
    """
    from rdmd_fast.model_files.hub import local_folder
    from rdmd_fast.model_files.teachers import read_teacher
    from rdmd_fast.model_files.text_pipeline import INDEX

    source = local_folder(source)
    config, weights = read_teacher(source)
    if isinstance(config.network, TextOptions) and (source / INDEX).is_file():
        config, weights = _told(config, weights, source, prompt, negative_prompt, guidance, guidance_embedding)
    elif (prompt, negative_prompt, guidance, guidance_embedding) != (None, None, 1.0, None):
        raise InputError(f"{source}: is no text-to-image pipeline, leave out prompt, negative_prompt and guidance")
    return Denoiser(rebuild(config, weights, str(source)), config).eval()


def _told(config, weights, folder, prompt: str | None, negative_prompt: str | None, guidance: float, embedding):
    """A pipeline's configuration and weights with its prompts."""
    from rdmd_fast.model_files.prompts import embed_prompts
    from rdmd_fast.model_files.text_pipeline import GUIDANCE_EMBEDDING, PROMPT, with_prompts

    if embedding is not None and not config.network.embeds_guidance:
        raise InputError(f"{folder}: its network is not told its guidance, leave out guidance_embedding")
    prompts = embed_prompts(folder, {PROMPT: prompt or ""}, negative_prompt, config.network.tokens, print)
    return with_prompts(
        config,
        weights,
        prompts,
        tuple(config.sample_shape),
        folder,
        guidance,
        PROMPT,
        GUIDANCE_EMBEDDING if embedding is None else embedding,
    )
