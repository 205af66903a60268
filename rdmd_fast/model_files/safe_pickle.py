"""Pickles as plain data: containers, numbers and strings, torch tensors, and whatever else the caller can rebuild.

Python's unpickler imports what a file names and calls it. Here a name is only looked up in a table of the caller's own
functions, and one that is not there is refused.
"""

import io
import math
import pickletools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch

Rebuild = Callable[..., object]

# What a damaged stream makes the stack machine stumble over.
DAMAGE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError, EOFError)

# Opcodes that only push a value; the others are methods of _Machine.
VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8",
}  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
CONTAINERS = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
IGNORED = {"PROTO", "FRAME"}

# Hash and equality of these never recurse, which a chain of nested tuples could do until the C stack ends.
KEYS = (str, bytes, int, float)


class Refused(Exception):
    """What is wrong with a pickle: half a line, without the file's name."""


@dataclass(frozen=True)
class Name:
    """A global that a pickle asks for: "module.name", and the function that stands for it here."""

    name: str
    rebuild: Rebuild


@dataclass
class Record:
    """An object of a pickle: the name of its class, and its state."""

    name: str
    state: object = None


def read_pickle(stream: BinaryIO, table: dict[str, Rebuild]) -> object:
    """One pickle from where ``stream`` stands, protocols 0 to 5.

    Args:
        table: for each global that may occur its own function here, called with the arguments that the pickle gives.

    Raises:
        Refused: any other global, an opcode with other uses than data, or a damaged stream.
    """
    machine = _Machine(table)
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                break
            machine.execute(opcode.name, argument)
        return machine.stack.pop()
    except DAMAGE as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise Refused(f"damaged or cut short, get it again ({reason})") from None


class _Machine:
    """The pickle machine of PEP 307 and PEP 3154: a stack of values, a stack of stacks for marks, a memo."""

    def __init__(self, table: dict[str, Rebuild]):
        self.table = table
        self.stack, self.below, self.memo = [], [], {}

    def execute(self, opcode: str, argument) -> None:
        if opcode in VALUES:
            self.stack.append(argument)
        elif opcode in CONSTANTS:
            self.stack.append(CONSTANTS[opcode])
        elif opcode in CONTAINERS:
            self.stack.append(CONTAINERS[opcode]())
        elif opcode in TUPLES:
            self.stack.append(tuple(self.pop(TUPLES[opcode])))
        elif hasattr(self, f"on_{opcode.lower()}"):
            getattr(self, f"on_{opcode.lower()}")(argument)
        elif opcode not in IGNORED:
            raise Refused(f"uses pickle opcode {opcode}, which is not for data")

    def pop(self, count: int) -> list:
        if len(self.stack) < count:
            raise ValueError("stack underflow")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def pop_mark(self) -> list:
        items, self.stack = self.stack, self.below.pop()
        return items

    def top(self, kind: type):
        """The container that the values above it go into."""
        if not isinstance(self.stack[-1], kind):
            raise TypeError(f"a {kind.__name__} is missing")
        return self.stack[-1]

    def key(self, value):
        if not isinstance(value, KEYS):
            raise TypeError(f"a key of type {type(value).__name__}")
        return value

    # -- containers ----------------------------------------------------------------------------------------------------

    def on_mark(self, _) -> None:
        self.below.append(self.stack)
        self.stack = []

    def on_tuple(self, _) -> None:
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def on_list(self, _) -> None:
        items = self.pop_mark()
        self.stack.append(items)

    def on_dict(self, _) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self.insert(items)

    def on_append(self, _) -> None:
        [item] = self.pop(1)
        self.top(list).append(item)

    def on_appends(self, _) -> None:
        items = self.pop_mark()
        self.top(list).extend(items)

    def on_setitem(self, _) -> None:
        self.insert(self.pop(2))

    def on_setitems(self, _) -> None:
        self.insert(self.pop_mark())

    def insert(self, items: list) -> None:
        self.top(dict).update((self.key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))

    def on_additems(self, _) -> None:
        items = self.pop_mark()
        self.top(set).update(map(self.key, items))

    # -- memo ----------------------------------------------------------------------------------------------------------

    def on_memoize(self, _) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def on_put(self, index) -> None:
        self.memo[index] = self.stack[-1]

    def on_get(self, index) -> None:
        self.stack.append(self.memo[index])

    on_binput = on_long_binput = on_put
    on_binget = on_long_binget = on_get

    # -- objects -------------------------------------------------------------------------------------------------------

    def on_global(self, argument: str) -> None:
        self.stack.append(self.look_up(*argument.split(" ", 1)))

    def on_stack_global(self, _) -> None:
        self.stack.append(self.look_up(*self.pop(2)))

    def on_inst(self, argument: str) -> None:
        name, arguments = self.look_up(*argument.split(" ", 1)), self.pop_mark()
        self.stack.append(name.rebuild(*arguments))

    def look_up(self, module: str, attribute: str) -> Name:
        if type(module) is not str or type(attribute) is not str:
            raise TypeError("a global without a name")
        name = f"{module}.{attribute}"
        if name not in self.table:
            raise Refused(f"asks for {name[:100]!r}, which is not on the allow-list: refused, nothing was run")
        return Name(name, self.table[name])

    def on_reduce(self, _) -> None:
        name, arguments = self.pop(2)
        if not isinstance(name, Name) or type(arguments) is not tuple:
            raise TypeError("a call of what is no function")
        self.stack.append(name.rebuild(*arguments))

    on_newobj = on_reduce

    def on_build(self, _) -> None:
        [state] = self.pop(1)
        self.top(Record).state = state

    def on_binpersid(self, _) -> None:
        self.stack.append(Record("persistent id", self.pop(1)[0]))


