"""Prompts embedded by a pipeline's own tokenizers and text encoders, once, and kept as safetensors."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from rdmd_fast.errors import InputError
from rdmd_fast.extras import check_installed, quiet, require
from rdmd_fast.files import make_folder, sha256_of, write_atomically
from rdmd_fast.model_files.diffusers_files import read_json
from rdmd_fast.model_files.export_format import read_tensors
from rdmd_fast.model_files.text_pipeline import FAMILIES, INDEX, NEGATIVE, OPTIONS, clip_tokens

FILE = "prompts.safetensors"  # in a run folder


class Encoder(NamedTuple):
    """A tokenizer and a text encoder of a pipeline, by classes of transformers."""

    tokenizers: frozenset[str]
    encoders: frozenset[str]


CLIP = Encoder(
    frozenset(("CLIPTokenizer", "CLIPTokenizerFast")), frozenset(("CLIPTextModel", "CLIPTextModelWithProjection"))
)
T5 = Encoder(frozenset(("T5Tokenizer", "T5TokenizerFast")), frozenset(("T5EncoderModel",)))
JOINT_WIDTH = 4096  # the library's default
# In the order of tokenizer, tokenizer_2, …
ENCODERS = {
    "stable_diffusion": (CLIP,), "stable_diffusion_xl": (CLIP, CLIP), "stable_diffusion_3": (CLIP, CLIP, T5),
    "flux": (CLIP, T5),
}  # fmt: skip


def store_prompts(
    path: Path,
    folder: Path,
    prompts: Mapping[str, str],
    negative_prompt: str | None,
    tokens: int,
    say: Callable[[str], object],
) -> None:
    """``embed_prompts`` into the safetensors file ``path``, unless it holds just those; errors as there."""
    made_of = _digest(folder, prompts, negative_prompt, tokens)
    if _made_of(path) == made_of:
        return
    tensors = embed_prompts(folder, prompts, negative_prompt, tokens, say)
    make_folder(path.parent)
    write_atomically(path, save(tensors, metadata={"made_of": made_of}))


def stored_prompts(path: Path) -> dict[str, torch.Tensor]:
    """What ``store_prompts`` has written; InputError if that is damaged."""
    return read_tensors(path, "remove it, it is made again")


@torch.no_grad()
def embed_prompts(
    folder: str | Path,
    prompts: Mapping[str, str],
    negative_prompt: str | None,
    tokens: int,
    say: Callable[[str], object],
) -> dict[str, torch.Tensor]:
    """Embed prompts and a negative one by the pipeline class's own method, in float32 on the CPU.

    The text encoders are loaded for it, from safetensors alone, and nothing keeps them in memory.

    Args:
        folder: of the pipeline.
        prompts: by role, as ``text_pipeline.PROMPT``.
        negative_prompt: None for what the pipeline takes without one: an empty text, or for SDXL zeros.
        tokens: length of an embedded prompt; a longer one is cut. Of Stable Diffusion 3 CLIP's tokens come first, then
            those of T5, which are zeros where the pipeline was saved without it.
        say: is told of a prompt that is cut.

    Returns:
        Of each role and of the negative prompt embeds [1, tokens, D]; with a pooled embedding also pooled [1, P].

    Raises:
        InputError: diffusers or transformers is not installed, a tokenizer or text encoder is missing, pickled or of
            a class that is not known.
    """
    folder = Path(folder)
    diffusers, transformers = require("diffusers", "text"), require("transformers", "text")
    with quiet(diffusers, transformers):
        pipeline = _EncodingPipeline(diffusers, transformers, folder, tokens)
        texts = list(prompts.values())
        for text in filter(None, (*texts, negative_prompt)):
            pipeline.tell_if_cut(text, say)
        try:
            embedded = pipeline.embed(texts, None if negative_prompt is None else [negative_prompt] * len(texts))
        except (RuntimeError, ValueError, IndexError) as error:  # of an encoder that does not fit its tokenizer
            reason = " ".join(str(error).split())[:120]
            raise InputError(f"{folder}: its text encoder embeds no prompt ({reason}), copy the folder again") from None
    tensors = {}
    for kind, wanted, unwanted in zip(("embeds", "pooled"), embedded[::2], embedded[1::2], strict=False):
        rows = zip((*prompts, NEGATIVE), (*wanted.split(1), unwanted[:1]), strict=True)
        tensors |= {f"{role}{kind}": row.float().clone() for role, row in rows}
    return tensors


class _EncodingPipeline:
    """The library's pipeline with tokenizers and text encoders alone."""

    def __init__(self, diffusers, transformers, folder: Path, tokens: int):
        values = read_json(folder / INDEX)
        self.family = FAMILIES[values["_class_name"]]
        encoders = ENCODERS[self.family]
        clip = clip_tokens(folder) if T5 in encoders else tokens
        self.lengths = {CLIP: clip, T5: tokens if self.family == "flux" else tokens - clip}
        parts, self.tokenizers = {}, {}
        for encoder, suffix in zip(encoders, ("", "_2", "_3"), strict=False):
            names = f"tokenizer{suffix}", f"text_encoder{suffix}"
            if names[1] == "text_encoder_3" and values.get(names[1]) == [None, None]:
                parts |= dict.fromkeys(names)
                continue
            for name, classes in zip(names, encoder, strict=True):
                parts[name] = _load(transformers, folder, values, name, classes)
            parts[names[0]].model_max_length = self.lengths[encoder]
            self.tokenizers.setdefault(encoder, parts[names[0]])
        network = OPTIONS[self.family].part
        parts |= dict.fromkeys(("vae", network, "scheduler"))
        if self.family == "stable_diffusion_xl":
            zeros = bool(values.get("force_zeros_for_empty_prompt", True))
            parts |= {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}
        elif self.family == "stable_diffusion":
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        self.library_pipeline = getattr(diffusers, values["_class_name"])(**parts)
        if self.family == "stable_diffusion_3":  # which asks its transformer for the width of T5's zeros
            width = read_json(folder / network / "config.json").get("joint_attention_dim", JOINT_WIDTH)
            stand_in = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=width))
            object.__setattr__(self.library_pipeline, network, stand_in)

    def tell_if_cut(self, text: str, say: Callable[[str], object]) -> None:
        for encoder, tokenizer in self.tokenizers.items():
            count, most = len(tokenizer(text, truncation=False, verbose=False).input_ids), self.lengths[encoder]
            if count > most:
                cut = f"is of {count} tokens, the text encoder takes {most}: the rest is cut"
                say(f"warning: prompt {text[:40]!r} {cut}")

    def embed(self, texts: list[str], negative: list[str] | None) -> tuple[torch.Tensor, ...]:
        """Embeddings of the prompts and the negative ones, and where there are any both pooled."""
        options = {"device": "cpu", "num_images_per_prompt": 1}
        if self.family == "flux":
            options |= {"max_sequence_length": self.lengths[T5]}
            wanted, unwanted = (
                self.library_pipeline.encode_prompt(each, **options) for each in (texts, negative or [""] * len(texts))
            )
            return wanted[0], unwanted[0], wanted[1], unwanted[1]
        if self.family == "stable_diffusion_3":
            options |= {"prompt_2": None, "prompt_3": None, "max_sequence_length": self.lengths[T5]}
        options |= {"negative_prompt": negative, "do_classifier_free_guidance": True}
        return self.library_pipeline.encode_prompt(prompt=texts, **options)


