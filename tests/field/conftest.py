"""What the cases share: a generator that changes nothing, and commands in this process."""

import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from material import generator_of, small_unet

from rdmd_fast import cli
from rdmd_fast.model_files.export_format import write_export


class Done(NamedTuple):
    """A command's exit status and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Export of the identity on 8×8 RGB images."""
    config, network = generator_of(small_unet(1), (3, 8, 8))
    weights = {
        name: torch.zeros_like(each) if "aux_conv" in name else each for name, each in network.state_dict().items()
    }
    folder = tmp_path_factory.mktemp("model") / "export"
    write_export(folder, config, weights)
    return folder


@pytest.fixture
def rdmd(capfd):
    """``rdmd(word, …)`` runs a command in this process."""

    def run(*words) -> Done:
        capfd.readouterr()
        status = cli.main(list(map(str, words)))
        return Done(status, *capfd.readouterr())

    return run


@pytest.fixture
def translate(rdmd, model):
    return lambda source, output, *more: rdmd(
        "translate", "--model", model, "--input", source, "--output", output, "--device", "cpu", *more
    )


@pytest.fixture
def shared():
    """A folder that every account may enter, as pytest's own are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)
