"""What a run tells: progress, metrics.jsonl, TensorBoard, Weights & Biases, seconds by phase, MFU."""

import contextlib
import json
import math
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import Field

from rdmd_fast.errors import InputError, write_error
from rdmd_fast.extras import require
from rdmd_fast.files import append_line, encoded, fsync_path, make_folder, read_text, write_atomically
from rdmd_fast.options import Options
from rdmd_fast.processes.world import World, on_main

# Dense matmul peaks without sparsity, FLOP/s in bf16, from the vendors' data sheets.
PEAK_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}

WARM_UP_STEPS = 10  # left out of throughput and ETA: caches fill and kernels are chosen


class TelemetryOptions(Options):
    """Metrics and pictures."""

    log_every: int = Field(50, ge=1, description="iterations a line of metrics.jsonl averages over (ours)")
    sample_every: int = Field(1000, ge=0, description="iterations between picture grids, 0 for never (ours)")
    sample_count: int = Field(16, ge=1, le=4096, description="images in a picture row (ours)")
    sample_sigma: float | None = Field(
        None,
        ge=1e-6,
        le=1e6,
        description="noise level σ̃ of the pictures' denoising rows; unset: generator_sigma (ours)",
    )
    decoder: str | None = Field(
        None,
        description="folder of the diffusers AutoencoderKL that turns latents into pictures, of no effect on training "
        "(ours)",
    )
    tensorboard: bool = Field(True, description="write RUN/tensorboard where tensorboard is installed (ours)")
    wandb_project: str | None = Field(None, description="Weights & Biases project; needs the extra `wandb` (ours)")


