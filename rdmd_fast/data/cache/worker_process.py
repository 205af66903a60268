"""What a decoding worker does; ``worker_pool`` starts it, and its records travel through the pool's pipes."""

import mmap
import os
import select
import struct

from rdmd_fast.data.shards.sample_reader import SampleReader, fill
from rdmd_fast.errors import describe_system_error

TASK = struct.Struct("=32q")  # ticket, number of samples, then (sample, row) of each; a whole number fits a page
TASK_SAMPLES = 15
REPORT = struct.Struct("=qqi")  # ticket, sample, length of what was wrong with it; (ticket, 0, -1) ends a task
_ORPHAN_MS = 2000  # how often an idle worker looks whether its parent lives
_LONGEST_FAULT = 1000  # bytes; with them a report is written at one go


def task_record(ticket: int, pairs: list[tuple[int, int]]) -> bytes:
    """Of at most TASK_SAMPLES samples."""
    numbers = [number for pair in pairs for number in pair]
    return TASK.pack(ticket, len(pairs), *numbers, *[0] * (2 * (TASK_SAMPLES - len(pairs))))


def read_task(record: bytes) -> tuple[int, list[tuple[int, int]]]:
    """(ticket, samples with their rows)."""
    ticket, count, *numbers = TASK.unpack(record)
    return ticket, list(zip(numbers[0 : 2 * count : 2], numbers[1 : 2 * count : 2], strict=True))


def main(table: int, store: int, rows: int, tasks: int, reports: int, parent: int) -> None:
    """Decode until the parent is gone. The numbers but ``rows`` and ``parent`` are open descriptors."""
    reader, memory = SampleReader.from_descriptor(table), mmap.mmap(store, 0)
    ready = select.poll()
    ready.register(tasks, select.POLLIN)
    while os.getppid() == parent:
        if not ready.poll(_ORPHAN_MS):
            continue
        try:
            record = os.read(tasks, TASK.size)
        except BlockingIOError:  # another one has taken it
            continue
        if not record:
            return
        ticket, pairs = read_task(record)
        try:
            faults = fill(reader, memory, rows, pairs)
        except (OSError, MemoryError) as error:  # the parent does it again, and fails if it has no more than this one
            raise SystemExit(f"decoding worker: {describe_system_error(error)}") from error
        try:
            for index, fault in faults.items():
                text = fault.encode()[:_LONGEST_FAULT]
                os.write(reports, REPORT.pack(ticket, index, len(text)) + text)
            os.write(reports, REPORT.pack(ticket, 0, -1))
        except BrokenPipeError:
            return
