"""Reads the text of one kernel: parameters, declarations, instructions with their operands."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tests.gpu_stand_in.ptx.faults import Fault

# What says nothing about the computation: places in the source, hints, debugging information.
IGNORED = (".loc", ".file", ".pragma", ".reqntid", ".maxntid", ".minnctapersm", ".version", ".target", ".address_size")

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*)", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.[a-z](\d+)\b.*?([\w$]+)\s*$", re.DOTALL)
_LABEL = re.compile(r"\s*(\$?[A-Za-z_][\w$]*):")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_MEMORY = re.compile(
    r"(?:\.extern\s+)?\.(shared|local|global)\s+(?:\.align\s+\d+\s+)?\.b8\s+([\w$]+)\[(\d*)\](?:\s*=\s*\{(.*)\})?",
    re.DOTALL,
)
_INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+)\s*)?\]")
_INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$")
_NAME = re.compile(r"[%$]?[\w.|%$]+")
_FLOAT_BITS = re.compile(r"0[fFdD]([0-9a-fA-F]+)$")


@dataclass(frozen=True)
class Register:
    """A virtual register; ``bits`` is 1 for a predicate."""

    name: str
    bits: int


@dataclass(frozen=True)
class Special:
    """A register that the machine sets, such as ``%tid.x``."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A number in the text, by its bits: negative ones as integers of any width."""

    bits: int


@dataclass(frozen=True)
class Symbol:
    """A name of memory, a parameter or a label."""

    name: str


@dataclass(frozen=True)
class Vector:
    """``{a, b}``; None stands for ``_``, a result that nobody wants."""

    parts: tuple[Operand | None, ...]


@dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: Operand
    offset: int


Operand = Register | Special | Immediate | Symbol | Vector | Address


@dataclass(frozen=True)
class Instruction:
    """One of the code.

    Attributes:
        text: as written, for messages.
        guard: the predicate that decides which threads execute it, None if all do.
        negated: those execute it whose guard is false.
        parts: of its name, at the dots: ``("ld", "global", "v4", "b32")``.
    """

    text: str
    guard: Register | None
    negated: bool
    parts: tuple[str, ...]
    operands: tuple[Operand | None, ...]


@dataclass
class Program:
    """A kernel.

    Attributes:
        parameters: in order.
        code: instructions; what is behind the last ends the thread.
        labels: places in ``code``.
        shared: names of shared memory, to their offsets in it; likewise of a thread's ``local`` memory.
        constants: names of global memory that comes with the kernel, to what is in it.
    """

    name: str
    parameters: list[str]
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0
    constants: dict[str, bytes] = field(default_factory=dict)


def parse(ptx: str) -> Program:
    """Read the one kernel of a module.

    Raises:
        Fault: there is none, or a line that cannot be read.
    """
    # What Triton appends about the source is of no use here, and has braces of its own.
    plain = _COMMENT.sub("", ptx).split(".section")[0]
    entry = _ENTRY.search(plain)
    if not entry:
        raise Fault("the text has no .entry")
    parameters = [_PARAMETER.match(part.strip()) for part in entry[2].split(",") if part.strip()]
    program = Program(entry[1], [parameter[2] for parameter in parameters])
    registers: dict[str, int] = {}
    before = plain[: entry.start()].removesuffix(".visible ")
    for statement in _statements(before) + _statements(entry[3]):
        _read(statement, program, registers)
    return program


def _statements(text: str) -> list[str]:
    """At semicolons, but directives without one at the ends of their lines; braces of blocks say nothing."""
    statements = []
    for line in text.splitlines():
        line = line.strip()
        if line not in ("", "{", "}") and line.split()[0] not in IGNORED:
            statements.append(line)
    return [statement.strip() for statement in "\n".join(statements).split(";") if statement.strip()]


def _read(statement: str, program: Program, registers: dict[str, int]) -> None:
    while label := _LABEL.match(statement):
        program.labels[label[1]] = len(program.code)
        statement = statement[label.end() :].strip()
    if not statement:
        return
    if declaration := _REGISTERS.match(statement):
        _declare(declaration, registers)
    elif memory := _MEMORY.fullmatch(statement):
        _reserve(memory, program)
    elif statement.startswith((".extern .func", ".param")):
        pass  # of calls, whose arguments nobody looks into
    elif statement.startswith("."):
        raise Fault(f"cannot read {statement!r}")
    else:
        program.code.append(_instruction(statement, registers))


def _declare(declaration: re.Match, registers: dict[str, int]) -> None:
    """``.reg .b32 %r<9>`` declares %r0 to %r8, which the text uses; ``.reg .b32 a, b`` two."""
    bits = 1 if declaration[1] == "pred" else int(declaration[1][1:])
    for name in re.split(r"\s*,\s*", declaration[2].strip()):
        registers[name.split("<")[0]] = bits


def _reserve(memory: re.Match, program: Program) -> None:
    space, name, size, content = memory.groups()
    if space == "shared":
        program.shared[name] = program.shared_bytes
        program.shared_bytes += int(size or 0)
    elif space == "local":
        program.local[name] = program.local_bytes
        program.local_bytes += int(size)
    else:
        program.constants[name] = bytes(map(int, (content or "").split(",")))


def _instruction(statement: str, registers: dict[str, int]) -> Instruction:
    matched = _INSTRUCTION.fullmatch(statement)
    if not matched:
        raise Fault(f"cannot read {statement!r}")
    negated, guard, name, rest = matched.groups()
    operands = tuple(_operand(part, registers) for part in _at_commas(rest))
    return Instruction(
        " ".join(statement.split()), _register(guard, registers) if guard else None, negated == "!",
        tuple(name.replace("::", ".").split(".")), operands,
    )  # fmt: skip


def _at_commas(text: str) -> list[str]:
    """Split at the commas that are outside of brackets of any kind."""
    parts, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += character in "{[("
        depth -= character in "}])"
        if character == "," and not depth:
            parts.append(text[start:place])
            start = place + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def _operand(text: str, registers: dict[str, int]) -> Operand | None:
    if text == "_":
        return None
    if text.startswith(("{", "(")):
        return Vector(tuple(_operand(part, registers) for part in _at_commas(text.strip("{}() \n\t"))))
    if address := _ADDRESS.fullmatch(text):
        return Address(_operand(address[1], registers), int(address[2] or "0", 0))
    if bits := _FLOAT_BITS.match(text):
        return Immediate(int(bits[1], 16))
    if _INTEGER.match(text):
        return Immediate(int(text.rstrip("U"), 0))
    if not _NAME.fullmatch(text):
        raise Fault(f"cannot read {text!r}")
    if text.startswith("%"):
        return _register(text.split("|")[0], registers)
    return Symbol(text)


def _register(name: str, registers: dict[str, int]) -> Register | Special:
    for declared in (name, name.rstrip("0123456789")):
        if declared in registers:
            return Register(name, registers[declared])
    return Special(name)
