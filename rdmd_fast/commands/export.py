"""``rdmd export``: a network out of any checkpoint, whatever ranks and ZeRO stage wrote it, without starting a job."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from rdmd_fast.checkpoints.engine_state import SavedEngine
from rdmd_fast.checkpoints.manifest import (
    Defect,
    check_hashes,
    checkpoint_folders,
    read_manifest,
    read_whole_manifest,
    step_of,
)
from rdmd_fast.errors import EXIT_DONE, InputError, write_error
from rdmd_fast.model_files.export_format import ExportConfig, check_replaceable, write_export
from rdmd_fast.networks.text_options import TextOptions
from rdmd_fast.paths import path_to_read, path_to_write

EPILOG = """examples:
  rdmd export runs/cats2dogs                              EMA of the newest checkpoint's generator
  rdmd export runs/cats2dogs@20000 --weights raw          its weights of step 20000 without averaging
  rdmd export runs/cats2dogs --network teacher --out teacher_of_dogs
  rdmd export runs/cats2dogs --format onnx                a generator for onnxruntime
  rdmd export runs/cats2lions/export --merge              an adapter and its pipeline's U-Net as one network
  rdmd export runs/cats2dogs/best --format torch-export --out cats2dogs.torch

The run may be training, killed or finished; nothing in it is changed but for the folder that is written.
torch-export and onnx write the generator as a graph that needs no rdmd_fast, for any batch size; what is read back is
compared with the generator, and nothing is left of one that differs. docs/translate.md has more.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "run",
        type=path_to_read,
        metavar="RUN[@STEP]",
        help="run folder; without a step, its newest whole checkpoint. Or a folder that is exported already",
    )
    parser.add_argument(
        "--network",
        choices=("generator", "teacher", "fake_score"),
        help="which one; default: what the run exports at its end. A fake score is written as a teacher is: it "
        "denoises what G makes",
    )
    parser.add_argument("--weights", choices=("ema", "raw"), help="averaged (default) or the last ones")
    parser.add_argument(
        "--format", choices=("safetensors", "torch-export", "onnx"), default="safetensors", help="(safetensors)"
    )
    parser.add_argument(
        "--merge", action="store_true", help="of an adapter over a pipeline: write the whole network, the two in one"
    )
    parser.add_argument("--license", metavar="NAME", help="for the model card (default: the run's or its teacher's)")
    parser.add_argument(
        "--out",
        type=path_to_write,
        metavar="DIR",
        help="folder (default: RUN/exports/step_STEP[_NETWORK][_raw][_merged][_FORMAT], or DIR_FORMAT, DIR_merged)",
    )


def run(arguments: argparse.Namespace) -> int:
    from rdmd_fast.model_files.model_card import model_card

    source = _named(Path(arguments.run))
    is_export = (source / "config.json").is_file() and not (source / "checkpoints").is_dir()
    network = (_from_export if is_export else _from_run)(source, arguments)
    if arguments.merge:
        network = _merged(network)
    out = _named(Path(arguments.out)) if arguments.out else network.out
    if out.resolve() == source.resolve():
        raise InputError(f"--out {out}: is what is exported, choose another folder")
    check_replaceable(out)
    graph = "" if arguments.format == "safetensors" else arguments.format
    if graph and network.config.role != "generator":
        raise InputError(f"--format {graph}: is for generators, export a {network.config.role} as safetensors")
    card = model_card(network.config, network.run, arguments.license or network.license, graph)
    try:
        note = write_network(out, network, graph, card)
    except InputError:
        raise
    except Exception as error:
        raise write_error(error, f"export {out}") or error from None
    print(f"wrote {network.name} to {out}{note}")
    return EXIT_DONE


def _named(folder: Path) -> Path:
    """``folder`` with a last part that is its name, as "." and ".." are not: its neighbours can be named, too."""
    return folder if folder.name not in ("", "..") else folder.resolve()


