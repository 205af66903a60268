"""Teachers from a text-to-image pipeline that diffusers has saved: its network, its schedule and what its prompts need.

Nothing but JSON and safetensors is read here; the libraries are needed where the network is built.
"""

from pathlib import Path

import torch

from rdmd_fast.errors import InputError
from rdmd_fast.model_files.diffusers_files import check_class, read_json, read_weights
from rdmd_fast.model_files.diffusers_folder import read_scheduler
from rdmd_fast.model_files.export_format import ExportConfig
from rdmd_fast.networks.text_options import TIME_IDS, TextOptions, TextTransformerOptions, TextUNetOptions
from rdmd_fast.options import Options

INDEX = "model_index.json"
FAMILIES = {
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusionXLPipeline": "stable_diffusion_xl",
    "StableDiffusion3Pipeline": "stable_diffusion_3",
    "FluxPipeline": "flux",
}
OPTIONS = {
    "stable_diffusion": TextUNetOptions,
    "stable_diffusion_xl": TextUNetOptions,
    "stable_diffusion_3": TextTransformerOptions,
    "flux": TextTransformerOptions,
}
TOKENS = 77  # of CLIP
GUIDANCE_EMBEDDING = 3.5  # of FLUX.1 [dev], as its pipeline takes it
SAMPLE_SIZE = 128  # of a transformer that does not say
PROMPT, NEGATIVE, TIME_IDS_NAME = "prompt.", "negative.", "time_ids"
FAKE = "fake."  # role of the fake score's own prompt


def is_text_pipeline(folder: str | Path) -> bool:
    """Whether ``folder`` holds a pipeline of a class that we know.

    Raises:
        InputError: it holds one of another class, whose U-Net is no UNet2DModel either; the line names the class.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        return False
    name = read_json(folder / INDEX).get("_class_name")
    if isinstance(name, str) and name in FAMILIES:
        return True
    unet = folder / "unet/config.json"
    if not unet.is_file() or read_json(unet).get("_class_name") != "UNet2DModel":
        check_class(folder / INDEX, {"_class_name": name}, *FAMILIES, "pipelines of a UNet2DModel")
    return False


def read_text_pipeline(folder: str | Path) -> tuple[ExportConfig, dict[str, torch.Tensor]]:
    """How to build and read a pipeline's network, and its weights in float32; ``with_prompts`` adds what is lacking.

    Weights are in one file or in several under an index, plain or of one variant such as fp16.

    Raises:
        InputError: a file is missing or damaged, the weights are pickled, or network, scheduler or autoencoder are none
            that we can read; the line names the file and the key.
    """
    config = read_text_pipeline_config(folder)
    part = config.network.part
    weights = read_weights(Path(folder) / part)
    return config, {f"{part}.{name}": tensor for name, tensor in weights.items()}


def read_text_pipeline_config(folder: str | Path) -> ExportConfig:
    """The first half of ``read_text_pipeline``, from the JSON files alone."""
    folder = Path(folder)
    family = FAMILIES[read_json(folder / INDEX)["_class_name"]]
    options = OPTIONS[family]
    path = folder / options.part / "config.json"
    values = read_json(path)
    check_class(path, values, options.class_of(family))
    scheduler = folder / "scheduler/scheduler_config.json"
    if not scheduler.is_file():
        raise InputError(f"{scheduler}: missing, the noise levels follow from it: copy the folder again")
    schedule, diffusion = read_scheduler(scheduler)
    given = {
        "family": family,
        options.part: {key: value for key, value in values.items() if key[:1] != "_"},
        "schedule": schedule,
        "tokens": _tokens(folder, family, values),
    }
    network = options.parse(given, str(path))
    _check_autoencoder(folder, network)
    size = values.get("sample_size", SAMPLE_SIZE if options is TextTransformerOptions else None)
    sides = size if isinstance(size, list) else [size, size]
    shape = {"role": "teacher", "sample_shape": [network.channels, *sides], "pipeline": str(folder.absolute())}
    return ExportConfig.parse({**shape, "network": network, "diffusion": diffusion}, f"{path}: sample_size")


def with_prompts(
    config: ExportConfig,
    weights: dict[str, torch.Tensor],
    prompts: dict[str, torch.Tensor],
    sample_shape: tuple[int, ...],
    folder: str | Path,
    guidance: float = 1.0,
    role: str = PROMPT,
    guidance_embedding: float = GUIDANCE_EMBEDDING,
) -> tuple[ExportConfig, dict[str, torch.Tensor]]:
    """A pipeline's network told its prompts.

    Args:
        config, weights: of ``read_text_pipeline``.
        prompts: of ``prompts.embed_prompts``.
        sample_shape: (C, h, w) of the latents; SDXL is told their pictures' size, whole and without a crop.
        folder: of the pipeline.
        guidance: see ``TextOptions``; at 1 the negative prompt is left out.
        role: whose prompt.
        guidance_embedding: what a network is told that is told its guidance, with each prompt.

    Raises:
        InputError: the autoencoder's configuration is missing or damaged.
    """
    network = guided(config.network, guidance)
    roles = {PROMPT: role} if guidance == 1 else {PROMPT: role, NEGATIVE: NEGATIVE}
    told = {
        own + name.removeprefix(given): tensor.float()
        for own, given in roles.items()
        for name, tensor in prompts.items()
        if name.startswith(given)
    }
    if network.tells_size:
        size = [side * pixels_per_latent(folder) for side in sample_shape[1:]]
        row = torch.tensor([[*size, *[0] * (TIME_IDS - 4), *size]], dtype=torch.float32)
        told |= {f"{own}{TIME_IDS_NAME}": row.clone() for own in roles}
    if network.embeds_guidance:
        told |= {f"{own}guidance": torch.tensor([guidance_embedding], dtype=torch.float32) for own in roles}
    config = config.model_copy(update={"network": network, "sample_shape": list(sample_shape)})
    return config, weights | told


def guided(network: Options, guidance: float) -> Options:
    """A network's options with a guidance; those of a network without prompts as they are."""
    return network.model_copy(update={"guidance": float(guidance)}) if isinstance(network, TextOptions) else network


