"""An engine's state, parameter by parameter: saved from any layout of ranks and ZeRO stages, loaded into any other.

DeepSpeed keeps fp32 masters, Adam's moments and (we) the EMA in flat shards whose layout depends on the stage and the
number of ranks. Files name what is in them instead, so that no conversion stands between two layouts:

    <engine>/00000.safetensors    of each rank that holds something (at ZeRO 0 the first holds all)
        master/NAME[a:b]          elements a to b of the flattened fp32 master of parameter NAME
        exp_avg/…, exp_avg_sq/…   Adam's moments
        ema/…                     of the engine whose average is exported
        buffer/NAME               persistent buffers, from the first rank
"""

import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rdmd_fast.engine.fp32_masters import master_parameters, persistent_buffers, shard_pieces, whole_masters
from rdmd_fast.errors import InputError
from rdmd_fast.files import check_readable, save_by_name

MOMENTS = ("exp_avg", "exp_avg_sq")
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_KEY = re.compile(r"(\w+)/(.+)\[(\d+):(\d+)\]$")


# -- saving ------------------------------------------------------------------------------------------------------------


def save_engine(folder: Path, engine, rank: int, ema_shards: list[torch.Tensor] | None = None) -> Path | None:
    """Write this rank's share of an engine; returns the file, None if this rank holds nothing.

    Args:
        ema_shards: the average of this engine's masters, shaped as ``fp32_masters.master_parameters``.
    """
    own = shard_pieces(engine) if rank == 0 or engine.zero_optimization() else []
    tensors = {}
    for kind, shards in _kinds(engine, ema_shards).items():
        tensors |= {piece.key(kind): piece.of(shards).cpu() for piece in own}
    if rank == 0:
        buffers = persistent_buffers(engine.module)
        tensors |= {f"buffer/{name}": buffer.cpu().contiguous() for name, buffer in buffers.items()}
    if not tensors:
        return None
    path = folder / f"{rank:05d}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    save_by_name(path, lambda path: save_file(tensors, path))
    return path


def _kinds(engine, ema_shards: list[torch.Tensor] | None) -> dict[str, list[torch.Tensor]]:
    """This rank's flat shards of each kind."""
    masters, states = master_parameters(engine), inner_optimizer(engine).state
    kinds = {"master": [master.detach() for master in masters]}
    if adam_step(engine):
        for moment in MOMENTS:
            kinds[moment] = [states[m][moment] if m in states else torch.zeros_like(m) for m in masters]
    return kinds if ema_shards is None else kinds | {"ema": ema_shards}


def inner_optimizer(engine) -> torch.optim.Optimizer:
    """Torch's Adam, inside DeepSpeed's wrapper, inside ``MasterAdam``, or alone (ZeRO 0 in fp32)."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def adam_step(engine) -> float:
    """Updates that Adam has made, the same for every parameter."""
    return max((float(state["step"]) for state in inner_optimizer(engine).state.values() if state), default=0.0)


def engine_counters(engine) -> dict[str, float]:
    """What an engine counts, for the manifest: plain numbers."""
    counters = {name: getattr(engine, name) for name in _COUNTERS}
    scaler = _loss_scaler(engine)
    if scaler is not None:
        counters |= {f"loss_scaler.{name}": getattr(scaler, name) for name in _SCALER if hasattr(scaler, name)}
    return {**counters, "adam_step": adam_step(engine)}


def _loss_scaler(engine):
    """Where fp16's dynamic loss scale lives; None in other dtypes."""
    if not engine.fp16_enabled():
        return None
    return getattr(engine.optimizer, "loss_scale_config", None) or engine.optimizer.loss_scaler


# -- loading -----------------------------------------------------------------------------------------------------------


