"""Generators as graphs of plain operators: parity, free batch size, and no trace of this package or machine."""

import subprocess
import sys
from pathlib import Path

import material
import pytest
import torch
from material import error_line

from rdmd_fast import cli, load_generator
from rdmd_fast.model_files import graph_export
from rdmd_fast.model_files.export_format import write_export
from rdmd_fast.model_files.graph_export import FILES, write_graph
from rdmd_fast.model_files.models import Generator

ROOT = Path(__file__).parents[2]
UNET = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
RANGE = {"transport_weights": [0.01, 2.0]}
NETWORKS = {
    "mlp": ({"kind": "mlp", "hidden": 16, "depth": 2}, [2], {"reading": "mlp"}),
    "mlp_any_weight": ({"kind": "mlp", "hidden": 16, "depth": 2}, [2], {"reading": "mlp", **RANGE}),
    "song_of_one_level": ({"kind": "song_unet", **UNET, "channel_mult": [1]}, [3, 4, 4], {}),
    "song": ({"kind": "song_unet", "augment_dim": 9, **UNET}, [3, 8, 8], {}),
    "song_any_weight": ({"kind": "song_unet", **UNET}, [3, 8, 8], RANGE),
    "ncsnpp": (
        {"kind": "song_unet", "embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2,
         "resample_filter": [1, 3, 3, 1], **UNET}, [3, 8, 8], {}),
    "adm": ({"kind": "dhariwal_unet", "label_dim": 3, **UNET, "model_channels": 32}, [3, 8, 8], {"target_class": 1}),
}  # fmt: skip
SLOW, FAST = pytest.mark.slow, ("mlp_any_weight", "song_of_one_level")


def generator_of(name: str) -> Generator:
    network, shape, more = NETWORKS[name]
    config, model = material.generator_of(network, shape, **{"reading": "teacher", **more})
    with torch.no_grad():
        for parameter in model.parameters():  # layers that begin at zero would hide what comes before them
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Generator(model, config).eval().requires_grad_(False)


# Loads what it is given in a process of its own that has no rdmd_fast.
STRANGER = """
import sys
sys.modules["rdmd_fast"] = None  # an import of it is an error
path, inputs, output = sys.argv[1:]
import torch
from safetensors.torch import load_file, save_file
given = list(load_file(inputs).values())
if path.endswith(".onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession(path)
    names = [each.name for each in session.get_inputs()]
    assert names == ["images", "transport_weight"][:len(given)], names
    result = torch.from_numpy(session.run(None, dict(zip(names, [each.numpy() for each in given])))[0])
else:
    result = torch.export.load(path).module()(*given)
save_file({"y": result.contiguous()}, output)
"""


@pytest.mark.parametrize(("name", "kind"), [
    ("mlp_any_weight", "torch-export"),
    ("song_of_one_level", "torch-export"),
    *(pytest.param(name, "torch-export", marks=SLOW) for name in NETWORKS if name not in FAST),
    *(pytest.param(name, "onnx", marks=SLOW) for name in NETWORKS),
])  # fmt: skip
def test_graph_is_the_generator(tmp_path, name, kind):
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    generator = generator_of(name)
    assert write_graph(generator, kind, tmp_path) < 1e-5
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    assert path.name == FILES[kind] and b"rdmd_fast" not in content and str(ROOT).encode() not in content
    read = {"torch-export": graph_export._read_torch, "onnx": graph_export._read_onnx}[kind](path)
    for count in (1, 3, 4):
        inputs = torch.rand(count, *generator.config.sample_shape) * 2 - 1
        weights = [] if generator.transport_weights is None else [torch.linspace(0.02, 1.5, count)]
        torch.testing.assert_close(read(inputs, *weights), generator(inputs, *weights), rtol=1e-4, atol=1e-5)
    if kind == "onnx":
        import onnx

        model = onnx.load(path)
        assert {each.domain for each in model.opset_import} <= {""} and not model.functions
    else:
        operators = {node.target.namespace for node in torch.export.load(path).graph.nodes
                     if isinstance(node.target, torch._ops.OpOverload)}  # fmt: skip
        assert operators == {"aten"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_graph_runs_without_this_package(tmp_path, kind):
    from safetensors.torch import load_file, save_file

    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    generator = generator_of("song_any_weight")
    write_graph(generator, kind, tmp_path)
    inputs = {"0": torch.rand(3, 3, 8, 8) * 2 - 1, "1": torch.tensor([0.01, 0.1, 2.0])}
    save_file(inputs, tmp_path / "inputs")
    arguments = [sys.executable, "-c", STRANGER, tmp_path / FILES[kind], tmp_path / "inputs", tmp_path / "output"]
    subprocess.run(arguments, cwd=tmp_path, env={}, check=True)
    expected = generator(inputs["0"], inputs["1"])
    torch.testing.assert_close(load_file(tmp_path / "output")["y"], expected, rtol=1e-4, atol=1e-5)


def test_weights_beyond_the_range_are_cut_to_it():
    generator = generator_of("mlp_any_weight")
    graph, x = graph_export.Graph(generator), torch.rand(2, 2)
    found = graph(x, torch.tensor([1e-5, 100.0]))
    torch.testing.assert_close(found, generator(x, torch.tensor([0.01, 2.0])))


def test_another_function_is_not_written(tmp_path, monkeypatch, capsys):
    write_export(tmp_path / "export", generator_of("mlp").config, generator_of("mlp").model.state_dict())
    trained = graph_export.Graph.forward
    monkeypatch.setattr(graph_export.Graph, "forward", lambda self, images: trained(self, images) + 0.01)
    command = ["export", str(tmp_path / "export"), "--format", "torch-export"]
    assert cli.main(command) == 2
    assert "differs from the generator by 0.0" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    monkeypatch.setattr(graph_export.Graph, "forward", trained)
    assert cli.main(command) == 0
    assert "differs from the generator by 0 at most" in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "export_torch").iterdir()}
    assert written == {"README.md", "config.json", "generator.pt2"}
    assert "torch.export.load" in (tmp_path / "export_torch/README.md").read_text()


