"""What a run's folder tells of its course: configuration, metrics by step, seconds by phase, pictures, events.

Nothing here imports torch. What of a folder cannot be read is left out and said in ``Record.remarks``.
"""

import contextlib
import io
import json
import re
import struct
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from rdmd_fast.errors import InputError, one_line
from rdmd_fast.files import is_file, open_to_read, read_text
from rdmd_fast.yaml_values import read_values

_COUNTERS = {
    "skipped_updates": "skipped updates",
    "skipped_spikes": "skipped spikes",
    "failed_checkpoints": "failed checkpoints",
}
"""Keys of a line that count from the run's beginning, alone or before "/ENGINE", and what they count."""
_COMES_AND_GOES = ("mfu", "data_wait_share", "skipped_spikes")  # by the machine or by free options
_MOST_NAMES = 400  # metrics of a run
_STEP = re.compile(r"step_(\d{1,15})")


class Event(NamedTuple):
    step: int
    what: str
    text: str


class Series(NamedTuple):
    """A metric by step; values are finite."""

    steps: list[int]
    values: list[float]


@dataclass
class Record:
    """A run as its folder has it.

    Attributes:
        config: plain nested values.
        training, validation: finite values by name.
        seconds: of all timed iterations by phase; "interval" is the time they took in all.
        timed: how many iterations those are.
        samples: of an iteration; 0 where unknown.
        pictures: (step, path), in order.
        exported: the step of RUN/export, which a run writes when it has ended.
        remarks: what could not be read.
    """

    folder: Path
    config: dict
    training: dict[str, Series] = field(default_factory=dict)
    validation: dict[str, Series] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    timed: int = 0
    samples: float = 0.0
    last_step: int = 0
    lines: int = 0
    exported: int | None = None
    pictures: list[tuple[int, Path]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def read_run(folder: Path) -> Record:
    """Read a run's folder, whether it has ended, trains, or was killed.

    Raises:
        InputError: no run there, or its configuration cannot be read.
    """
    if not is_file(folder / "config.yaml"):
        raise InputError(f"{folder}: no run there (no config.yaml), name the folder that run_dir names")
    record = Record(folder, read_values(str(folder / "config.yaml")))
    starts = _starts(folder / "tensorboard")
    for number, (seconds, step) in enumerate(starts):
        if number or step:
            when = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
            record.events.append(Event(step, "resumed" if step else "begun anew", f"at {when}"))
    _Lines(record, [step for _, step in starts]).read()
    with contextlib.suppress(InputError, OSError, ValueError, LookupError, TypeError, RecursionError):
        record.exported = int(json.loads(read_text(folder / "export/config.json", 1 << 20))["step"])
    for path in sorted((folder / "samples").glob("*.png")):
        if name := _STEP.fullmatch(path.stem):
            record.pictures.append((int(name[1]), path))
        elif path.name == "final.png":
            record.pictures.append((record.last_step if record.exported is None else record.exported, path))
    record.pictures.sort(key=lambda picture: (picture[0], picture[1].name == "final.png"))
    for path in sorted((folder / "checkpoints.old").glob("step_*")):
        if name := _STEP.fullmatch(path.name):
            record.events.append(Event(int(name[1]), "set aside", f"checkpoint {path.name}, of a course that was left"))
    record.events.sort(key=lambda event: event.step)
    return record


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63


class _Lines:
    """Reads metrics.jsonl into a record, line by line."""

    def __init__(self, record: Record, starts: list[int]):
        self.record, self.starts = record, starts
        self.step: int | None = None  # of the previous line of training
        self.previous: dict = {}
        self.missing: set[str] = set()
        self.refused: set[str] = set()

    def read(self) -> None:
        record, path = self.record, self.record.folder / "metrics.jsonl"
        damaged, torn = 0, False
        if is_file(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                for text in file:
                    torn = not self._take(text)
                    damaged += torn
        if not record.lines:
            record.remarks.append("metrics.jsonl holds no lines yet")
        if torn:  # the dying process did not finish it
            record.remarks.append("the last line of metrics.jsonl is torn and left out")
        if damaged - torn:
            record.remarks.append(f"lines of metrics.jsonl that cannot be read and are left out: {damaged - torn}")
        if self.refused:
            record.remarks.append(f"metrics beyond the first {_MOST_NAMES} are left out: {len(self.refused)}")

    def _take(self, text: str) -> bool:
        """Whether ``text`` is a line of metrics; blank ones are."""
        if not text.strip():
            return True
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            return False
        step = line.get("step") if isinstance(line, dict) else None
        if type(step) is not int or not 0 <= step < 2**53:
            return False
        self.record.lines += 1
        self.record.last_step = step
        if "validation" in line:
            self._numbers(self.record.validation, step, line["validation"], "validation ")
            return True
        if self.step is not None and step <= self.step:
            self._event(step, "steps go back", f"from {self.step}: lines of two courses")
        self._numbers(self.record.training, step, line)
        self._counts(step, line)
        self._times(step, line)
        self.step, self.previous = step, line
        return True

    def _event(self, step: int, what: str, text: str) -> None:
        self.record.events.append(Event(step, what, one_line(text)))

    def _numbers(self, series: dict[str, Series], step: int, line: object, kind: str = "") -> None:
        for name, value in line.items() if isinstance(line, dict) else ():
            if name in ("step", "eta_seconds") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if name not in series and len(series) >= _MOST_NAMES:
                self.refused.add(name)
            elif not _is_finite(value):
                self._event(step, "not finite", f"{kind}{name} is {value if isinstance(value, float) else 'huge'}")
            else:
                steps, values = series.setdefault(name, Series([], []))
                steps.append(step)
                values.append(float(value))

    def _counts(self, step: int, line: dict) -> None:
        for name, value in line.items():
            counter, _, engine = name.partition("/")
            before = self.previous.get(name, 0)
            if not _is_finite(value) or not _is_finite(before):
                continue
            if counter in _COUNTERS and value > before:
                of = f" of {engine}" if engine else ""
                self._event(step, _COUNTERS[counter], f"{value - before:g} more{of}, {value:g} so far")
            if counter == "loss_scale" and value < before:
                self._event(step, "loss scale", f"of {engine} lowered from {before:g} to {value:g}")
        dropped = line.get("dropped_samples")
        if isinstance(dropped, dict) and dropped != self.previous.get("dropped_samples"):
            for role, shards in dropped.items():
                listing = (
                    ", ".join(f"{shard} {count}" for shard, count in shards.items())
                    if isinstance(shards, dict)
                    else shards
                )
                self._event(step, "dropped samples", f"of {role} so far, by shard: {listing}")
        # Telemetry leaves out means and gradient norms that are not finite.
        names = {name for name in self.previous if name.partition("/")[0] not in (*_COMES_AND_GOES, "dropped_samples")}
        missing = (self.missing | names) - line.keys()
        for name in sorted(missing - self.missing):
            self._event(step, "no value", f"{name}: missing from this line, as what is not finite is")
        self.missing = missing

    def _times(self, step: int, line: dict) -> None:
        seconds = line.get("seconds")
        if isinstance(seconds, dict):
            began = [start for start in self.starts if start < step]
            before = 0 if self.step is None or self.step >= step else self.step
            self.record.timed += step - max([before, *began])
            for name, value in seconds.items():
                if _is_finite(value) and value >= 0:
                    self.record.seconds[name] = self.record.seconds.get(name, 0.0) + value
        samples = line.get("samples")
        if _is_finite(samples) and step:
            self.record.samples = samples / step


def _starts(folder: Path) -> list[tuple[float, int]]:
    """(seconds since 1970, step) of the run's starts, the first one first; none where tensorboard is not installed.

    Each start begins a file of events with its step: framed records, of which one of the first tells of the start.
    """
    try:
        from google.protobuf.message import DecodeError
        from tensorboard.compat.proto.event_pb2 import Event as Recorded
    except ImportError:
        return []
    found = []
    for path in folder.glob("events.out.tfevents.*") if folder.is_dir() else ():
        with contextlib.suppress(OSError, InputError, ValueError, OverflowError, struct.error, DecodeError):
            with open_to_read(path) if is_file(path) else io.BytesIO() as file:
                content = file.read(4096)
            place, event = 0, Recorded()
            while not event.HasField("session_log"):  # raises at the end of what was read
                (length,) = struct.unpack_from("<Q", content, place)
                event = Recorded.FromString(content[place + 12 : place + 12 + length])
                place += length + 16
            datetime.fromtimestamp(event.wall_time, UTC)  # that it is a time
            found.append((event.wall_time, event.step))
    return sorted(found)
