"""Mutated networks: exports, diffusers folders, EDM pickles."""

from __future__ import annotations

import io
import json
import pickletools
import random
import shutil
import struct
from pathlib import Path

from fuzz_mutations import Edits, mutate_bytes, mutate_text, mutate_tree, noted, odd_files, replace_by_odd
from fuzz_sandbox import Rules, as_command

from rdmd_fast import cli, load_denoiser, load_generator

SAYS = r"sampling without a class"
NETWORK_WORDS = (
    "song_unet", "dhariwal_unet", "diffusers_unet", "affine", "mlp", "teacher", "generator", "fourier", "residual",
    "skip", "edm", "epsilon", "v", "x0", "flow", "DownBlock2D", "AttnDownBlock2D", "v_prediction", "sample",
    "scaled_linear", "squaredcos_cap_v2", "DDPMScheduler", "FlowMatchEulerDiscreteScheduler", "scale_shift",
    "resnet",
)  # fmt: skip


class Exports:
    """Export folders, through `rdmd translate`, `rdmd sample` and from Python."""

    name = "exports"

    def __init__(self, material):
        self.material = material
        self.bases = [*material.exports.values()]
        self.weights = {"config": 8, "header": 4, "weights": 2, "bytes": 2, "text": 1, "file": 1, "layout": 0.5}
        self.mutations = noted(*self.weights)

    def start(self, chance: random.Random, number: int) -> Edits:
        return Edits(base=chance.choice(self.bases), door=chance.randrange(3))

    def finish(self, case: Edits, folder: Path):
        odd_files(folder)
        model = Path(shutil.copytree(case.base, folder / "model"))
        for kind, seed in case:
            damage_model(model, kind, random.Random(seed), folder)
        if case.door == 0:
            role = load_generator if (case.base / "generator.safetensors").exists() else load_denoiser
            return lambda: as_command(from_python, role), Rules(), None
        if case.base.name in ("generator", "affine", "points"):
            arguments = ["translate", "--model", "model", "--input", str(self.material.images), "--output", "out"]
        else:
            # 2 steps of 2 samples; a picture or a folder.
            arguments = ["sample", "--model", "model", "--count", "2", "--steps", "2"]
            arguments += ["--out", "out.png" if case.door == 1 else "out"]
        return lambda: cli.main(arguments), Rules(notes=SAYS), None


class Diffusers(Exports):
    """Folders that diffusers saves, of a model or of a pipeline whose weights are in parts, through the same doors."""

    name = "diffusers"

    def __init__(self, material):
        super().__init__(material)
        self.bases = [material.diffusers, material.pipeline]


def from_python(load) -> int:
    """Load and run once, as a script of the user's would."""
    import torch

    network = load("model")
    x = torch.zeros(2, *network.config.sample_shape)
    y = network(x) if load is load_generator else network(x, 1.0)
    return 0 if y.shape == x.shape else 70


def damage_model(model: Path, kind: str, chance: random.Random, folder: Path) -> None:
    files = sorted(path for path in model.rglob("*") if path.is_file())
    jsons = [path for path in files if path.suffix == ".json"]
    tensors = [path for path in files if path.suffix == ".safetensors"]
    if kind == "layout":
        move = chance.randrange(4)
        if move == 0 and jsons:
            (model / "model_index.json").write_bytes(jsons[0].read_bytes())
        elif move == 1:
            (model / "unet").mkdir(exist_ok=True)
            (model / "unet/config.json").write_bytes(jsons[0].read_bytes() if jsons else b"")
        elif move == 2 and tensors:
            shutil.move(tensors[0], model / "generator.safetensors")
        elif tensors:
            own = tensors[0].name
            names = chance.choice([["a"], ["../up"], [own], [own, "b"], ["/etc/passwd"], [7], []])
            (model / f"{tensors[0].name}.index.json").write_text(json.dumps({"weight_map": dict(enumerate(names))}))
            tensors[0].rename(model / "moved.safetensors")
        return
    if kind == "file" and files:
        replace_by_odd(chance.choice(files), folder, chance)
        return
    wanted = {"config": jsons, "text": jsons, "header": tensors, "weights": tensors, "bytes": files}.get(kind)
    if not wanted:
        return
    path = chance.choice(wanted)
    data = path.read_bytes()
    if kind == "config":
        try:
            values = json.loads(data)
        except ValueError:
            return
        mutate_tree(values, chance, NETWORK_WORDS)
        path.write_text(json.dumps(values))
    elif kind == "text":
        path.write_bytes(mutate_text(data.decode(errors="replace"), chance))
    elif kind == "header":
        path.write_bytes(mutate_header(data, chance))
    elif kind == "weights":
        path.write_bytes(mutate_weights(data, chance))
    else:
        path.write_bytes(mutate_bytes(data, chance, reach=4096))