def _load(transformers, folder: Path, values: dict, name: str, classes: frozenset[str]):
    """A tokenizer or text encoder of the pipeline."""
    entry, path = values.get(name), folder / name
    if not path.is_dir() or not isinstance(entry, list) or len(entry) != 2 or None in entry:
        raise InputError(f"{path}: missing, prompts are embedded by it: copy the folder again")
    if entry[0] != "transformers" or entry[1] not in list(classes):
        raise InputError(
            f"{folder / INDEX}: {name} is {entry}, supported of transformers: {', '.join(sorted(classes))}"
        )
    if (path / "spiece.model").is_file() and not (path / "tokenizer.json").is_file():
        for package in ("sentencepiece", "google.protobuf"):
            check_installed(package, "text")
    options = {"local_files_only": True, "trust_remote_code": False}
    if name.startswith("text_encoder"):
        options |= {"use_safetensors": True, "dtype": torch.float32} | _variant(path)
    try:
        return getattr(transformers, entry[1]).from_pretrained(str(path), **options)
    except Exception as error:  # whatever the library makes of a damaged folder
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"{path}: cannot be loaded ({reason}), copy the folder again") from None


def _variant(path: Path) -> dict[str, str]:
    """What to tell transformers of a text encoder's weights: a variant where there are no plain ones.

    Raises:
        InputError: there are none, or only pickled ones.
    """
    if (path / "model.safetensors").is_file() or (path / "model.safetensors.index.json").is_file():
        return {}
    for found in sorted((*path.glob("model.*.safetensors"), *path.glob("model.safetensors.index.*.json"))):
        variant = found.name.removeprefix("model.").removeprefix("safetensors.index.")
        return {"variant": variant.removesuffix(".safetensors").removesuffix(".json").split("-")[0]}
    if pickled := next(path.glob("*.bin"), None):
        raise InputError(
            f"{pickled}: a pickle, which is not loaded: save the pipeline as safetensors (in Python: "
            "diffusers.DiffusionPipeline.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER))"
        )
    raise InputError(f"{path}/model.safetensors: missing, copy the text encoder's weights there")


def _digest(folder: Path, prompts: Mapping[str, str], negative_prompt: str | None, tokens: int) -> str:
    """SHA-256 of all that an embedding follows from."""
    digest = hashlib.sha256(repr((sorted(prompts.items()), negative_prompt, tokens)).encode())
    digest.update((folder / INDEX).read_bytes())
    for part in sorted((*folder.glob("tokenizer*"), *folder.glob("text_encoder*"))):
        for path in sorted(part.iterdir()):
            if path.suffix in (".json", ".txt", ".safetensors", ".model"):
                digest.update(f"{part.name}/{path.name}:{sha256_of(path)}".encode())
    return digest.hexdigest()


def _made_of(path: Path) -> str | None:
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("made_of")
    except (OSError, SafetensorError):
        return None
