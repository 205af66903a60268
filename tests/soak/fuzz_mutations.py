"""Mutations of bytes, of trees of values, and of the files that hold them; all randomness is the caller's."""

from __future__ import annotations

import json
import os
import random
import string
from pathlib import Path

# Values that configurations meet in bad dreams.
NUMBERS = [
    0, 1, -1, 2, 3, 7, 64, 0.5, -0.5, 1.5, -0.0, 1e-300, 5e-324, 1e-9, 1e9, 1e30, 1e300, -1e300, float("inf"),
    float("-inf"), float("nan"), 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**12, 10**30, -(10**30), -(2**63),
]  # fmt: skip
WORDS = [
    "", " ", "a", "0", "nan", "inf", "1e400", "true", "null", "~", "\x00", "a\x00b", "a\nb", "\x1b[31mred",
    "\u202eabc", "\ud800", "\U0001f600" * 20, "ÿ", "a" * 300, "a" * 5000, "x/" * 3000, "..", "../..",
    "../../../../etc/passwd", "/", "/etc/passwd", "/dev/zero", "/dev/stdin", "/dev/full", "/proc/self/mem",
    "/dev/null", "~root", "$HOME", "%s%n", "{0}", "{1..100000000}", "{a,b}" * 30, "{", "}", "[", "*", "**", "::",
    "a::b", "toy:gaussian", "toy:nothing", "analytic", "teacher", "os.system", "__class__", "__proto__",
]  # fmt: skip
# Files of a case's folder that are no files (see ``odd_files``).
ODD = ["fifo", "folder", "loop", "dangling", "empty", "zeros", "noise", "to_zero"]


class Edits(list):
    """(mutation, seed) pairs of an input in the making, and how it starts: ``start`` as attributes."""

    def __init__(self, **start):
        super().__init__()
        vars(self).update(start)


def noted(*names: str) -> dict:
    """Mutations that ``Edits`` keep for the end."""
    return {name: lambda case, chance, name=name: case.append((name, chance.randrange(2**31))) for name in names}


def odd_files(folder: Path) -> None:
    """What may stand where a file is expected."""
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "empty").touch()
    (folder / "zeros").write_bytes(bytes(4096))
    (folder / "noise").write_bytes(random.Random(0).randbytes(4096))
    (folder / "to_zero").symlink_to("/dev/zero")


def replace_by_odd(path: Path, folder: Path, chance: random.Random) -> str:
    """Put something else where ``path`` is; returns its name."""
    name = chance.choice([*ODD, "gone"])
    if path.is_dir() and not path.is_symlink():
        return "left alone"
    path.unlink(missing_ok=True)
    if name == "folder":
        path.mkdir()
    elif name == "fifo":
        os.mkfifo(path)
    elif name != "gone":
        path.symlink_to("loop" if name == "loop" else folder / name)
    return name


# -- bytes -------------------------------------------------------------------------------------------------------------


