"""Pipelines by their name on the Hugging Face hub, as hf:owner/name or hf:owner/name@revision."""

import re
from pathlib import Path

from rdmd_fast.errors import InputError
from rdmd_fast.extras import require

NAME = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
TEXT_PARTS = tuple(f"{part}{suffix}" for part in ("text_encoder", "tokenizer") for suffix in ("", "_2", "_3"))
PARTS = ("unet", "transformer", "vae", "scheduler", *TEXT_PARTS)
PATTERNS = ["model_index.json", *(f"{part}/*" for part in PARTS)]
NOT_READ = ["*.bin", "*.msgpack", "*.onnx*", "*.h5", "*.xml", "*non_ema*"]


def local_folder(spec: str | Path) -> Path:
    """Where the files of ``spec`` are: ``spec`` itself, or for a name on the hub a folder of its cache.

    What is not in the cache is fetched: JSON, text and safetensors of a pipeline's parts, the variant fp16 where there
    are no others.

    Raises:
        InputError: huggingface_hub is not installed, or there is no such pipeline, or no network.
    """
    if not str(spec).startswith("hf:"):
        return Path(spec)
    match = NAME.fullmatch(str(spec))
    if match is None:
        raise InputError(f"{spec}: is no name on the hub, write hf:owner/name or hf:owner/name@revision")
    hub = require("huggingface_hub", "text")
    try:
        return Path(_fetch(hub, match["repository"], match["revision"]))
    except Exception as error:  # of the network, the hub, or the disk of its cache
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{spec}: cannot be fetched from the hub ({reason}); name a folder, or set HF_ENDPOINT, HF_TOKEN or HF_HOME"
        ) from None


def _fetch(hub, repository: str, revision: str | None) -> str:
    try:
        names = hub.HfApi().list_repo_files(repository, revision=revision)
    except Exception as error:
        try:  # without a network what an earlier run has fetched will do
            return hub.snapshot_download(repository, revision=revision, local_files_only=True)
        except hub.errors.LocalEntryNotFoundError:
            raise error from None
    plain = any(name.startswith(("unet/", "transformer/")) and _is_plain(name) for name in names)
    ignored = [*NOT_READ, "*.fp16.*"] if plain else NOT_READ
    return hub.snapshot_download(repository, revision=revision, allow_patterns=PATTERNS, ignore_patterns=ignored)


def _is_plain(name: str) -> bool:
    return name.endswith(".safetensors") and ".fp16." not in name and "non_ema" not in name