# -- torch and numpy ---------------------------------------------------------------------------------------------------

STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
MAGIC = 0x1950A86A20F9469CFC6C
MOST_DIMENSIONS = 8
LARGEST_SET = 256  # what is rebuilt over and over must stay small


def read_storage(data: bytes) -> torch.Tensor:
    """A storage that ``torch.save`` wrote in its older format (before zip files), as a 1-D tensor on the CPU.

    Such a stream is five pickles (magic number, protocol, machine, storage, keys), then the count and the elements.

    Raises:
        Refused: anything else: a file of another format, another object, a global beyond the types of storages.
    """
    if not isinstance(data, bytes):
        raise TypeError("a storage that is not of bytes")
    stream = io.BytesIO(data)
    types = dict.fromkeys(STORAGES, _not_callable)
    magic, _, machine, storage, keys = (read_pickle(stream, types) for _ in range(5))
    identity = storage.state if isinstance(storage, Record) else None
    # Kinds before values: to compare or print what is nested in itself by the memo can take for ever.
    kinds = (str, Name, str, str, int, type(None))
    whole = type(identity) is tuple and tuple(map(type, identity)) == kinds and type(keys) is list
    if not whole or type(magic) is not int or magic != MAGIC or identity[0] != "storage":
        raise Refused("holds a tensor stream that is no torch storage")
    if len(keys) != 1 or type(keys[0]) is not str or keys[0] != identity[2] or type(machine) is not dict:
        raise Refused("holds a tensor stream that is no torch storage")
    if not machine.get("little_endian", True):
        raise Refused("was written on a big-endian machine, which is not supported")
    dtype = STORAGES[identity[1].name]
    count = int.from_bytes(stream.read(8), "little")
    if len(data) - stream.tell() != count * dtype.itemsize:
        raise ValueError("a storage of another size than it says")
    if not count:
        return torch.empty(0, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nobody writes to it, and copies could be asked for without end
        return torch.frombuffer(data, dtype=dtype, offset=stream.tell())


def _not_callable(*_):
    raise TypeError("a call of what is no function")


def tensor(storage: torch.Tensor, offset: int, size: tuple, stride: tuple, *_) -> torch.Tensor:
    """``torch._utils._rebuild_tensor_v2``: a view into a storage from ``read_storage``."""
    if type(size) is not tuple or type(stride) is not tuple or len(size) > MOST_DIMENSIONS:
        raise TypeError("a tensor without a shape")
    numbers = (offset, *size, *stride)
    if not isinstance(storage, torch.Tensor) or len(size) != len(stride):
        raise TypeError("a tensor without storage")
    if not all(type(number) is int and 0 <= number < 2**48 for number in numbers):
        raise TypeError("a tensor with sizes that are no numbers")
    end = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) + 1
    if max(math.prod(size), end if 0 not in size else 0) > len(storage):
        raise ValueError("a tensor that reaches beyond its storage")
    return storage.as_strided(size, stride, offset)


def parameter(data: torch.Tensor, *_) -> torch.Tensor:
    """``torch._utils._rebuild_parameter``: its tensor."""
    if not isinstance(data, torch.Tensor):
        raise TypeError("a parameter without tensor")
    return data


def ordered_dict(*items) -> dict:
    """``collections.OrderedDict``, empty; pickles fill it afterwards."""
    if items:
        raise TypeError("an OrderedDict with arguments")
    return {}


def set_of(items: list) -> set:
    """``builtins.set`` of numbers and strings."""
    if not isinstance(items, list) or len(items) > LARGEST_SET or not all(isinstance(item, KEYS) for item in items):
        raise TypeError("a set of other things than some numbers and strings")
    return set(items)


class NumberType(Record):
    """A NumPy type, "f8" and the like; its state, which the pickle sets next, is (version, byte order, …)."""


def numpy_dtype(code: str, *_) -> NumberType:
    """``numpy.dtype`` of a number."""
    if not (isinstance(code, str) and len(code) == 2 and code[0] in "fiub" and code[1] in "1248"):
        raise TypeError("a NumPy type that is no number")
    return NumberType(code)


def numpy_scalar(dtype: NumberType, data: bytes) -> float | int | bool:
    """``numpy.core.multiarray.scalar``: a Python number."""
    if not isinstance(dtype, NumberType):
        raise TypeError("a NumPy number without type")
    order = dtype.state[1] if isinstance(dtype.state, tuple) else "="
    return np.frombuffer(data, np.dtype(dtype.name).newbyteorder(order))[0].item()