def mutate_bytes(data: bytes, chance: random.Random, reach: int | None = None) -> bytes:
    """One damage; ``reach`` is how far from the start it falls most often."""
    size = len(data)
    end = min(size, reach) if reach and chance.random() < 0.8 else size
    at = chance.randrange(end) if end else 0
    length = min(chance.choice([1, 1, 2, 4, 8, 64, 512]), size - at)
    kind = chance.choice(
        ["flip", "set", "cut", "drop", "repeat", "insert", "splice", "number", "zero", "append", "empty"]
    )
    if kind == "flip" and size:
        return data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]
    if kind == "set":
        return data[:at] + chance.randbytes(length) + data[at + length :]
    if kind == "cut":
        return data[: chance.choice([at, size - 1, size // 2, min(size, 8), min(size, 511)])] if size else data
    if kind == "drop":
        return data[:at] + data[at + length :]
    if kind == "repeat":
        return data[: at + length] + data[at : at + length] * chance.choice([1, 3, 100]) + data[at + length :]
    if kind == "insert":
        return data[:at] + chance.randbytes(chance.choice([1, 4, 512])) + data[at:]
    if kind == "splice" and size:
        other = chance.randrange(size)
        return data[:at] + data[other : other + length] + data[at + length :]
    if kind == "number":
        width = chance.choice([1, 2, 4, 8])
        value = chance.choice([0, 1, 127, 128, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1])
        order = chance.choice(["little", "big"])
        return data[:at] + (value % 256**width).to_bytes(width, order) + data[at + width :]
    if kind == "zero":
        return data[:at] + bytes(length) + data[at + length :]
    if kind == "append":
        return data + chance.choice([b"\0" * 512, chance.randbytes(100), data[: min(size, 1 << 16)]])
    return b"" if chance.random() < 0.2 else data[:at] + b"\xff" * length + data[at + length :]


def mutate_text(text: str, chance: random.Random) -> bytes:
    """One damage to a text's lines, characters or encoding."""
    lines = text.splitlines(keepends=True) or [""]
    at = chance.randrange(len(lines))
    kind = chance.choice(["bytes", "drop", "double", "swap", "tab", "indent", "encode", "nul", "quote", "word", "join"])
    if kind == "bytes":
        return mutate_bytes(text.encode(errors="surrogatepass"), chance)
    if kind == "drop":
        del lines[at]
    elif kind == "double":
        lines.insert(at, lines[at])
    elif kind == "swap":
        other = chance.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == "tab":
        lines[at] = "\t" + lines[at]
    elif kind == "indent":
        lines[at] = " " * chance.choice([1, 2, 3, 500]) + lines[at].lstrip()
    elif kind == "encode":
        encoding = chance.choice(["utf-16", "utf-32", "utf-8-sig", "latin-1", "cp037"])
        return text.encode(encoding, errors="replace")
    elif kind == "join":
        lines[at] = lines[at].rstrip("\n")
    else:
        extra = {"nul": "\x00", "quote": chance.choice("\"'`|>&*!%@#,[]{}:-?"), "word": chance.choice(WORDS)}[kind]
        place = chance.randrange(len(lines[at]) + 1)
        lines[at] = lines[at][:place] + extra + lines[at][place:]
    return "".join(lines).encode(errors="surrogatepass")


# -- trees -------------------------------------------------------------------------------------------------------------


def places(tree, path=()) -> list[tuple]:
    """(container, key) of every value in a tree of dicts and lists."""
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    else:
        return []
    found = [(tree, key) for key, _ in items]
    return found + [place for _, value in items[:200] for place in places(value)]


def odd_value(chance: random.Random, extra: tuple = ()):
    """A number, word or structure that fits few places."""
    kind = chance.randrange(10)
    if kind < 4:
        return chance.choice(NUMBERS)
    if kind < 7:
        return chance.choice([*WORDS, *extra])
    if kind == 7:
        return chance.choice([None, True, False])
    if kind == 8:
        return nested(chance.choice([1, 2, 30, 400]), chance.choice([None, 1, "a"]), chance.random() < 0.5)
    return chance.choice(
        [[], {}, [[]], [{}], {"": 1}, {"kind": "mlp"}, {"toy": "gaussian"}, list(range(5000)), [0.5] * 300, ["a"] * 50]
    )


def nested(depth: int, value, mapping: bool):
    for _ in range(depth):
        value = {"a": value} if mapping else [value]
    return value


def mutate_tree(tree, chance: random.Random, extra: tuple = ()) -> str:
    """One change in place; returns what it was."""
    found = places(tree)
    if not found:
        return "nothing to change"
    container, key = chance.choice(found)
    kind = chance.choice(["value"] * 8 + ["number"] * 3 + ["drop", "rename", "wrap", "swap", "add", "repeat", "word"])
    old = container[key]
    if kind == "number" and isinstance(old, int | float) and not isinstance(old, bool):
        container[key] = chance.choice(
            [-old, old + 1, old - 1, old * 2, old * 1000, old * 10**12, old / 3, float(old), old + 0.5, str(old), [old]]
        )
    elif kind == "drop":
        del container[key]
    elif kind == "rename" and isinstance(container, dict):
        name = str(key)
        at = chance.randrange(len(name) + 1)
        new = chance.choice([
            name[:at] + name[at + 1 :], name + "s", name.upper(), "", "a" * 3000, f"{name}.{name}", "\x00", "é" * 40,
            7,
        ])  # fmt: skip
        container[new] = container.pop(key)
    elif kind == "wrap":
        container[key] = chance.choice([[old], {"a": old}, [old] * 3, {str(key): old}])
    elif kind == "swap":
        other, there = chance.choice(found)
        container[key] = json.loads(json.dumps(other[there], default=str))
    elif kind == "add" and isinstance(container, dict):
        letters = "".join(chance.choices(string.ascii_lowercase + "._ ", k=chance.choice([1, 8, 200])))
        container[letters] = odd_value(chance, extra)
    elif kind == "repeat" and isinstance(container, list):
        container[:] = container * chance.choice([2, 50])
    elif kind == "word" and isinstance(old, str):
        container[key] = chance.choice([old + "x", old.upper(), old + "/", "/" + old, old[:-1], old * 2, old + "\n"])
    else:
        container[key] = odd_value(chance, extra)
    return f"{kind} {str(key)[:40]!r}"
