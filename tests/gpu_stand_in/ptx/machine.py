"""Runs blocks of threads: all threads of many blocks in one step, those that stand at another place masked out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from tests.gpu_stand_in.ptx.faults import Fault
from tests.gpu_stand_in.ptx.instructions import PREDICATE, WARP, Mask, prepare
from tests.gpu_stand_in.ptx.memory import Accessors, GlobalMemory, LocalMemory, SharedMemory
from tests.gpu_stand_in.ptx.text import Address, Immediate, Register, Special, parse

THREADS_AT_ONCE = 8192  # NumPy's costs of a call are those of some thousand elements


class Kernel:
    """A kernel, ready to be launched; its instructions are all known.

    Args:
        copies: warps of a block may compute the same; see ``memory.History``.

    Raises:
        Fault: the text cannot be read, or has an unknown instruction.
    """

    def __init__(self, ptx: str, copies: bool = False):
        self._copies = copies
        self.program = parse(ptx)
        self.code = [(each, prepare(each)) for each in self.program.code]
        self._constants = {name: np.frombuffer(content, np.uint8) for name, content in self.program.constants.items()}
        # Addresses that names stand for, each in its own kind of memory.
        self.names = {
            **self.program.shared, **{name: LocalMemory.FIRST + offset for name, offset in self.program.local.items()},
            **{name: content.ctypes.data for name, content in self._constants.items()},
        }  # fmt: skip

    def launch(
        self, grid: tuple[int, int, int], threads: int, arguments: Iterable[int], shared: int,
        allocations: Iterable[tuple[int, int]],
    ) -> None:  # fmt: skip
        """Run a grid of blocks.

        Args:
            threads: of a block.
            arguments: bits of each; where there are fewer than parameters, the rest is null.
            shared: bytes of shared memory, beside what the kernel declares itself.
            allocations: (address, size) of all that lives on the device.

        Raises:
            Fault: with the instruction at which it occurred.
        """
        parameters = self.program.parameters
        values = [*arguments] + [0] * len(parameters)
        by_name = dict(zip(parameters, values, strict=False))
        constants = ((content.ctypes.data, content.nbytes) for content in self._constants.values())
        memory = GlobalMemory([*allocations, *constants], self._copies)
        blocks = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        together = max(1, THREADS_AT_ONCE // threads)
        for first in range(0, len(blocks), together):
            chosen = blocks[first : first + together]
            Machine(self, chosen, first, grid, threads, by_name, shared, memory).run()


class Machine:
    """Threads of some blocks, in lockstep as far as their branches agree.

    Attributes:
        threads: how many there are.
        arguments: bits of each, by parameter.
        carry: the flag of each, that instructions with ``.cc`` write.
    """

    def __init__(
        self, kernel: Kernel, blocks: list, first: int, grid: tuple[int, int, int], threads: int,
        arguments: Mapping[str, int], shared: int, memory: GlobalMemory,
    ):  # fmt: skip
        self._kernel, self.arguments, self._global = kernel, arguments, memory
        self._per_block, self.threads = threads, len(blocks) * threads
        self._slot = np.repeat(np.arange(len(blocks)), threads)
        self._block, self._warp = self._slot + first, np.arange(self.threads) % threads // WARP
        self._epoch = np.zeros(len(blocks), np.int64)
        self._shared = SharedMemory(shared + kernel.program.shared_bytes, len(blocks))
        self._local = LocalMemory(kernel.program.local_bytes, self.threads)
        self.carry = np.zeros(self.threads, bool)
        self._registers: dict[str, np.ndarray] = {}
        self._special = _special_registers(np.array(blocks, np.uint32)[self._slot], grid, threads)
        # One place while all threads stand there; of each thread while they do not.
        self._place, self._places = 0, np.zeros(self.threads, np.int64)
        self._together = True

    # -- control -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Those furthest behind go first, and so meet the others again behind their branches."""
        end = len(self._kernel.code)
        with np.errstate(all="ignore"):
            while True:
                active = self._active()
                if self._place >= end:
                    return
                instruction, run = self._kernel.code[self._place]
                mask = self._guarded(instruction, active)
                self._advance(active)
                if mask is None or mask.any():
                    try:
                        run(self, mask)
                    except Fault as fault:
                        raise Fault(f"{self._kernel.program.name}: {instruction.text}: {fault}") from None

    def _active(self) -> Mask:
        if self._together:
            return None
        self._place = int(self._places.min())
        active = self._places == self._place
        self._together = bool(active.all())
        return None if self._together else active

    def _guarded(self, instruction, active: Mask) -> Mask:
        if instruction.guard is None:
            return active
        guard = self.read(instruction.guard, PREDICATE) != instruction.negated
        mask = guard if active is None else guard & active
        return None if mask.all() else mask

    def _advance(self, active: Mask) -> None:
        self._place += 1
        if active is not None:
            self._places[active] = self._place

    def jump(self, label: str, mask: Mask) -> None:
        self._go(self._kernel.program.labels[label], mask)

    def end(self, mask: Mask) -> None:
        self._go(len(self._kernel.code), mask)

    def _go(self, place: int, mask: Mask) -> None:
        if mask is None:
            self._place, self._together = place, True
            return
        if self._together:
            self._places[:] = self._place
            self._together = False
        self._places[mask] = place

    def barrier(self, mask: Mask) -> None:
        """All threads of a block must come to one barrier together."""
        arrived = np.full(len(self._epoch), self._per_block)
        if mask is not None:
            arrived = np.bincount(self._slot[mask], minlength=len(self._epoch))
        if ((arrived > 0) & (arrived < self._per_block)).any():
            raise Fault("divergent barrier: some threads of a block do not come to it")
        self._epoch[arrived > 0] += 1

    def whole_warps(self, mask: Mask, what: str) -> None:
        """Check that no warp is split."""
        if mask is not None and (mask.reshape(-1, WARP).sum(axis=1) % WARP).any():
            raise Fault(f"{what} by some lanes of a warp only")

    # -- registers -----------------------------------------------------------------------------------------------------

    def read(self, operand, dtype: np.dtype) -> np.ndarray:
        """The operand's value in all threads; the low bits of one that is wider. Numbers have no dimension."""
        if isinstance(operand, Register):
            return self._of_register(operand, dtype)
        if isinstance(operand, Immediate):
            if dtype == PREDICATE:
                return np.array(bool(operand.bits))
            bits = operand.bits & ((1 << 8 * dtype.itemsize) - 1)
            return np.array(bits, f"u{dtype.itemsize}").view(dtype)
        if isinstance(operand, Special):
            if operand.name not in self._special:
                raise Fault(f"unknown register {operand.name}")
            return self._special[operand.name].astype(dtype)
        if operand.name not in self._kernel.names:
            raise Fault(f"unknown name {operand.name}")
        return np.array(self._kernel.names[operand.name], dtype)

    def _of_register(self, register: Register, dtype: np.dtype) -> np.ndarray:
        value = self._registers.get(register.name)
        if value is None:
            value = self._registers[register.name] = self._unset(register.bits)
        if dtype == value.dtype:
            return value
        if dtype == PREDICATE or value.dtype == PREDICATE or dtype.itemsize > value.dtype.itemsize:
            raise Fault(f"{register.name} is not of {8 * dtype.itemsize} bits")
        return (value if dtype.itemsize == value.dtype.itemsize else value.astype(f"u{dtype.itemsize}")).view(dtype)

    def _unset(self, bits: int) -> np.ndarray:
        """What no instruction has written: NaN, -1, true."""
        return np.ones(self.threads, bool) if bits == 1 else np.full(self.threads, (1 << bits) - 1, f"u{bits // 8}")

    def write(self, register: Register | None, value: np.ndarray, mask: Mask) -> None:
        """Set a register of the threads in ``mask``; a narrower value is extended by its kind."""
        if register is None:
            return
        if register.bits > 1:
            if value.dtype.itemsize * 8 != register.bits:
                value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{register.bits // 8}")
            value = np.atleast_1d(np.ascontiguousarray(value)).view(f"u{register.bits // 8}")
        if value.shape != (self.threads,):
            value = np.full(self.threads, value)
        if mask is not None:
            dtype = PREDICATE if register.bits == 1 else np.dtype(f"u{register.bits // 8}")
            value = np.where(mask, value, self._of_register(register, dtype))
        self._registers[register.name] = value

    def gather(self, register, dtype: np.dtype, mask: Mask) -> np.ndarray:
        """Values of the threads in ``mask``."""
        value = np.broadcast_to(self.read(register, dtype), (self.threads,))
        return np.ascontiguousarray(value if mask is None else value[mask])

    def scatter(self, register: Register | None, values: np.ndarray, mask: Mask) -> None:
        """Write the values of the threads in ``mask``."""
        if mask is not None:
            whole = np.zeros(self.threads, values.dtype)
            whole[mask] = values
            values = whole
        self.write(register, values, mask)

    # -- memory --------------------------------------------------------------------------------------------------------

    def addresses(self, address: Address) -> np.ndarray:
        """Of all threads."""
        base = address.base
        wide = isinstance(base, Register) and base.bits == 64
        value = self.read(base, np.dtype(np.uint64 if wide else np.uint32)).astype(np.int64)
        return np.broadcast_to(value + address.offset, (self.threads,)).astype(np.uint64)

    def load(self, space: str, address: Address, width: int, mask: Mask) -> np.ndarray:
        return self.load_at(space, self.addresses(address), width, mask)

    def store(self, space: str, address: Address, values: np.ndarray, mask: Mask) -> None:
        self.store_at(space, self.addresses(address), values, mask)

    def load_at(self, space: str, addresses: np.ndarray, width: int, mask: Mask) -> np.ndarray:
        chosen, slot, accessors = self._accesses(addresses, mask)
        if space == "global":
            return self._global.load(chosen, width, accessors)
        if space == "local":
            return self._local.load(chosen, width, self._numbers(mask))
        return self._shared.load(chosen, width, slot, accessors)

    def store_at(self, space: str, addresses: np.ndarray, values: np.ndarray, mask: Mask) -> None:
        chosen, slot, accessors = self._accesses(addresses, mask)
        if space == "global":
            self._global.store(chosen, values, accessors)
        elif space == "local":
            self._local.store(chosen, values, self._numbers(mask))
        else:
            self._shared.store(chosen, values, slot, accessors)

    def _numbers(self, mask: Mask) -> np.ndarray:
        return np.arange(self.threads) if mask is None else np.flatnonzero(mask)

    def _accesses(self, addresses: np.ndarray, mask: Mask) -> tuple[np.ndarray, np.ndarray, Accessors]:
        here = slice(None) if mask is None else mask
        slot = self._slot[here]
        return addresses[here], slot, Accessors(self._block[here], self._warp[here], self._epoch[slot])


def _special_registers(coordinates: np.ndarray, grid: tuple[int, int, int], threads: int) -> dict[str, np.ndarray]:
    lane = np.arange(len(coordinates), dtype=np.uint32) % np.uint32(threads)
    registers = {"%tid.x": lane, "%laneid": lane % np.uint32(WARP), "%ntid.x": np.full_like(lane, threads)}
    for axis, letter in enumerate("xyz"):
        registers[f"%ctaid.{letter}"] = np.ascontiguousarray(coordinates[:, axis])
        registers[f"%nctaid.{letter}"] = np.full_like(lane, grid[axis])
    for letter in "yz":
        registers |= {f"%tid.{letter}": np.zeros_like(lane), f"%ntid.{letter}": np.ones_like(lane)}
    return registers