def pixels_per_latent(folder: str | Path) -> int:
    """Pixels of a picture's side for one of its latent's, by the configuration of the pipeline's autoencoder."""
    path = Path(folder) / "vae/config.json"
    widths = read_json(path).get("block_out_channels")
    if not isinstance(widths, list) or not 1 <= len(widths) <= 10:
        raise InputError(f"{path}: block_out_channels: missing, the size of its latents follows from it")
    return 2 ** (len(widths) - 1)


def _check_autoencoder(folder: Path, network: TextOptions) -> None:
    path = folder / "vae/config.json"
    if not path.is_file():
        raise InputError(f"{path}: missing, the latents are those of the pipeline's autoencoder: copy the folder again")
    values = read_json(path)
    check_class(path, values, "AutoencoderKL")
    if values.get("latent_channels", 4) != network.channels:
        raise InputError(
            f"{path}: latent_channels is {values.get('latent_channels', 4)!r}, {network.part}/config.json has "
            f"in_channels {network.config.get('in_channels', 'unset')}: the autoencoder is another pipeline's, copy "
            "the folder again"
        )


def _tokens(folder: Path, family: str, values: dict) -> int:
    """Of an embedded prompt; those of T5 are as many as the pipelines take (FLUX.1 [schnell]: as its authors do)."""
    if family == "flux":
        return 512 if values.get("guidance_embeds") else 256
    return clip_tokens(folder) + (256 if family == "stable_diffusion_3" else 0)


def clip_tokens(folder: Path) -> int:
    """Tokens of a prompt that CLIP embeds: the tokenizer's, or as many as the encoder takes where it does not say."""
    for file, key in (("tokenizer/tokenizer_config.json", "model_max_length"),
                      ("text_encoder/config.json", "max_position_embeddings")):  # fmt: skip
        path = folder / file
        count = read_json(path).get(key) if path.is_file() else None
        if isinstance(count, int) and 1 <= count <= 2**14:
            return count
    return TOKENS
