"""Checkpoints of a run: written under another name, published by rename, verified, resumed bit for bit.

checkpoints/step_00001000/
    manifest.json            step, counters, engines, config, every file with size and SHA-256
    <engine>/, ranks/        what the ranks hold (see ``training_state``)
checkpoints/latest           name of the newest complete one, written last, for people and scripts
"""

import os
import secrets
import shutil
from pathlib import Path

import torch

from rdmd_fast.checkpoints.manifest import (
    Defect,
    check_hashes,
    checkpoint_folders,
    clear_leftovers,
    folder_name,
    looks_whole,
    prune,
    read_manifest,
    read_whole_manifest,
    seal_files,
    write_manifest,
)
from rdmd_fast.checkpoints.options import CheckpointOptions
from rdmd_fast.checkpoints.training_state import TrainingState, read_state, write_state
from rdmd_fast.engine.options import zero_stage
from rdmd_fast.errors import InputError, WriteError
from rdmd_fast.files import make_folder, read_text, replace_folder, write_atomically
from rdmd_fast.processes.world import World, on_all_ranks, on_main


def save_checkpoint(
    run_dir: Path,
    step: int,
    state: TrainingState,
    tensors: dict[str, torch.Tensor],
    config: dict,
    made_of: dict[str, list[str | None]],
    world: World,
    options: CheckpointOptions,
) -> Path:
    """Write one checkpoint; a collective call.

    Args:
        step: finished iterations.
        tensors: this rank's small tensors to keep (see ``write_state``).
        config: plain resolved configuration, for the manifest.
        made_of: hashes of the data's shards and of the teacher, by config key, likewise.

    Raises:
        WriteError: the disk is full or not writable; the previous checkpoint is untouched.
    """
    root = run_dir / "checkpoints"
    final = root / folder_name(step)
    # A name of its own: a rank of a job whose main process was killed may still be writing.
    partial = root / f".{final.name}.{world.broadcast(secrets.token_hex(4))}.partial"
    content = {
        "step": step,
        "counters": state.counters,
        "engines": state.description(),
        "export": state.export,
        "world_size": world.size,
        "zero_stage": zero_stage(config.get("deepspeed", {})),
        "config": config,
        "made_of": made_of,
    }
    what = f"checkpoint {final}"
    try:
        on_main(world, lambda: _make_room(root, partial, what), what)
        mine = on_all_ranks(world, lambda: seal_files(partial, write_state(partial, state, tensors, world)), what)
        files = {name: entry for part in world.gather(mine) for name, entry in part.items()}
        on_main(world, lambda: _publish(partial, final, content, dict(sorted(files.items())), options), what)
    except WriteError:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _make_room(root: Path, partial: Path, what: str) -> None:
    """Clear leftovers; a disk with less space than the newest checkpoint takes is full before any of it is written."""
    make_folder(root)
    clear_leftovers(root)
    newest = next(filter(looks_whole, checkpoint_folders(root)), None)
    needed = sum(file["size"] for file in read_manifest(newest)["files"].values()) if newest else 0
    free = shutil.disk_usage(root).free
    if free < needed:
        sizes = f"the newest one takes {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free"
        raise WriteError(f"{what}: cannot be written ({sizes}), free some space or change run_dir")
    partial.mkdir()


def _publish(partial: Path, final: Path, content: dict, files: dict, options: CheckpointOptions) -> None:
    write_manifest(partial, content, files)
    replace_folder(partial, final)
    write_atomically(final.parent / "latest", final.name + "\n")
    prune(final.parent, options.keep, options.keep_every)


def find_checkpoint(run_dir: Path, resume: str, world: World, say=print) -> Path | None:
    """The checkpoint that ``--resume`` means: ``auto`` the newest whole one, ``never`` none, else a folder.

    A collective call; every file's hash is verified, the files spread over the ranks.

    Args:
        say: takes one line on each newer checkpoint that is passed over.

    Raises:
        InputError: a named folder is no whole checkpoint.
    """
    if resume == "never":
        return None
    if resume != "auto":
        if not on_main(world, lambda: os.path.isdir(resume)):
            raise InputError(f"--resume {resume}: no such folder, name one under RUN/checkpoints")
        defect = _find_defect(Path(resume), world)
        if defect:
            raise InputError(f"--resume {resume}: not a complete checkpoint ({defect}), use another or --resume auto")
        return Path(resume)
    root = run_dir / "checkpoints"
    folders = on_main(world, lambda: checkpoint_folders(root))
    if world.is_main:
        _check_latest(root, folders, say)
    for folder in folders:
        defect = _find_defect(folder, world)
        if not defect:
            return folder
        say(f"checkpoint {folder} is passed over: {defect}")
    if folders:  # to start over would set them all aside
        raise InputError(
            f"{root}: none of its {len(folders)} checkpoints is whole, mend one or start over with --resume never"
        )
    return None


def _find_defect(folder: Path, world: World) -> str | None:
    """Why ``folder`` is no whole checkpoint, agreed by all ranks; None if it is one."""
    try:
        files = on_main(world, lambda: read_whole_manifest(folder)["files"])
        mine = sorted(files)[world.rank :: world.size]
        on_all_ranks(world, lambda: check_hashes(folder, {name: files[name] for name in mine}))
    except Defect as defect:
        return str(defect)
    return None


def _check_latest(root: Path, folders: list[Path], say) -> None:
    """Tell if ``latest`` is of no use; nothing here depends on it."""
    try:
        name = read_text(root / "latest", 1024).strip()
    except FileNotFoundError:
        problem = "is missing" if folders else None
    except (InputError, OSError, ValueError):
        problem = "cannot be read"
    else:
        problem = f"points to {name!r}, which is not there" if name else "is empty"
        if name and os.path.isdir(root / name):
            problem = None
    if problem:
        say(f"{root}/latest {problem}; checkpoints are found without it, the next one mends it")


def load_checkpoint(path: Path, manifest: dict, state: TrainingState, world: World) -> dict[str, torch.Tensor]:
    """Bring engines and EMA to the state in ``path``, whose ``manifest`` was read; a collective call.

    Returns:
        This rank's further tensors.

    Raises:
        InputError: the checkpoint is of another network.
    """
    tensors = read_state(path, manifest, state, world)
    state.counters = manifest["counters"]
    return tensors