class Network(NamedTuple):
    """What is to be written.

    Attributes:
        run: a ``model_card.Run``, or None.
        out: where to if nobody says.
        license: as ``model_card`` takes it, if nobody says.
    """

    name: str
    config: ExportConfig
    weights: dict[str, torch.Tensor]
    run: NamedTuple | None
    out: Path
    license: str | None = None


def _from_run(source: Path, arguments: argparse.Namespace) -> Network:
    from rdmd_fast.model_files.model_card import Run, last_validation

    folder, _, step = arguments.run.rpartition("@")
    if not folder or not step.isdigit():
        folder, step = arguments.run, None
    run_dir = Path(folder)
    checkpoint = find(run_dir, None if step is None else int(step))
    manifest = read_manifest(checkpoint)
    name = arguments.network or manifest["export"]["role"]
    config, weights = read_network(checkpoint, name, arguments.weights or "ema")
    tags = (
        arguments.network,
        "raw" if arguments.weights == "raw" else None,
        "merged" if arguments.merge else None,
        _tag(arguments.format),
    )
    parts = filter(None, (checkpoint.name, *tags))
    # Validation measures the run's own product: other networks and weights have no metrics.
    own = name == manifest["export"]["role"] and arguments.weights != "raw"
    trained = manifest["config"]
    if name not in manifest["engines"]:  # the frozen teacher: another run's
        trained = {"teacher": trained["teacher"]}
    facts = Run(trained, *(last_validation(run_dir, manifest["step"]) if own else ({}, None)))
    return Network(f"{name} of step {manifest['step']}", config, weights, facts, run_dir / "exports" / "_".join(parts))


def _from_export(source: Path, arguments: argparse.Namespace) -> Network:
    from rdmd_fast.model_files.export_format import read_export
    from rdmd_fast.model_files.model_card import NAME, run_of_export, stated_license

    for flag in ("network", "weights"):
        if getattr(arguments, flag):
            raise InputError(f"--{flag} {getattr(arguments, flag)}: {source} is exported already, name its run")
    role = next((role for role in ("generator", "teacher") if (source / f"{role}.safetensors").is_file()), "generator")
    if arguments.format == "safetensors" and not arguments.out and not arguments.merge:
        raise InputError(f"{source}: is exported as safetensors already; name another --format, or --out for a copy")
    config, weights = read_export(source, role)
    out = source.with_name(f"{source.name}_{_tag(arguments.format) or 'merged'}")
    facts = run_of_export(source)
    license = (facts and facts.config.get("license")) or stated_license(source / NAME)
    return Network(f"{role} of {source}", config, weights, facts, out, license)


def _merged(network: Network) -> Network:
    from rdmd_fast.model_files.adapted import whole

    if network.config.base_sha256 is None:
        raise InputError(f"--merge: {network.name} is whole as it is, leave it out")
    config, weights = whole(network.config, network.weights, network.name)
    return network._replace(config=config, weights=weights)


def _tag(format: str) -> str | None:
    return {"torch-export": "torch", "onnx": "onnx"}.get(format)


def write_network(out: Path, network: Network, graph: str, card: str) -> str:
    """Write an export; returns what there is to say of it. InputError for a graph that is not the generator."""
    if not graph:
        write_export(out, network.config, network.weights, card)
        return ""
    from rdmd_fast.model_files.export_format import write_folder
    from rdmd_fast.model_files.graph_export import BATCHES, write_graph
    from rdmd_fast.model_files.models import Generator
    from rdmd_fast.model_files.weights import rebuild

    generator = Generator(rebuild(network.config, network.weights, network.name), network.config).eval()
    differences = []
    write_folder(out, network.config, lambda partial: differences.append(write_graph(generator, graph, partial)), card)
    sizes = ", ".join(map(str, BATCHES))
    return f"; it differs from the generator by {differences[0]:.2g} at most, for batches of {sizes}"