class Telemetry:
    """Sums per-sample statistics on the device and reads them once a log interval."""

    def __init__(
        self,
        options: TelemetryOptions,
        world: World,
        run_dir: Path,
        total_steps: int,
        global_batch: int,
        annotated: bool = False,
    ):
        """``annotated``: phases are ranges of torch's profiler, too, and on a GPU NVTX ranges."""
        self.options, self.world, self.run_dir = options, world, run_dir
        self.total_steps, self.global_batch, self.annotated = total_steps, global_batch, annotated
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._log_due = False
        self.flops_per_sample: float | None = None
        self._writers: list[Writer] = []
        self._kept: list[dict] = []  # lines of the step that the run is resumed at
        self._bar = None
        # Called by every rank for a due line with the interval's seconds; what they return joins the line.
        self.at_log: list[Callable[[float], dict]] = []

    # -- recording, no host synchronisation ------------------------------------------------------------------------

    def add(self, name: str, per_sample: torch.Tensor) -> None:
        """Add a batch of per-sample values [n] to the running mean of ``name``."""
        total = per_sample.sum(dtype=torch.float64)
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts.get(name, 0) + per_sample.numel()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Seconds spent in a part of the iteration; on a GPU by events that ``phase_seconds`` reads."""
        with _annotation(name, self.world.device) if self.annotated else contextlib.nullcontext():
            if self.world.device.type == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                yield
                end.record()
                self._events.append((name, begin, end))
                return
            start = time.perf_counter()
            yield
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def phase_seconds(self) -> dict[str, float]:
        """Seconds by phase since the last call; on a GPU it waits for the end of the last one."""
        for name, begin, end in self._events:
            end.synchronize()
            self._seconds[name] = self._seconds.get(name, 0.0) + begin.elapsed_time(end) / 1000
        self._events.clear()
        seconds, self._seconds = self._seconds, {}
        return seconds

    # -- the run ---------------------------------------------------------------------------------------------------

    def start(self, step: int, anew: bool = True) -> None:
        """Training begins at ``step``; until here nothing has been written but what ``drop_lines_after`` does.

        Args:
            anew: it is not resumed.

        Raises:
            InputError: Weights & Biases is asked for but cannot be had.
        """
        if self.world.is_main:
            if self.options.tensorboard:
                self._writers += _tensorboard_writer(self.run_dir, step, self._kept)
            if self.options.wandb_project:
                self._writers.append(_wandb_writer(self.options.wandb_project, self.run_dir, anew))
        self.first_step, self._clock_start, self._clock_step = step, time.perf_counter(), step
        self._interval_clock = time.perf_counter()
        if self.world.is_main and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.total_steps, initial=step, unit="it", dynamic_ncols=True, smoothing=0.05)

    def begin_iteration(self, step: int) -> None:
        self._log_due = (step + 1) % self.options.log_every == 0 or step + 1 == self.total_steps
        if step == self.first_step + WARM_UP_STEPS:
            self._clock_start, self._clock_step = time.perf_counter(), step

    def end_iteration(self, step: int, extra: dict[str, float]) -> None:
        """Write a line if one is due; ``step`` counts from 0, the line counts finished iterations."""
        if self._bar is not None:
            self._bar.update(1)
        if not self._log_due:
            return
        line = {"step": step + 1, "samples": (step + 1) * self.global_batch, **self._means(), **extra}
        line |= self._times(step)
        for report in self.at_log:
            line |= report(line["seconds"]["interval"])
        self._announce(line)
        on_main(self.world, lambda: self.write(line), f"metrics of {self.run_dir}")

    def write(self, line: dict) -> None:
        """One line of metrics.jsonl and the same numbers to the other writers, for the main rank."""
        append_line(self.run_dir / "metrics.jsonl", json.dumps(line))
        for writer in list(self._writers):
            try:
                writer.write(line)
            except OSError as error:
                self._writers.remove(writer)  # it may have lost its place in the file: it is told of once
                raise write_error(error, f"{self.run_dir}/tensorboard or wandb") from None

    def flush(self) -> None:
        """Bring metrics.jsonl to disk: a checkpoint that outlives a power failure shall not outlive its lines."""
        path = self.run_dir / "metrics.jsonl"
        if path.exists():
            fsync_path(path)

    def _announce(self, line: dict) -> None:
        """The line a person reads: a bar's postfix on a terminal, plain text elsewhere."""
        if not self.world.is_main:
            return
        names = [name for name in line if "loss" in name or name in ("transport_cost",)]
        losses = "  ".join(f"{name} {line[name]:.4g}" for name in names)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{line['images_per_second']:.0f} img/s  {losses}")
            return
        eta = f"{line['eta_seconds'] / 60:.1f} min left" if line["eta_seconds"] is not None else ""
        self.say(f"step {line['step']}/{self.total_steps}  {losses}  {line['images_per_second']:.0f} images/s  {eta}")

    def say(self, text: str) -> None:
        if not self.world.is_main:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print_line(text)

    def close(self) -> None:
        """Take the bar down and end the writers and their threads."""
        if self._bar is not None:
            self._bar.close()
        for writer in self._writers:
            with contextlib.suppress(OSError):  # what it could not write was said when it was due
                writer.close()
        self._writers = []

    # -- resuming --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, torch.Tensor]:
        """Running sums of an unfinished log interval: a resumed run's next line equals the unbroken one's."""
        return {
            f"telemetry.{name}": torch.stack(
                (total.cpu(), torch.tensor(float(self._counts[name]), dtype=torch.float64))
            )
            for name, total in self._sums.items()
        }

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        for key, value in tensors.items():
            if key.startswith("telemetry."):
                name = key.removeprefix("telemetry.")
                self._sums[name], self._counts[name] = value[0].to(self.world.device), int(value[1])

    def drop_lines_after(self, step: int, ended: bool = False) -> None:
        """Drop lines of metrics.jsonl that the run resumed at ``step`` writes again; for the main rank.

        Args:
            ended: ``step`` is the last one, where validation follows the checkpoint instead of preceding it.
        """
        path = self.run_dir / "metrics.jsonl"
        self._kept = []
        if path.exists():
            kept = []
            for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    line = json.loads(text)
                    if line["step"] < step or (line["step"] == step and not (ended and "validation" in line)):
                        kept.append(text + "\n")
                        self._kept += [line] if line["step"] == step else []
                except (ValueError, KeyError, TypeError):
                    continue  # a line the dying process did not finish
            write_atomically(path, "".join(kept))

    # -- reading ---------------------------------------------------------------------------------------------------

    def _means(self) -> dict[str, float]:
        names = sorted(self._sums)
        if not names:
            return {}
        sums = self.world.sum(torch.stack([self._sums[name] for name in names])).tolist()
        means = {name: total / (self._counts[name] * self.world.size) for name, total in zip(names, sums, strict=True)}
        self._sums.clear()
        self._counts.clear()
        if "score_gradient_square" in means:
            means["score_gradient_rms"] = math.sqrt(means.pop("score_gradient_square"))
        # Of an interval with a loss that was not finite there is none; skipped_updates tells.
        return {name: mean for name, mean in means.items() if math.isfinite(mean)}

    def _times(self, step: int) -> dict:
        phases = self.phase_seconds()
        now = time.perf_counter()
        steps = step + 1 - self._clock_step
        rate = steps * self.global_batch / max(now - self._clock_start, 1e-9)
        left = (self.total_steps - step - 1) * self.global_batch / rate
        times = {
            "images_per_second": rate,
            "eta_seconds": left if steps > 1 else None,
            "seconds": {"interval": now - self._interval_clock, **phases},
        }
        self._interval_clock = now
        peak = device_peak(self.world.device)
        if peak and self.flops_per_sample:
            times["mfu"] = rate * self.flops_per_sample / (peak * self.world.size)
        return times