class SavedEngine:
    """The files of one engine in a checkpoint, from which any range of any parameter is read.

    Args:
        folder: CHECKPOINT/<engine>.
        place: of this rank among all, from 0 up to 1: files of the same place are opened first, and no more of them
            than what is asked for takes.

    Raises:
        InputError: no such engine there, or a file that is no safetensors.
    """

    def __init__(self, folder: Path, place: float = 0.0):
        self.folder = folder
        self._paths = sorted(folder.glob("*.safetensors"))
        if not self._paths:
            raise InputError(f"checkpoint {folder.parent}: holds no engine {folder.name}, was it of another stage?")
        near = place * len(self._paths)
        self._paths = [path for _, path in sorted(enumerate(self._paths), key=lambda item: abs(item[0] - near))]
        self._files: list = []
        self._parts: dict[tuple[str, str], list[tuple[int, int, str, int]]] = {}

    def read(self, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened ``kind`` (master, exp_avg, exp_avg_sq, ema) of a parameter: 1-D.

        Raises:
            InputError: some are in no file.
        """
        found: list[torch.Tensor] = []
        at = start
        while at < stop:
            part = next((part for part in self._parts.get((kind, name), ()) if part[0] <= at < part[1]), None)
            if part is None:
                if self._open_next():
                    continue
                raise InputError(f"checkpoint {self.folder.parent}: {self.folder.name} lacks {kind} of {name}")
            first, last, key, file = part
            end = min(stop, last)
            found.append(self._files[file].get_slice(key)[at - first : end - first])
            at = end
        return found[0] if len(found) == 1 else torch.cat(found)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Persistent buffers by name."""
        file = _open(self.folder / "00000.safetensors")
        names = [key for key in file.keys() if key.startswith("buffer/")]  # noqa: SIM118 (no mapping)
        return {name.removeprefix("buffer/"): file.get_tensor(name) for name in names}

    def whole(self, kind: str, shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
        """The state dict of a ``kind``: each parameter in its shape, and the buffers."""
        parameters = {
            name: self.read(kind, name, 0, math.prod(shape)).view(shape).float() for name, shape in shapes.items()
        }
        return parameters | self.buffers()

    def _open_next(self) -> bool:
        """Look into one file more; False if there is none."""
        if len(self._files) == len(self._paths):
            return False
        path = self._paths[len(self._files)]
        file = _open(path)
        for key in file.keys():  # noqa: SIM118 (no mapping)
            match = _KEY.match(key)
            if match:
                kind, name, start, stop = match[1], match[2], int(match[3]), int(match[4])
                if file.get_slice(key).get_shape() != [stop - start]:
                    raise InputError(f"checkpoint file {path}: {key} is of another shape, resume from another")
                self._parts.setdefault((kind, name), []).append((start, stop, key, len(self._files)))
        self._files.append(file)
        return True


def _open(path: Path):
    try:
        check_readable(path)
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"checkpoint file {path}: cannot be read ({error}), resume from another") from None


@torch.no_grad()
def load_engine(
    folder: Path, engine, place: float, counters: dict[str, float], ema_shards: list[torch.Tensor] | None = None
) -> None:
    """Bring an engine of any layout to the state in ``folder``; a collective call.

    Args:
        place: of this rank among all, see ``SavedEngine``.
        counters: as ``engine_counters`` gave them.
        ema_shards: filled in place.

    Raises:
        InputError: the files do not hold what this engine needs.
    """
    saved = SavedEngine(folder, place)
    _restore_counters(engine, counters)
    _prepare_adam(engine, counters["adam_step"])
    own = shard_pieces(engine)
    for kind, shards in _kinds(engine, ema_shards).items():
        for piece in own:
            piece.of(shards).copy_(saved.read(kind, piece.name, piece.start, piece.stop))
    buffers = persistent_buffers(engine.module)
    loaded = saved.buffers()
    if {name: value.shape for name, value in loaded.items()} != {name: old.shape for name, old in buffers.items()}:
        raise InputError(f"checkpoint {folder.parent}: {folder.name} has other buffers, choose another run_dir")
    for name, value in loaded.items():
        buffers[name].copy_(value)
    _refresh_weights(engine)


def _restore_counters(engine, counters: dict[str, float]) -> None:
    for name in _COUNTERS:
        setattr(engine, name, counters[name])
    scaler = _loss_scaler(engine)
    for name in _SCALER:
        if scaler is not None and f"loss_scaler.{name}" in counters:
            setattr(scaler, name, counters[f"loss_scaler.{name}"])


def _prepare_adam(engine, step: float) -> None:
    """Moments to be filled, and the count of updates."""
    states = inner_optimizer(engine).state
    states.clear()
    if not step:
        return
    for master in master_parameters(engine):
        values = {moment: torch.zeros_like(master, memory_format=torch.preserve_format) for moment in MOMENTS}
        states[master] = {"step": torch.tensor(step, dtype=torch.float32, device=master.device), **values}


def _refresh_weights(engine) -> None:
    """Bring what the forward pass uses up to the masters."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    else:
        for parameter, master in whole_masters(engine):
            parameter.copy_(master)