def find(run_dir: Path, step: int | None = None) -> Path:
    """The folder of a run's checkpoint: of ``step``, or the newest one with all its files.

    Raises:
        InputError: there is none.
    """
    folders = checkpoint_folders(run_dir / "checkpoints")
    if not folders:
        raise InputError(f"{run_dir}: no checkpoints there, name a run folder")
    if step is not None:
        chosen = [folder for folder in folders if step_of(folder) == step]
        if not chosen:
            there = ", ".join(str(step_of(folder)) for folder in reversed(folders))
            raise InputError(f"{run_dir}: has no checkpoint of step {step}, there are {there}")
        folders = chosen
    defects = []
    for folder in folders:
        try:
            read_whole_manifest(folder)
            return folder
        except Defect as defect:
            defects.append(f"{folder.name}: {defect}")
    raise InputError(f"{run_dir}: no whole checkpoint ({'; '.join(defects[:3])})")


def read_network(checkpoint: Path, name: str, weights: str = "ema") -> tuple[ExportConfig, dict[str, torch.Tensor]]:
    """A network of a checkpoint as an export: its configuration and fp32 state dict.

    Args:
        name: "generator", "teacher" or "fake_score".
        weights: "ema", or "raw" for those of the last step.

    Raises:
        InputError: the run has no such network, or no average of it; or the checkpoint's files are damaged.
    """
    manifest = read_manifest(checkpoint)
    engines, config = manifest["engines"], manifest["config"]
    if name == "teacher" and name not in engines:
        return _frozen_teacher(checkpoint, config["teacher"])
    if name not in engines:
        raise InputError(f"{checkpoint}: holds no {name}, only {', '.join(engines)}")
    if weights == "ema" and not engines[name]["has_ema"]:
        raise InputError(f"{checkpoint}: {name} is not averaged, ask for --weights raw")
    try:
        check_hashes(
            checkpoint, {file: entry for file, entry in manifest["files"].items() if file.startswith(f"{name}/")}
        )
    except Defect as defect:
        raise InputError(f"{checkpoint}: {defect}, export another step") from None
    values = manifest["export"] | {"step": manifest["step"]}
    export = ExportConfig.parse(values, f"{checkpoint}: export", remedy=", export another step")
    if name == "fake_score":
        export = _fake_score_config(config, export)
    kind = "ema" if weights == "ema" else "master"
    state = SavedEngine(checkpoint / name).whole(kind, engines[name]["parameters"])
    return export, _exported(config, state)


def _exported(config: dict, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of an export from a state dict in training."""
    if not config.get("lora"):
        return state
    from rdmd_fast.model_files.adapted import exported
    from rdmd_fast.model_files.teachers import read_teacher, read_teacher_config
    from rdmd_fast.networks.adapters import adapter_of
    from rdmd_fast.networks.text_options import LoRAOptions

    beneath = {}
    if read_teacher_config(config["teacher"]).base_sha256:  # else a pipeline, of gigabytes without an adapter
        beneath = adapter_of(read_teacher(config["teacher"])[1])
    return exported(state, LoRAOptions(**config["lora"]), beneath)


def _frozen_teacher(checkpoint: Path, source: str) -> tuple[ExportConfig, dict[str, torch.Tensor]]:
    from rdmd_fast.model_files.teachers import read_teacher

    if source == "analytic":
        raise InputError(f"{checkpoint}: its teacher is a closed form, there is no network to export")
    config, weights = read_teacher(source)
    if isinstance(config.network, TextOptions):
        raise InputError(f"{checkpoint}: its teacher is the pipeline {source}, which is whole as it is: use that")
    return config, weights


def _fake_score_config(config: dict, generator: ExportConfig) -> ExportConfig:
    """The fake score's network is the teacher's, or that of the config's section ``network`` for a toy."""
    from rdmd_fast.model_files.teachers import read_teacher_config

    values = generator.model_dump(mode="json") | {"role": "teacher", "reading": None, "generator_sigma": None}
    if config["teacher"] == "analytic":
        return ExportConfig.model_validate(values | {"network": config["network"]})
    if isinstance(generator.network, TextOptions):  # of the size of the data, not of the pipeline's own
        return ExportConfig.model_validate(values)
    teacher = read_teacher_config(config["teacher"])
    own = {name: getattr(generator, name) for name in ("step", "target_class", "transport_weights")}
    return teacher.model_copy(update=own)
