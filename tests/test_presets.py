"""The shipped configurations and the commands of the documentation beside them."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from rdmd_fast.cli import COMMANDS
from rdmd_fast.config import load_config
from rdmd_fast.engine.batch_layout import BatchLayout
from rdmd_fast.networks import build_network
from rdmd_fast.processes.world import World

ROOT = Path(__file__).parent.parent
FILES = sorted(path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml"))
CONFIGS = [name for name in FILES if not name.endswith("study.yaml")]  # of a training
SMALL = [name for name in CONFIGS if name.endswith("_24gb.yaml")]
DOCUMENTS = (
    "docs/datasets.md",
    "docs/teachers.md",
    "README.md",
    "docs/text_teachers.md",
    "docs/figures.md",
    "docs/conditional.md",
)

# (sample shape, parameters in millions) of the networks that configurations of each folder describe.
NETWORKS = {
    "digits/teacher_3.yaml": ((3, 8, 8), 0.75),
    "images/teacher.yaml": ((3, 64, 64), 61.8),
    "celeba/teacher_female_64.yaml": ((3, 64, 64), 61.8),
    "celeba/teacher_female_128.yaml": ((3, 128, 128), 50.9),
    "latent/teacher_256.yaml": ((4, 32, 32), 116.1),
    "mnist/teacher_3.yaml": ((3, 32, 32), 7.0),
}


def load(name, *overrides):
    return load_config(str(ROOT / "configs" / name), list(overrides))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_falls_evenly_on_one_gpu_and_on_eight(name):
    config = load(name)
    BatchLayout.of(config.train, World(0, 1, torch.device("cpu")))
    BatchLayout.of(load(name, "train.micro_batch_size=null").train, World(0, 8, torch.device("cpu")))


@pytest.mark.parametrize("name", CONFIGS)
def test_networks_build_and_keep_the_shape_of_their_samples(name):
    config = load(name)
    if config.network is None:
        assert config.teacher is not None and config.teacher != "analytic"
        return
    toy = config.network.kind == "mlp"
    shape, millions = ((2,), None) if toy else NETWORKS[name.replace("_24gb", "")]
    with torch.device("meta"):
        network = build_network(config.network, shape)
        output = network(torch.empty(2, *shape), torch.empty(2))
    assert output.shape == (2, *shape)
    if millions:
        assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("name", [name for name in CONFIGS if "/rdmd_" in name])
def test_the_teacher_of_a_distillation_is_made_by_the_configuration_beside_it(name):
    config = load(name)
    assert config.stage == "rdmd"
    beside = [load(other) for other in CONFIGS if other.split("/")[0] == name.split("/")[0]]
    made = [other for other in beside if other.stage == "teacher" and f"{other.run_dir}/export" == config.teacher]
    assert made
    for teacher in made:
        assert teacher.data.flip == config.data.flip
        # Held-out targets are of the domain that the teacher learns.
        assert Path(teacher.data.target).parent == Path(config.data.target_holdout).parent


@pytest.mark.parametrize("name", SMALL)
def test_24_gb_presets_differ_in_the_micro_batch_alone(name):
    small, large = load(name), load(name.replace("_24gb", ""))
    assert small.train.micro_batch_size < large.train.micro_batch_size
    same = small.train.model_copy(update={"micro_batch_size": large.train.micro_batch_size})
    assert small.model_copy(update={"train": same}) == large


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.split("/")[0] in ("afhqv2", "celeba")])
def test_large_presets_have_a_24_gb_sibling(name):
    assert name.replace("_24gb", "").replace(".yaml", "_24gb.yaml") in SMALL


@pytest.mark.parametrize(
    "name", [name for name in CONFIGS if name.split("/")[0] in ("afhqv2", "celeba", "latent", "mnist")]
)
def test_every_value_of_a_preset_is_explained(name):
    """Each line with a value of the algorithm has its origin beside it; 24 GB presets point at their sibling."""
    text = (ROOT / "configs" / name).read_text()
    if name in SMALL:
        assert text.splitlines()[0].startswith(f"# {Path(name).name.replace('_24gb', '')} for one 24 GB GPU")
        return
    explained = ("data", "network", "diffusion", "rdmd", "teacher_stage", "train")
    section = ""
    for line in text.splitlines():
        top = re.match(r"(\w+):", line)
        section = top[1] if top else section
        inside = re.match(r"  (\w+): ", line)
        plain = section == "data" and inside and inside[1].startswith(("source", "target"))
        if inside and section in explained and not plain:
            assert re.search(r"  ?# \S", line), line


def commands(document):
    """The indented shell commands of a document, words split, loop variables set to one of their values."""
    variables = {}
    for line in (ROOT / document).read_text().splitlines():
        if not line.startswith("    ") or line.strip().startswith(("#", "rdmd_fast/")):
            continue
        for loop in re.finditer(r"for (\w+) in (\w+)", line):
            variables[loop[1]] = loop[2]
        for variable, value in variables.items():
            line = line.replace(f"${variable}", value)
        yield shlex.split(line.strip(), comments=True)


DOCUMENTED = [(document, words) for document in DOCUMENTS for words in commands(document) if words]


@pytest.mark.parametrize(
    "words", [words for _, words in DOCUMENTED if words[0] == "rdmd"], ids=lambda words: " ".join(words[1:3])
)
def test_documented_commands_are_understood(words):
    parser = argparse.ArgumentParser()
    importlib.import_module(COMMANDS[words[1]][0]).add_arguments(parser)
    parser.parse_args(words[2:])


TRAININGS = [words for _, words in DOCUMENTED if "rdmd_fast/train.py" in words and "…]" not in words]


@pytest.mark.parametrize("words", TRAININGS, ids=lambda words: words[words.index("--config") + 1])
def test_documented_trainings_have_valid_configurations(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    overrides = [word for word in words if "=" in word]
    if any(value in words for value in ("rdmd.weighting=W",)):
        return
    load_config(words[words.index("--config") + 1], overrides)


def test_the_documents_are_seen():
    counts = [sum(document == seen for seen, _ in DOCUMENTED) for document in DOCUMENTS]
    assert counts[0] > 25 and counts[1] > 8 and len(TRAININGS) > 12


def test_every_preset_is_documented():
    text = "".join((ROOT / document).read_text() for document in DOCUMENTS)
    for name in CONFIGS:
        if name not in SMALL and name.split("/")[0] not in ("toy", "digits"):  # those are the Makefile's
            assert f"configs/{name}" in text, name


def test_shards_of_the_presets_are_those_that_the_commands_pack():
    """data.* paths of the presets lie below an --out of the page that explains them."""
    page = (ROOT / "docs/datasets.md").read_text()
    packed = [re.sub(r"\$\w+", r"[^/]+", out) for out in re.findall(r"--out (shards/\S+)", page)]
    for name in CONFIGS:
        if name.split("/")[0] not in ("afhqv2", "celeba", "latent", "mnist"):
            continue
        data = yaml.safe_load((ROOT / "configs" / name).read_text())["data"]
        for path in (value for value in data.values() if isinstance(value, str)):
            assert any(re.match(f"{out}(/|$)", path) for out in packed), (name, path)


def test_the_paper_budget_is_what_its_commands_pack():
    """Head comments of the 2-D presets pack 5,000 points of each domain, of the toys of the analytic preset."""
    teacher, rdmd = load("toy/paper_teacher_8gaussians.yaml"), load("toy/paper_rdmd_8gaussians.yaml")
    parser = argparse.ArgumentParser()
    importlib.import_module(COMMANDS["pack"][0]).add_arguments(parser)
    packed, trained = {}, []
    for name in ("paper_teacher_8gaussians", "paper_rdmd_8gaussians"):
        for line in (ROOT / f"configs/toy/{name}.yaml").read_text().splitlines():
            words = shlex.split(line.removeprefix("#")) if line.startswith("#   ") else [""]
            if words[0] == "rdmd":
                arguments = parser.parse_args(words[2:])
                packed[str(arguments.out)] = arguments
            elif words[0] == "python":
                trained.append(words[-1])
    assert trained == ["configs/toy/paper_teacher_8gaussians.yaml", "configs/toy/paper_rdmd_8gaussians.yaml"]
    assert rdmd.teacher == f"{teacher.run_dir}/export"
    assert set(packed) == {teacher.data.target, rdmd.data.source, rdmd.data.source_holdout, rdmd.data.target_holdout}
    assert packed[teacher.data.target].count == packed[rdmd.data.source].count == 5000
    # One seed draws the same normals for every toy: domains and splits are independent only at different seeds.
    assert len({arguments.seed for arguments in packed.values()}) == len(packed)
    analytic = load("toy/gaussian_to_8gaussians.yaml")
    for folder in (teacher.data.target, rdmd.data.target_holdout):
        arguments, toy = packed[folder], analytic.data.target
        assert (arguments.source, arguments.scale, arguments.std) == (f"toy:{toy.toy}", toy.scale, toy.std)
    assert {packed[folder].source for folder in (rdmd.data.source, rdmd.data.source_holdout)} == {"toy:gaussian"}
    assert rdmd.validation.count >= packed[rdmd.data.target_holdout].count