def mutate_header(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file whose header, or its length, says something else."""
    if len(data) < 8:
        return data
    [size] = struct.unpack("<Q", data[:8])
    if chance.random() < 0.15:
        wrong = chance.choice([0, 1, 7, size - 1, size + 1, size * 2, len(data), 2**20, 2**31, 2**40, 2**63, 2**64 - 1])
        return struct.pack("<Q", wrong % 2**64) + data[8:]
    try:
        header = json.loads(data[8 : 8 + size])
    except ValueError:
        return data
    kind, names = chance.randrange(6), sorted(header)
    name = chance.choice(names or ["none"])
    entry = header.get(name)
    if kind == 0 and isinstance(entry, dict) and "dtype" in entry:
        entry["dtype"] = chance.choice([
            "F64", "F16", "BF16", "I8", "U8", "I64", "BOOL", "F8_E4M3", "F8_E5M2", "C64", "U16", "F4", "X", "", 7,
            None,
        ])  # fmt: skip
    elif kind == 1 and isinstance(entry, dict) and "shape" in entry:
        entry["shape"] = chance.choice([
            [], [0], [-1], [1], [2**63], [2**32, 2**32], [1.5], ["a"], None, entry["shape"][::-1],
            entry["shape"] + [1], [1] * 70,
        ])  # fmt: skip
    elif kind == 2 and isinstance(entry, dict) and "data_offsets" in entry:
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = chance.choice([
            [end, begin], [0, end], [begin, end + 4], [begin, 2**63], [-4, 0], [begin], [], None,
            [begin + 2, end + 2], ["a", 1],
        ])  # fmt: skip
    elif kind == 3 and entry is not None:
        header[chance.choice([name + "x", "", "../" + name, "\x00", "a" * 10000, name.upper(), "model." + name])] = (
            header.pop(name)
        )
    elif kind == 4:
        header[chance.choice(["extra", "__metadata__"])] = chance.choice(
            [entry, {}, {"a": 1}, {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, None, [], "x"]
        )
    else:
        mutate_tree(header, chance)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def mutate_weights(data: bytes, chance: random.Random) -> bytes:
    """Values that are no weights: NaN, infinities, the largest and smallest floats."""
    if len(data) < 8:
        return data
    [size] = struct.unpack("<Q", data[:8])
    start = 8 + size
    if start + 4 > len(data):
        return data
    value = struct.pack("<f", chance.choice([float("nan"), float("inf"), -float("inf"), 3e38, 1e-45]))
    at = start + 4 * chance.randrange((len(data) - start) // 4)
    count = min(chance.choice([1, 1, 100, 10**9]), (len(data) - at) // 4)
    return data[:at] + value * count + data[at + 4 * count :]


# -- EDM pickles -------------------------------------------------------------------------------------------------------

CALLS = [
    b"cos\nsystem\n(S'touch executed'\ntR", b"cposix\nsystem\n(S'touch executed'\ntR",
    b"csubprocess\ncheck_output\n((lp0\nS'touch'\naS'executed'\natR",
    b"cbuiltins\neval\n(S'open(\"executed\",\"w\")'\ntR", b"cbuiltins\nexec\n(S'open(\"executed\",\"w\")'\ntR",
    b"\x8c\x02os\x8c\x06system\x93\x8c\x0etouch executed\x85R", b"(S'touch executed'\nios\nsystem\n",
    b"cbuiltins\ngetattr\n", b"ctorch\nload\n", b"c__builtin__\napply\n",
    b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n(dtR", b"ccollections\nOrderedDict\n)R",
    b"cnumpy\ndtype\n(S'O8'\ntR", b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'f8'\ntRS'12345678'\ntR",
    b"\x82\x01", b"P0\n", b"\x8fN\x90", b"\x97\x98", b"cbuiltins\nset\n(]tR",
    b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNtR", b"ctorch.storage\n_load_from_bytes\n(C\x02ab\x85R",
]  # fmt: skip
OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]


class Pickles:
    """EDM pickles by bytes, by opcodes and by the streams of tensors inside, through `rdmd import-edm`."""

    name = "pickles"

    def __init__(self, material):
        self.bases = {path: (path.read_bytes(), opcodes_of(path.read_bytes())) for path in material.pickles}
        changes = {"bytes": change_bytes, "opcode": change_opcodes, "call": insert_call}
        changes |= {"argument": change_argument, "nested": change_nested}
        self.mutations = {
            name: (lambda case, chance, change=change: case.change(change, chance)) for name, change in changes.items()
        }
        self.weights = {"bytes": 3, "opcode": 3, "call": 3, "argument": 4, "nested": 2}

    def start(self, chance: random.Random, number: int) -> PickleCase:
        # The large ones take a while to read: they come up now and then.
        paths = sorted(self.bases, key=lambda path: len(self.bases[path][0]))
        path = chance.choice(paths[:3] * 4 + paths[3:])
        return PickleCase(*self.bases[path], use=chance.random() < 0.1)

    def finish(self, case: PickleCase, folder: Path):
        (folder / "a.pkl").write_bytes(case.data)
        arguments = ["import-edm", "a.pkl", "--out", "out"]
        if case.use:
            arguments = ["sample", "--model", "a.pkl", "--count", "1", "--steps", "2", "--out", "out.png"]
        return lambda: cli.main(arguments), Rules(notes=SAYS), untouched


def untouched(outcome, folder: Path) -> str | None:
    return "executed: a file was touched" if (folder / "executed").exists() else None


class PickleCase:
    """A pickle in the making: its bytes, and where its opcodes begin as long as nobody has moved them."""

    def __init__(self, data: bytes, opcodes: list[tuple[str, int, int]], use: bool):
        self.data, self.opcodes, self.use, self.moved = data, opcodes, use, False

    def change(self, change, chance: random.Random) -> str:
        if self.moved and change is not change_bytes:
            self.opcodes, self.moved = opcodes_of(self.data), False
        self.data = change(self.data, self.opcodes, chance)
        self.moved = True
        return change.__name__


def opcodes_of(data: bytes) -> list[tuple[str, int, int]]:
    """(name, start, end) of each opcode, as far as they can be told."""
    found = []
    try:
        for opcode, _, position in pickletools.genops(io.BytesIO(data)):
            found.append((opcode.name, position))
    except Exception:  # whatever a damaged pickle makes of the lister
        pass
    ends = [position for _, position in found[1:]] + [len(data)]
    return [(name, start, end) for (name, start), end in zip(found, ends, strict=False)]


def change_bytes(data: bytes, opcodes, chance: random.Random) -> bytes:
    return mutate_bytes(data, chance, reach=20000)


def change_opcodes(data: bytes, opcodes, chance: random.Random) -> bytes:
    """Drop, repeat, exchange, move or replace an opcode."""
    if len(opcodes) < 2:
        return data
    _, start, end = chance.choice(opcodes)
    kind = chance.randrange(5)
    if kind == 0:
        return data[:start] + data[end:]
    if kind == 1:
        return data[:end] + data[start:end] * chance.choice([1, 2, 1000]) + data[end:]
    if kind == 2:
        return data[:start] + chance.choice(OPCODES) + data[start + 1 :]
    _, other, other_end = chance.choice(opcodes)
    if kind == 3:
        return data[:start] + data[other:other_end][:4096] + data[end:]
    return data[:start] + data[other:other_end][:4096] + data[start:]


def insert_call(data: bytes, opcodes, chance: random.Random) -> bytes:
    """A call, or half of one, between two opcodes; with its result taken off again or left there."""
    _, start, _ = chance.choice(opcodes or [("", 0, 0)])
    return data[:start] + chance.choice(CALLS) + chance.choice([b"", b"0"]) + data[start:]


def change_argument(data: bytes, opcodes, chance: random.Random) -> bytes:
    """Another name, number, length or memo index."""
    held = [each for each in opcodes if each[2] - each[1] > 1]
    if not held:
        return data
    small = [each for each in held if each[2] - each[1] < 200]
    name, start, end = chance.choice(small or held)
    if "UNICODE" in name or "STRING" in name:
        text = chance.choice([
            b"os", b"system", b"builtins", b"eval", b"SongUNet", b"DhariwalUNet", b"EDMPrecond", b"model", b"",
            b"a" * 70000, b"\xed\xa0\x80", b"_modules", b"_parameters", b"weight", b"../x", b"img_resolution",
            b"channel_mult", b"\n",
        ])  # fmt: skip
        return data[:start] + b"X" + struct.pack("<I", len(text)) + text + data[end:]
    if name in ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "NEWTRUE", "NEWFALSE"):
        value = chance.choice([
            b"K\x00", b"K\xff", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f", b"\x8a\x09" + b"\xff" * 8 + b"\x00", b"N",
            b"\x88", b"G" + struct.pack(">d", float("nan")), b"G" + struct.pack(">d", 1e300),
            b"\x8a\xff" + b"\x7f" * 255, b"]", b"}",
        ])  # fmt: skip
        return data[:start] + value + data[end:]
    return data[: start + 1] + mutate_bytes(data[start + 1 : end], chance) + data[end:]


def change_nested(data: bytes, opcodes, chance: random.Random) -> bytes:
    """Inside one of the tensor streams, with its length put right."""
    streams = [each for each in opcodes if each[0] in ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING")]
    if not streams:
        return mutate_bytes(data, chance, reach=20000)
    name, start, end = chance.choice(streams)
    width = {"BINBYTES": 4, "SHORT_BINBYTES": 1, "BINBYTES8": 8, "BINSTRING": 4}[name]
    inner = data[start + 1 + width : end]
    if chance.random() < 0.5:
        inner_opcodes = opcodes_of(inner)
        change = chance.choice([change_opcodes, insert_call, change_argument])
        inner = change(inner, inner_opcodes, chance)
    else:
        inner = mutate_bytes(inner, chance, reach=400)
    return data[:start] + b"B" + struct.pack("<I", len(inner)) + inner + data[end:]
