"""All that a run is at one moment, written and read by its ranks together, in any number.

<engine>/*.safetensors         masters, Adam's moments, EMA and buffers (see ``engine_state``)
ranks/00000.safetensors        each rank's random state and unfinished means
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rdmd_fast.checkpoints.engine_state import engine_counters, load_engine, save_engine
from rdmd_fast.engine.ema import ShardedEMA
from rdmd_fast.engine.fp32_masters import parameter_shapes
from rdmd_fast.errors import InputError
from rdmd_fast.files import save_by_name
from rdmd_fast.processes.world import World, on_main

# Sums over a rank's samples, as [total, count]; other tensors are the same on every rank.
SUMS = "telemetry."


@dataclass
class TrainingState:
    """Engines, EMA and counters, besides the configuration.

    Attributes:
        engines: DeepSpeed engines that are trained, by name.
        ema: of one of them.
        export: config.json of what the run exports, for exports out of a checkpoint.
        counters: of the stage.
    """

    engines: dict[str, object]
    ema: ShardedEMA
    export: dict = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)

    def description(self) -> dict:
        """What the manifest says of the engines."""
        return {
            name: {
                "parameters": parameter_shapes(engine),
                "counters": engine_counters(engine),
                "has_ema": engine is self.ema.engine,
            }
            for name, engine in self.engines.items()
        }


def write_state(folder: Path, state: TrainingState, tensors: dict[str, torch.Tensor], world: World) -> list[str]:
    """Write this rank's files; returns their names, relative to ``folder``.

    Args:
        tensors: this rank's small tensors to keep; those named ``telemetry.…`` are [sum, count] over its samples.
    """
    (folder / "ranks").mkdir(parents=True, exist_ok=True)
    written = [_rank_file(folder, world.rank)]
    for name, engine in state.engines.items():
        shards = state.ema.shards if engine is state.ema.engine else None
        written.append(save_engine(folder / name, engine, world.rank, shards))
    own = {"rng.cpu": torch.get_rng_state(), **tensors}
    if world.device.type == "cuda":
        own["rng.cuda"] = torch.cuda.get_rng_state(world.device)
    save_by_name(written[0], lambda path: save_file(own, path))
    return [str(path.relative_to(folder)) for path in written if path]


def read_state(folder: Path, manifest: dict, state: TrainingState, world: World) -> dict[str, torch.Tensor]:
    """Bring engines, EMA and random state to what ``folder`` holds; a collective call.

    Returns:
        This rank's further tensors.

    Raises:
        InputError: the checkpoint is of another network.
    """
    for name, engine in state.engines.items():
        saved = manifest["engines"].get(name)
        if saved is None:
            raise InputError(f"checkpoint {folder}: holds no engine {name}, was it made by the other stage?")
        _check_shapes(folder, name, saved["parameters"], parameter_shapes(engine))
        shards = state.ema.shards if engine is state.ema.engine else None
        load_engine(folder / name, engine, world.rank / world.size, saved["counters"], shards)
    tensors = _rank_tensors(folder, manifest["world_size"], world)
    random = {name: tensors.pop(f"rng.{name}", None) for name in ("cpu", "cuda")}
    if manifest["world_size"] != world.size:
        # Only dropout draws from these; what it would have drawn is of the old split.
        torch.manual_seed((int(torch.initial_seed()) + 7919 * manifest["step"]) % 2**63)
        return tensors
    try:
        torch.set_rng_state(random["cpu"])
    except (TypeError, RuntimeError):
        raise InputError(f"checkpoint {folder}: lacks a rank's random state, resume from another") from None
    if random["cuda"] is not None and world.device.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"], world.device)
    return tensors


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / "ranks" / f"{rank:05d}.safetensors"


def _read_rank(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    path = _rank_file(folder, rank)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"checkpoint file {path}: cannot be read ({error}), resume from another") from None


def _rank_tensors(folder: Path, ranks: int, world: World) -> dict[str, torch.Tensor]:
    """This rank's tensors; where ``ranks``, the number then, is another, sums go to the first and counts are shared."""
    if ranks == world.size:
        return _read_rank(folder, world.rank)
    tensors = on_main(world, lambda: _merged(_read_rank(folder, rank) for rank in range(ranks)))
    for name in tensors:
        if name.startswith(SUMS):
            total, count = tensors[name]
            tensors[name] = torch.stack((total if world.is_main else torch.zeros_like(total), count / world.size))
    return tensors


def _merged(files: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One rank's tensors, with the sums of all."""
    first, *others = files
    for name in first:
        if name.startswith(SUMS):
            first[name] = torch.stack([file[name] for file in (first, *others)]).sum(0)
    return first


def _check_shapes(folder: Path, engine: str, saved: dict[str, list[int]], own: dict[str, list[int]]) -> None:
    for name in {**own, **saved}:
        if saved.get(name) != own.get(name):
            raise InputError(
                f"checkpoint {folder}: the network {engine} in it is another one (weight {name}: {saved.get(name)} "
                f"there, {own.get(name)} here), choose another run_dir"
            )
