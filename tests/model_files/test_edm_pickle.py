"""EDM pickles: what is read equals what was written, and nothing but data is ever read."""

import io
import os
import pickle
import pickletools
import random
import struct
import warnings

import numpy as np
import pytest
import torch
from material import error_line

from rdmd_fast import cli
from rdmd_fast.errors import InputError
from rdmd_fast.model_files.edm_pickle import GLOBALS, read_edm_pickle
from rdmd_fast.model_files.safe_pickle import Refused, read_pickle, read_storage
from rdmd_fast.networks.options import DhariwalUNetOptions, SongUNetOptions


def same_weights(weights, network):
    own = network.state_dict()
    assert weights.keys() == own.keys()
    for name, value in own.items():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], value.float()), name


# -- what is written is read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("form", ["tiny", "ncsnpp", "adm"])
def test_weights_and_architecture_survive(edm, tmp_path, form, protocol):
    arguments = getattr(edm, form)
    network = edm(tmp_path / "a.pkl", arguments, protocol=protocol, resolution=8)
    config, weights = read_edm_pickle(tmp_path / "a.pkl")
    same_weights(weights, network)
    options = DhariwalUNetOptions if form == "adm" else SongUNetOptions
    kind = "dhariwal_unet" if form == "adm" else "song_unet"
    expected = {name: value for name, value in arguments.items() if name != "model_type"}
    assert config.network == options(kind=kind, **expected)
    assert (config.role, config.sample_shape) == ("teacher", [3, 8, 8])
    assert (config.diffusion.parameterization, config.diffusion.sigma_data) == ("edm", 0.5)


@pytest.mark.parametrize(("change", "resolution"), [
    (dict(model_channels=16, channel_mult=[1], attn_resolutions=[]), 4),
    (dict(model_channels=32, channel_mult=[1, 1, 2], attn_resolutions=[16, 4], label_dim=7), 16),
    (dict(model_channels=24, channel_mult=[2, 1], num_blocks=3, channel_mult_emb=2), 8),
    (dict(model_type="DhariwalUNet", model_channels=64, channel_mult=[1, 2], attn_resolutions=[16]), 16),
    (dict(model_type="DhariwalUNet", model_channels=32, channel_mult=[1, 1], augment_dim=9), 8),
])  # fmt: skip
def test_other_widths_depths_attention_and_classes(edm, tmp_path, change, resolution):
    network = edm(tmp_path / "a.pkl", edm.tiny | change, resolution)
    config, weights = read_edm_pickle(tmp_path / "a.pkl")
    same_weights(weights, network)
    assert config.sample_shape == [3, resolution, resolution]


def test_what_a_pickle_leaves_out_has_edms_defaults(edm, tmp_path):
    small = dict(model_channels=8, num_blocks=1)
    network = edm(tmp_path / "song.pkl", small | dict(model_type="SongUNet"), 16)
    config, weights = read_edm_pickle(tmp_path / "song.pkl")
    same_weights(weights, network)
    assert config.network.channel_mult == [1, 2, 2, 2] and config.network.attn_resolutions == [16]
    assert config.network.dropout == 0.10
    full = small | dict(model_type="DhariwalUNet")
    network = edm.network(full, 16)
    contents = edm.contents(network, full, 16)
    del contents["ema"].meta["state"]["_init_kwargs"]["model_type"]
    config, weights = read_edm_pickle(edm.write(tmp_path / "adm.pkl", contents))
    same_weights(weights, network)
    assert config.network.channel_mult == [1, 2, 3, 4] and config.network.attn_resolutions == [32, 16, 8]


def test_positional_arguments_and_sigma_data(edm, tmp_path):
    arguments = {name: value for name, value in edm.tiny.items() if name != "model_type"}
    edm(tmp_path / "a.pkl", edm.tiny, _init_args=(8, 3, 0, False, 0, 80.0, np.float64(0.25), "SongUNet"),
        _init_kwargs=arguments | dict(channel_mult=(1, 2)))  # fmt: skip
    config, _ = read_edm_pickle(tmp_path / "a.pkl")
    assert config.diffusion.sigma_data == 0.25 and config.network.channel_mult == [1, 2]