def test_kernels_of_ours_are_no_plain_operators():
    class Foreign(torch.nn.Module):
        def forward(self, x):
            parameters = x.new_ones(8), x.new_ones(8), 2, 1e-5
            return torch.ops.rdmd_fast.group_norm_silu(x, *parameters, None, None, None, True, None)

    program = torch.export.export(Foreign(), (torch.zeros(1, 8, 4, 4),))
    with pytest.raises(graph_export.InputError, match="no operator of PyTorch"):
        graph_export.plain_operators(program)


def test_references_are_traced_whatever_the_environment_says(monkeypatch):
    import os

    monkeypatch.setenv("RDMD_KERNELS", "triton")
    with graph_export.reference_kernels():
        assert os.environ["RDMD_KERNELS"] == "reference"
    assert os.environ["RDMD_KERNELS"] == "triton"
    monkeypatch.delenv("RDMD_KERNELS")
    with graph_export.reference_kernels():
        pass
    assert "RDMD_KERNELS" not in os.environ


def test_missing_packages_and_wrong_roles_are_one_line(tmp_path, monkeypatch, capsys):
    generator = generator_of("mlp")
    write_export(tmp_path / "export", generator.config, generator.model.state_dict())
    teacher = generator.config.model_copy(update={"role": "teacher", "reading": None, "generator_sigma": None})
    write_export(tmp_path / "teacher", teacher, generator.model.state_dict())
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    for arguments, message in (
        (["export", "--format", "onnx"], "run `pip install rdmd_fast[onnx]`"),
        (["teacher", "--format", "torch-export"], "is for generators"),
        (["export"], "is exported as safetensors already"),
        (["export", "--weights", "raw", "--format", "onnx"], "name its run"),
        (["export", "--out", "{}/export"], "choose another folder"),
    ):
        command = ["export", str(tmp_path / arguments[0]), *(each.format(tmp_path) for each in arguments[1:])]
        assert cli.main(command) == 2
        assert message in error_line(capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"export", "teacher"}


def test_copy_of_an_export_has_a_card(tmp_path):
    generator = generator_of("mlp")
    write_export(tmp_path / "export", generator.config, generator.model.state_dict())
    assert cli.main(["export", str(tmp_path / "export"), "--out", str(tmp_path / "copy"), "--license", "mit"]) == 0
    assert "license: mit\n" in (tmp_path / "copy/README.md").read_text()
    x = torch.rand(3, 2)
    assert load_generator(tmp_path / "copy")(x).equal(generator(x))
    # Its licence goes on, unless somebody states another.
    for more, license in (([], "mit"), (["--license", "apache-2.0"], "apache-2.0")):
        assert cli.main(["export", str(tmp_path / "copy"), "--out", str(tmp_path / "again"), *more]) == 0
        assert f"license: {license}\n" in (tmp_path / "again/README.md").read_text()
    (tmp_path / "config.yaml").write_text("stage: rdmd\nlicense: bsd-2-clause\n")  # of the run that it stands in
    assert cli.main(["export", str(tmp_path / "copy"), "--out", str(tmp_path / "of_run")]) == 0
    assert "license: bsd-2-clause\n" in (tmp_path / "of_run/README.md").read_text()


def test_only_exports_are_replaced(tmp_path, capsys):
    generator = generator_of("mlp")
    for name in ("export", "clone", "nested"):
        write_export(tmp_path / name, generator.config, generator.model.state_dict(), "card")
    (tmp_path / "clone/.git").mkdir()
    (tmp_path / "nested/generator.onnx.d").mkdir()
    (tmp_path / "unet").mkdir()  # of a diffusers teacher
    (tmp_path / "unet/config.json").write_text('{"_class_name": "UNet2DModel"}')
    (tmp_path / "file").write_text("mine")

    def there():
        return {path.relative_to(tmp_path): path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    before = there()
    for name, message in (
        ("clone", "holds more than an export (.git)"),
        ("nested", "holds more than an export (generator.onnx.d)"),
        ("unet", "exists and is no export"),
        ("file", "exists and is no export"),
    ):
        assert cli.main(["export", str(tmp_path / "export"), "--out", str(tmp_path / name)]) == 2
        said = error_line(capsys)
        assert message in said and "choose another folder" in said
    assert there() == before
    teacher = generator.config.model_copy(update={"role": "teacher", "reading": None, "generator_sigma": None})
    write_export(tmp_path / "old", teacher, generator.model.state_dict(), "card")
    (tmp_path / "old/generator.onnx.data").write_bytes(b"")
    assert cli.main(["export", str(tmp_path / "export"), "--out", str(tmp_path / "old")]) == 0
    assert {path.name for path in (tmp_path / "old").iterdir()} == {"README.md", "config.json", "generator.safetensors"}


def test_the_folder_that_one_is_in(tmp_path, monkeypatch, capsys):
    generator = generator_of("mlp")
    for name in ("export", "old"):
        write_export(tmp_path / name, generator.config, generator.model.state_dict())
    monkeypatch.chdir(tmp_path / "export")
    assert cli.main(["export", ".", "--format", "torch-export"]) == 0
    assert (tmp_path / "export_torch/generator.pt2").is_file()
    assert cli.main(["export", ".", "--out", "."]) == 2
    assert "is what is exported" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path / "old")
    assert cli.main(["export", "../export", "--out", "."]) == 0
    assert (tmp_path / "old/README.md").is_file()
