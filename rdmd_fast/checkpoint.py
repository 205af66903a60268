"""Checkpoints of a run: written under another name, published by rename, resumed bit for bit.

    checkpoints/step_00001000/
        manifest.json         step, counters, world size, ZeRO stage, config, every file with its size
        <engine>/state/*      DeepSpeed's own files, one folder an engine
        ranks/00000.safetensors  each rank's EMA shards, unfinished means and random state
    checkpoints/latest        name of the newest complete one, written last

DeepSpeed's files are pickles: a run folder is as trusted as the code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file

from .distributed import World, zero_stage
from .ema import ShardedEMA
from .errors import InputError
from .options import Options
from .runtime import fsync_path, write_atomically

FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})$")


class CheckpointOptions(Options):
    """What is kept to go on from."""

    every: int = Field(1000, ge=0, description="iterations between checkpoints, 0 for only at the end (ours)")
    keep: int = Field(2, ge=1, description="newest checkpoints that are kept (ours)")


@dataclass
class TrainingState:
    """All that a run is at one moment, besides its configuration."""

    engines: dict[str, object]
    ema: ShardedEMA
    counters: dict[str, int] = field(default_factory=dict)


def save_checkpoint(
    run_dir: Path,
    step: int,
    state: TrainingState,
    tensors: dict[str, torch.Tensor],
    config: dict,
    world: World,
    keep: int,
) -> Path:
    """Write one checkpoint; a collective call.

    Args:
        step: finished iterations.
        tensors: this rank's small tensors to keep beside its EMA shards.
        config: plain resolved configuration, for the manifest.

    Raises:
        InputError: the disk is full or not writable; the previous checkpoint is untouched.
    """
    root = run_dir / "checkpoints"
    final, partial = root / f"step_{step:08d}", root / f".step_{step:08d}.partial"
    problem = None
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
    world.barrier()
    try:
        (partial / "ranks").mkdir(parents=True, exist_ok=True)
        for name, engine in state.engines.items():
            engine.save_checkpoint(str(partial / name), tag="state", save_latest=False)
        own = {f"ema.{index}": shard.cpu().contiguous() for index, shard in enumerate(state.ema.shards)}
        own |= {"rng.cpu": torch.get_rng_state(), **tensors}
        if world.device.type == "cuda":
            own["rng.cuda"] = torch.cuda.get_rng_state(world.device)
        save_file(own, partial / "ranks" / f"{world.rank:05d}.safetensors")
    except OSError as error:
        problem = (
            f"checkpoint {final}: cannot be written ({error.strerror or error}), free some space or change run_dir"
        )
    if world.any(problem is not None):
        raise InputError(problem or f"checkpoint {final}: another rank could not write it")
    world.barrier()
    if world.is_main:
        _publish(root, partial, final, step, state, config, world, keep)
    world.barrier()
    return final


def _publish(root, partial, final, step, state, config, world, keep) -> None:
    files = {}
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            fsync_path(path)
            files[str(path.relative_to(partial))] = path.stat().st_size
    manifest = {
        "format": FORMAT,
        "step": step,
        "counters": state.counters,
        "world_size": world.size,
        "zero_stage": zero_stage(config.get("deepspeed", {})),
        "config": config,
        "files": files,
    }
    write_atomically(partial / "manifest.json", json.dumps(manifest, indent=1))
    fsync_path(partial)
    retired = root / f".{final.name}.retired"
    if final.exists():
        shutil.rmtree(retired, ignore_errors=True)
        os.replace(final, retired)
    os.replace(partial, final)
    fsync_path(root)
    shutil.rmtree(retired, ignore_errors=True)
    write_atomically(root / "latest", final.name + "\n")
    for old in complete_checkpoints(root)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def complete_checkpoints(root: Path) -> list[Path]:
    """Published checkpoints with every file of their manifest in place, newest first."""
    found = [path for path in root.glob("step_*") if _NAME.search(path.name) and not _defect(path)]
    return sorted(found, key=lambda path: int(_NAME.search(path.name)[1]), reverse=True)


def _defect(path: Path) -> str | None:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name, size in manifest["files"].items():
            actual = (path / name).stat().st_size
            if actual != size:
                return f"{name} has {actual} bytes instead of {size}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest cannot be read"
    return None


def find_checkpoint(run_dir: Path, resume: str, say=print) -> Path | None:
    """The checkpoint that ``--resume`` means: ``auto`` the newest complete one, ``never`` none, else a folder.

    Raises:
        InputError: a named folder is no complete checkpoint.
    """
    if resume == "never":
        return None
    if resume == "auto":
        root = run_dir / "checkpoints"
        for path in sorted(root.glob("step_*")):
            defect = _defect(path)
            if defect:
                say(f"checkpoint {path} is passed over: {defect}")
        return next(iter(complete_checkpoints(root)), None)
    path = Path(resume)
    if not path.is_dir():
        raise InputError(f"--resume {resume}: no such folder, name one under RUN/checkpoints")
    defect = _defect(path)
    if defect:
        raise InputError(f"--resume {resume}: not a complete checkpoint ({defect}), use another or --resume auto")
    return path


def set_aside_newer(run_dir: Path, step: int) -> Path | None:
    """Move checkpoints of later steps to RUN/checkpoints.old: they are of a course that this run leaves.

    A later ``--resume auto`` would else take them for its own. Returns the folder if anything was moved.
    """
    root, aside = run_dir / "checkpoints", run_dir / "checkpoints.old"
    later = [path for path in root.glob("step_*") if _NAME.search(path.name) and int(_NAME.search(path.name)[1]) > step]
    for path in later:
        aside.mkdir(exist_ok=True)
        shutil.rmtree(aside / path.name, ignore_errors=True)
        os.replace(path, aside / path.name)
    return aside if later else None


def load_checkpoint(
    path: Path, state: TrainingState, config: dict, world: World
) -> tuple[dict, dict[str, torch.Tensor]]:
    """Bring engines and EMA to the state in ``path``; a collective call.

    Returns:
        (manifest, this rank's further tensors).

    Raises:
        InputError: the checkpoint is of another world size, ZeRO stage or network.
    """
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    _check_compatible(path, manifest, config, world)
    for name, engine in state.engines.items():
        try:
            loaded, _ = engine.load_checkpoint(str(path / name), tag="state")
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"checkpoint {path}: the network {name} in it is another one ({reason})") from None
        if loaded is None:
            raise InputError(f"checkpoint {path}: holds no engine {name}, was it made by the other stage?")
    tensors = load_file(path / "ranks" / f"{world.rank:05d}.safetensors")
    with torch.no_grad():
        for index, shard in enumerate(state.ema.shards):
            shard.copy_(tensors.pop(f"ema.{index}"))
    torch.set_rng_state(tensors.pop("rng.cpu"))
    if "rng.cuda" in tensors and world.device.type == "cuda":
        torch.cuda.set_rng_state(tensors.pop("rng.cuda"), world.device)
    state.counters = manifest["counters"]
    return manifest, tensors


# Sections and keys that may change between a stop and its continuation without making it another experiment.
_FREE = {"run_dir", "telemetry", "checkpoint", "validation"}
# How data come, not which; and how long.
_FREE_KEYS = {
    "train.steps",
    *(f"data.{key}" for key in ("cache_gib", "cache_dir", "workers", "prefetch", "max_dropped")),
}


def _check_compatible(path: Path, manifest: dict, config: dict, world: World) -> None:
    if manifest.get("format") != FORMAT:
        raise InputError(f"checkpoint {path}: format {manifest.get('format')} is not the {FORMAT} of this version")
    for name, there, here in (
        ("ranks", manifest["world_size"], world.size),
        ("ZeRO stage", manifest["zero_stage"], zero_stage(config.get("deepspeed", {}))),
    ):
        if there != here:
            raise InputError(
                f"checkpoint {path}: was written with {name} {there}, this run has {here}; "
                f"resume with {name} {there} or start anew with --resume never"
            )
    saved = _with_defaults(manifest["config"], config)
    for section in config:
        if section in _FREE or saved.get(section) == config[section]:
            continue
        key = next(_differences(saved.get(section), config[section], section), None)
        if key:
            raise InputError(
                f"checkpoint {path}: was trained with {key[0]} = {key[1]!r}, the config says {key[2]!r}; "
                "set it back, or choose another run_dir"
            )


def _with_defaults(saved: dict, now: dict) -> dict:
    """A config that another version saved: what that did not know stands at its default of now."""
    from .config import Config  # imports this module's options

    def known(saved, now):
        if not (isinstance(saved, dict) and isinstance(now, dict)):
            return now
        return {key: known(saved[key], value) for key, value in now.items() if key in saved}

    def filled(saved, defaults):
        if not (isinstance(saved, dict) and isinstance(defaults, dict)):
            return saved
        return {key: filled(saved[key], value) if key in saved else value for key, value in defaults.items()}

    try:
        defaults = Config.model_validate(known(saved, now), strict=False).model_dump(mode="json")
    except ValueError:  # what was added has no default
        return saved
    return {**saved, **filled(saved, defaults)}


def _differences(saved, now, key: str):
    if isinstance(saved, dict) and isinstance(now, dict):
        for name in {**saved, **now}:
            yield from _differences(saved.get(name), now.get(name), f"{key}.{name}")
    elif saved != now and key not in _FREE_KEYS:
        yield key, saved, now
