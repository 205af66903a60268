"""Checkpoints of a run: written under another name, published by rename, resumed bit for bit.

checkpoints/step_00001000/
    manifest.json            step, counters, engines, config, every file with its size
    <engine>/, ranks/        what the ranks hold (see ``training_state``)
checkpoints/latest           name of the newest complete one, written last
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import torch
from pydantic import Field

from .distributed import World, zero_stage
from .errors import InputError
from .options import Options
from .runtime import fsync_path, write_atomically
from .training_state import TrainingState, read_state, write_state

FORMAT = 2
_NAME = re.compile(r"step_(\d{8,})$")


class CheckpointOptions(Options):
    """What is kept to go on from."""

    every: int = Field(1000, ge=0, description="iterations between checkpoints, 0 for only at the end (ours)")
    keep: int = Field(2, ge=1, description="newest checkpoints that are kept (ours)")


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
        tensors: this rank's small tensors to keep (see ``write_state``).
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
        write_state(partial, state, tensors, world)
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
        "engines": state.description(),
        "export": state.export,
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
        InputError: the checkpoint is of another network or configuration.
    """
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    _check_compatible(path, manifest, config)
    tensors = read_state(path, manifest, state, world)
    state.counters = manifest["counters"]
    return manifest, tensors


# Sections and keys that may change between a stop and its continuation without making it another experiment.
_FREE = {"run_dir", "telemetry", "checkpoint", "validation", "deepspeed"}
# How data come, not which; how a batch is split; and how long.
_FREE_KEYS = {
    *("train.steps", "train.micro_batch_size", "train.activation_checkpointing"),
    *(f"data.{key}" for key in ("cache_gib", "cache_dir", "workers", "prefetch", "max_dropped")),
}


def _check_compatible(path: Path, manifest: dict, config: dict) -> None:
    if manifest.get("format") != FORMAT:
        raise InputError(f"checkpoint {path}: format {manifest.get('format')} is not the {FORMAT} of this version")
    saved = manifest["config"]
    for section in config:
        if section in _FREE or saved.get(section) == config[section]:
            continue
        key = next(_differences(saved.get(section), config[section], section), None)
        if key:
            raise InputError(
                f"checkpoint {path}: was trained with {key[0]} = {key[1]!r}, the config says {key[2]!r}; "
                "set it back, or choose another run_dir"
            )


def _differences(saved, now, key: str):
    if isinstance(saved, dict) and isinstance(now, dict):
        for name in {**saved, **now}:
            yield from _differences(saved.get(name), now.get(name), f"{key}.{name}")
    elif saved != now and key not in _FREE_KEYS:
        yield key, saved, now