def test_tensors_as_published_files_hold_them(edm, tmp_path, monkeypatch):
    """On a GPU, in half precision, with strides of their own, and NumPy 1's names."""
    network = edm.network(edm.tiny).to(memory_format=torch.channels_last)
    with torch.no_grad():
        network.map_layer0.weight.data = network.map_layer0.weight.data.t().contiguous().t()
        network.map_layer1.weight.data = network.map_layer1.weight.data.half()
        network.map_layer1.bias.data = torch.randn(5, 32)[3]
    assert not network.map_layer0.weight.is_contiguous() and network.map_layer1.bias.storage_offset() == 96
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    written = pickle.dumps(edm.contents(network, edm.tiny), 3)
    assert b"cuda:0" in written and b"numpy._core" in written and b"cbuiltins\nset" in written
    (tmp_path / "a.pkl").write_bytes(written.replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"))
    _, weights = read_edm_pickle(tmp_path / "a.pkl")
    same_weights(weights, network)
    assert all(value.is_contiguous() for value in weights.values())


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_storages_of_every_type(dtype):
    for values in (torch.tensor([0, 1, 1]).to(dtype), torch.empty(0, dtype=dtype)):
        function, (data,) = values.storage().__reduce__()
        assert function is torch.storage._load_from_bytes
        read = read_storage(data)
        assert read.dtype == dtype and torch.equal(read, values)


# -- what is no EDM network --------------------------------------------------------------------------------------------


def refused(path):
    with pytest.raises(InputError) as error:
        read_edm_pickle(path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize(("content", "says"), [
    (b"", "empty"),
    (b"\n <!DOCTYPE html><html><body>404</body></html>", "web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    (b"PK\x03\x04" + bytes(100), "zip"),
    (b"hello, world\n" * 9, "damaged"),
    (pickle.dumps([1, 2]), "'ema'"),
    (pickle.dumps({"G_ema": 1}), "G_ema"),
    (pickle.dumps({"ema": None}), "'ema'"),
    (pickle.dumps({"ema": {"weight": 1.0}}), "'ema'"),
    (pickle.dumps({10**5000: 1}), "'ema'"),
])  # fmt: skip
def test_other_files(tmp_path, content, says):
    (tmp_path / "a.pkl").write_bytes(content)
    assert says in refused(tmp_path / "a.pkl")


def test_missing_file_and_folder(tmp_path):
    assert "No such file" in refused(tmp_path / "none.pkl")
    (tmp_path / "a.pkl").mkdir()
    assert "not a file" in refused(tmp_path / "a.pkl")


def set_argument(name, value):
    return lambda contents: contents["ema"].meta["state"]["_init_kwargs"].update({name: value})


def model_state(contents):
    return contents["ema"].meta["state"]["_modules"]["model"].meta["state"]


def rename_weight(contents):
    parameters = model_state(contents)["_modules"]["map_layer0"].meta["state"]["_parameters"]
    parameters["other"] = parameters.pop("weight")


def same_module_twice(contents):
    modules = model_state(contents)["_modules"]
    modules["map_layer1"] = modules["map_layer0"]


def module_in_itself(contents):
    model_state(contents)["_modules"]["map_layer0"] = model_state(contents)["_modules"]["enc"]
    model_state(contents)["_modules"]["enc"]._modules["enc"] = model_state(contents)["_modules"]["enc"]


def one_storage_many_times(contents):
    big = torch.zeros(2**20)
    parameters = model_state(contents)["_modules"]["map_layer0"].meta["state"]["_parameters"]
    parameters.update({f"w{index}": big for index in range(100)})


LAUGHS = [[]]
for _ in range(60):
    LAUGHS = [LAUGHS, LAUGHS]


@pytest.mark.parametrize(("change", "says"), [
    (lambda contents: contents["ema"].meta.update(class_name="VPPrecond"), "'VPPrecond'"),
    (lambda contents: contents["ema"].meta["state"]["_modules"]["model"].meta.update(class_name="A\nB"), r"'A\nB'"),
    (lambda contents: contents["ema"].meta["state"]["_modules"].clear(), "EDMPrecond"),
    (lambda contents: contents["ema"].meta["state"].pop("_init_kwargs"), "constructed"),
    (lambda contents: contents["ema"].meta["state"].update(_init_args=None), "constructed"),
    (lambda contents: contents["ema"].meta.pop("state"), "damaged"),
    (set_argument("model_type", "DhariwalUNet"), "another network"),
    (set_argument("model_type", LAUGHS), "another network"),
    (set_argument("extra_depth", 3), "arguments: unknown key extra_depth"),
    (set_argument("model_channels", "many"), "arguments: model_channels: "),
    (set_argument("model_channels", LAUGHS), "arguments: model_channels: "),
    (set_argument("model_channels", 10**30), "arguments: model_channels: "),
    (set_argument("model_channels", 9), "groups"),
    (set_argument("num_blocks", 10**9), "arguments: num_blocks: "),
    (set_argument("num_blocks", 2), "has no weight"),
    (set_argument("channel_mult", [1] * 10**6), "arguments: channel_mult: "),
    (set_argument("channel_mult", [1, -2]), "a.pkl"),
    (set_argument("dropout", 10**400), "a.pkl"),
    (set_argument("decoder_type", "residual"), "arguments: decoder_type: "),
    (set_argument("sigma_data", -1.0), "arguments: sigma_data: "),
    (set_argument("img_resolution", None), "resolution"),
    (set_argument("img_channels", 4), "has shape"),
    (set_argument(3, 4), "names"),
    (rename_weight, "has no weight map_layer0.weight"),
    (same_module_twice, "map_layer1"),
    (module_in_itself, "no proper module"),
    (one_storage_many_times, "larger than the file"),
    (lambda contents: model_state(contents)["_modules"].update({"a\nb": torch.nn.ModuleDict()}), "proper name"),
    (lambda contents: model_state(contents).update(_modules=3), "no tree"),
    (lambda contents: model_state(contents)["_buffers"].update(count=torch.tensor([1])), "no numbers at count"),
    (lambda contents: model_state(contents)["_buffers"].update(count=torch.ones(1)), "count has no place"),
])  # fmt: skip
def test_networks_that_are_not_supported(edm, tmp_path, change, says):
    contents = edm.contents(edm.network(edm.tiny), edm.tiny)
    change(contents)
    assert says in refused(edm.write(tmp_path / "a.pkl", contents))


# -- what would do harm ------------------------------------------------------------------------------------------------


class Call:
    """Calls a function when Python unpickles it."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def global_name(module, name):
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def harmful(canary) -> dict[str, tuple[bytes, str]]:
    """name -> (a pickle that creates the canary when Python unpickles it, what the refusal must name)."""
    touch = f"touch {canary}"
    source = f"open({str(canary)!r}, 'w').close()"
    text = repr(touch).encode()
    system = [pickle.dumps(Call(os.system, touch), protocol) for protocol in range(6)]
    cases = {f"protocol {protocol}": (content, "posix.system") for protocol, content in enumerate(system)}
    cases |= {
        "inside": (pickle.dumps({"loss_fn": [Call(os.system, touch)], "ema": 1}), "posix.system"),
        "eval": (pickle.dumps(Call(eval, source)), "builtins.eval"),
        "exec": (pickle.dumps(Call(exec, source)), "builtins.exec"),
        "getattr": (pickle.dumps(Call(getattr, Call(__import__, "os"), "system")), "builtins."),
        "inst": (b"(S" + text + b"\niposix\nsystem\n.", "posix.system"),
        "obj": (b"(" + global_name("posix", "system") + b"S" + text + b"\no.", "posix.system"),
        "newobj_ex": (b"\x80\x04" + global_name("subprocess", "Popen") + b"]}\x92.", "subprocess.Popen"),
        "extension registry": (b"\x80\x02\x82\x01.", "EXT1"),
        "dotted": (b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.", "collections.OrderedDict.__init__"),
        "allowed, then not": (global_name("collections", "OrderedDict") + b")R" + system[0], "posix.system"),
        "torch.load": (pickle.dumps(Call(torch.load, str(canary))), "torch.serialization.load"),
        "newline in the name": (b"\x80\x04\x8c\x03a\nb\x8c\x01c\x93.", r"'a\nb.c'"),
    }  # fmt: skip
    nested = pickle.dumps(Call(os.system, touch))
    for name, stream in {
        "nested": nested,
        "nested behind a whole storage's head": legacy_stream(nested),
        "nested twice": pickle.dumps(Call(torch.storage._load_from_bytes, nested)),
    }.items():
        says = "_load_from_bytes" if "twice" in name else "posix.system"
        cases[name] = (pickle.dumps({"ema": Call(torch.storage._load_from_bytes, stream)}), says)
    return cases


def legacy_stream(storage: bytes, keys=("0",), count=1, data=bytes(4), magic=0x1950A86A20F9469CFC6C) -> bytes:
    """torch.save's older format around a pickled storage."""
    heads = [magic, 1001, dict(little_endian=True)]
    return b"".join(pickle.dumps(head, 2) for head in heads) + storage + pickle.dumps(list(keys), 2) + struct.pack(
        "<q", count
    ) + data  # fmt: skip


NAMES = sorted(harmful("canary"))


@pytest.mark.parametrize("name", NAMES)
def test_harm_is_refused_by_name_with_status_2_and_one_line(tmp_path, capfd, name):
    canary = tmp_path / "canary"
    content, says = harmful(canary)[name]
    path = tmp_path / "a.pkl"
    path.write_bytes(content)
    assert says in refused(path)
    capfd.readouterr()
    assert cli.main(["import-edm", str(path), "--out", str(tmp_path / "out")]) == 2
    assert says in error_line(capfd)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.pkl"]


def test_the_harm_is_real(tmp_path):
    """Python's unpickler runs it, so that the tests above show something."""
    content, _ = harmful(tmp_path / "canary")["inst"]
    pickle.loads(content)
    assert (tmp_path / "canary").exists()


def storage_pickle(identity: bytes) -> bytes:
    return b"\x80\x02" + identity + b"Q."


FLOATS = b"(U\x07storage" + global_name("torch", "FloatStorage") + b"U\x010U\x03cpuK\x01Nt"


@pytest.mark.parametrize("stream", [
    legacy_stream(storage_pickle(FLOATS), count=2**60),
    legacy_stream(storage_pickle(FLOATS), count=2),
    legacy_stream(storage_pickle(FLOATS), data=bytes(400)),
    legacy_stream(storage_pickle(FLOATS), keys=("0", "1")),
    legacy_stream(storage_pickle(FLOATS), magic=3),
    legacy_stream(storage_pickle(FLOATS.replace(b"FloatStorage", b"ComplexFloatStorage"))),
    legacy_stream(storage_pickle(FLOATS.replace(b"torch\nFloatStorage", b"torch\nload"))),
    legacy_stream(storage_pickle(FLOATS.replace(b"U\x07storage", b"U\x07garbage"))),
    legacy_stream(pickle.dumps({"weight": 1.0}, 2)),
    legacy_stream(pickle.dumps("0", 2)),
    b"",
    b"PK\x03\x04" + bytes(64),
])  # fmt: skip
def test_nested_streams_that_are_no_storage(stream):
    assert read_storage(legacy_stream(storage_pickle(FLOATS))).tolist() == [0.0]
    path = io.BytesIO(pickle.dumps(Call(torch.storage._load_from_bytes, stream)))
    with pytest.raises(Refused):
        read_pickle(path, GLOBALS)


@pytest.mark.parametrize(("offset", "size", "stride"), [
    (0, (5,), (1,)), (1, (4,), (1,)), (0, (2, 3), (3, 1)), (0, (10**6, 10**6), (0, 0)), (0, (2**40, 2**40), (0, 0)),
    (-1, (1,), (1,)), (0, (-1,), (1,)), (0, (2,), (-1,)), (0, (2,), (1, 1)), (0, ("2",), (1,)),
    (0, (2**70, 0), (1, 1)), ("0", (1,), (1,)),
])  # fmt: skip
def test_tensors_that_reach_beyond_their_storage(offset, size, stride):
    function, (storage, *_rest) = torch.zeros(4).__reduce_ex__(4)
    assert function is torch._utils._rebuild_tensor_v2
    stream = io.BytesIO(pickle.dumps(Call(function, storage, offset, size, stride, False, {})))
    with pytest.raises(Refused, match="damaged"):
        read_pickle(stream, GLOBALS)


@pytest.mark.parametrize("content", [
    b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.",  # bytes longer than any memory
    b"\x80\x04B" + struct.pack("<I", 2**32 - 1) + b"abc.",
    b"I" + b"9" * 10**6 + b"\n.",
    b"}" + b")" + b"\x85" * 200_000 + b"Ns.",  # a key that is very many nested tuples
    b"\x80\x04\x8f()" + b"\x85" * 200_000 + b"\x90.",
    b"\x80\x04\x8c\x05numpy\x8c\x05dtype\x93\x8c\x01O\x85R.",
    pickle.dumps(np.array([1.0, 2.0])),
    b"\x80\x04.",
    b"t.",
    b"\x94.",
    b"h\x07.",
    b"}]]s.",
])  # fmt: skip
def test_streams_that_would_exhaust_or_confuse_the_machine(content):
    with pytest.raises(Refused):
        read_pickle(io.BytesIO(content), GLOBALS)


def test_deep_and_sparse_data_take_no_memory():
    read_pickle(io.BytesIO(b")" + b"\x85" * 200_000 + b"."), {})  # tuples in tuples
    assert read_pickle(io.BytesIO(b"Nr" + struct.pack("<I", 2**32 - 1) + b"."), {}) is None  # a far memo slot


def test_truncated_anywhere_is_refused(edm, tmp_path):
    edm(tmp_path / "whole.pkl")
    whole, path = (tmp_path / "whole.pkl").read_bytes(), tmp_path / "a.pkl"
    cuts = [*range(1, 60), *range(60, len(whole), len(whole) // 60), *range(len(whole) - 20, len(whole))]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        refused(path)


def test_flipped_bytes_are_read_or_refused(edm, tmp_path):
    network = edm(tmp_path / "whole.pkl")
    whole, path, chance = (tmp_path / "whole.pkl").read_bytes(), tmp_path / "a.pkl", random.Random(0)
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    outcomes = {"read": 0, "refused": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of strings with strange escapes
        for _ in range(100):
            damaged = bytearray(whole)
            for _ in range(chance.choice((1, 1, 4))):
                damaged[chance.randrange(len(whole) if chance.random() < 0.3 else 12000)] = chance.randrange(256)
            path.write_bytes(damaged)
            try:
                _, weights = read_edm_pickle(path)
                assert {name: value.shape for name, value in weights.items()} == shapes
                outcomes["read"] += 1
            except InputError as error:
                assert "\n" not in str(error)
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 10, outcomes


def test_random_opcodes_end_in_data_or_refusal():
    chance, codes = random.Random(1), [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
    operands = [b"", b"\x01", b"\x00\x00\x00\x00", b"posix\nsystem\n", b"0\n", b"'a'\n", b"\x01a", b"numpy\ndtype\n"]
    for _ in range(3000):
        content = b"".join(chance.choice(codes) + chance.choice(operands) for _ in range(chance.randrange(1, 40)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read_pickle(io.BytesIO(b"(((NNN" + content + b"."), GLOBALS)
            except Refused as refusal:
                assert "\n" not in str(refusal)


def doubled(levels: int) -> bytes:
    """Opcodes for a tuple of itself and itself, and so on: small in memory, endless to print or compare."""
    pairs = (b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(levels))
    return b")q\x00" + b"".join(pairs)


def test_a_name_nested_in_itself_is_refused_at_once():
    stream = io.BytesIO(b"\x80\x04" + doubled(40) + b"h\x28\x93.")
    with pytest.raises(Refused, match="without a name"):
        read_pickle(stream, {})


def test_a_tensor_stream_nested_in_itself_is_refused_at_once():
    storage = torch.zeros(4, dtype=torch.uint8).storage().__reduce__()[1][0]
    stream = io.BytesIO(storage)
    for _ in range(4):
        list(pickletools.genops(stream))
    start = stream.tell()
    list(pickletools.genops(stream))
    keys = b"\x80\x02" + b")" + doubled(40)[1:] + b"]h\x28a."
    with pytest.raises(Refused):
        read_storage(storage[:start] + keys + storage[stream.tell() :])


def test_storages_are_not_copied_each_time_they_are_asked_for():
    storage = torch.arange(5.0).storage().__reduce__()[1][0]
    first, second = read_storage(storage), read_storage(storage)
    assert torch.equal(first, torch.arange(5.0)) and first.data_ptr() == second.data_ptr()