@contextlib.contextmanager
def _annotation(name: str, device: torch.device) -> Iterator[None]:
    with torch.profiler.record_function(f"{PHASE_PREFIX}{name}"):
        if device.type != "cuda":
            yield
            return
        with torch.cuda.nvtx.range(name):
            yield


PHASE_PREFIX = "rdmd."
"""Of the profiler's ranges that are phases."""

TIME_KEYS = ("images_per_second", "eta_seconds", "seconds", "mfu", "data_wait_share", "dropped_samples")
"""Keys of a metrics line that differ between two runs of the same bits: times, and damage that was met so far."""


def device_peak(device: torch.device) -> float | None:
    """Peak matmul FLOP/s of a known GPU in bf16, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


class Writer(NamedTuple):
    """A place that lines of metrics go to, beside metrics.jsonl."""

    write: Callable[[dict], None]
    close: Callable[[], None]


def _wandb_writer(project: str, run_dir: Path, anew: bool) -> Writer:
    """The run at Weights & Biases that belongs to this folder; InputError where it cannot be had."""
    try:
        wandb = require("wandb", "wandb")
    except InputError as error:
        raise InputError(f"telemetry.wandb_project: {error}") from None
    name, number = encoded(run_dir.resolve().name).decode(), _wandb_id(run_dir, anew)
    try:
        run = wandb.init(project=project, dir=str(run_dir), name=name, id=number, resume="allow")
    except Exception as error:  # of the library's own kinds, and of those that it builds on
        raise InputError(
            f"telemetry.wandb_project: wandb refuses to begin ({type(error).__name__}: "
            f"{' '.join(str(error).split())}), see `wandb login`, set WANDB_MODE=offline, or remove the key"
        ) from None
    return Writer(lambda line: run.log(_flat(line), step=line["step"]), run.finish)


def _wandb_id(run_dir: Path, anew: bool) -> str:
    """The id in RUN/wandb_id; a new one for a run that begins."""
    path = run_dir / "wandb_id"
    with contextlib.suppress(OSError, ValueError):
        if not anew and re.fullmatch(r"[0-9a-f]{16}", number := read_text(path, 64).strip()):
            return number
    number = secrets.token_hex(8)
    write_atomically(path, f"{number}\n")
    return number


def _tensorboard_writer(run_dir: Path, step: int, kept: list[dict]) -> list[Writer]:
    """A writer into RUN/tensorboard, where tensorboard is installed.

    What events of earlier starts say of ``step`` and later ones is taken back; ``kept`` are the lines that stay of it.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return []
    threading.excepthook = _quiet_about_tensorboard
    make_folder(run_dir / "tensorboard")  # a link to a folder that is not there, too
    writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step)

    def add(line: dict) -> None:
        for name, value in _flat(line).items():
            writer.add_scalar(name, value, line["step"])

    def write(line: dict) -> None:
        add(line)
        writer.flush()

    for line in kept:
        add(line)
    return [Writer(write, writer.close)]


_report_thread = threading.excepthook


def _quiet_about_tensorboard(arguments) -> None:
    """The error of its writing thread is raised by the next flush: no traceback before."""
    if not type(arguments.thread).__module__.startswith("tensorboard"):
        _report_thread(arguments)


def _flat(line: dict, prefix: str = "") -> dict[str, float]:
    flat = {}
    for name, value in line.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            flat[f"{prefix}{name}"] = value
    return flat


def print_line(text: str) -> None:
    """Print a line; a run does not end because nobody reads what it says."""
    try:
        print(text, flush=True)
    except OSError:
        # What stays in the buffer would fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
