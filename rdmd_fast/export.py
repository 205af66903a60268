"""``rdmd export``: a network out of any checkpoint, whatever ranks and ZeRO stage wrote it, without starting a job."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .engine_state import SavedEngine
from .errors import InputError
from .manifest import Defect, check_hashes, checkpoint_folders, read_manifest, read_whole_manifest, step_of
from .networks.exported import ExportConfig, write_export
from .runtime import EXIT_DONE, write_error

EPILOG = """examples:
  rdmd export runs/cats2dogs                              EMA of the newest checkpoint's generator
  rdmd export runs/cats2dogs@20000 --weights raw          its weights of step 20000 without averaging
  rdmd export runs/cats2dogs --network teacher --out teacher_of_dogs

The run may be training, killed or finished; nothing in it is changed but for the folder that is written.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("run", metavar="RUN[@STEP]", help="run folder; without a step, its newest whole checkpoint")
    parser.add_argument(
        "--network",
        choices=("generator", "teacher", "fake_score"),
        help="which one; default: what the run exports at its end. A fake score is written as a teacher is: it "
        "denoises what G makes",
    )
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged (default) or the last ones")
    parser.add_argument("--out", metavar="DIR", help="export folder (default: RUN/exports/step_STEP[_NETWORK][_raw])")


def run(arguments: argparse.Namespace) -> int:
    folder, _, step = arguments.run.rpartition("@")
    if not folder or not step.isdigit():
        folder, step = arguments.run, None
    run_dir = Path(folder)
    checkpoint = find(run_dir, None if step is None else int(step))
    manifest = read_manifest(checkpoint)
    name = arguments.network or manifest["export"]["role"]
    config, weights = read_network(checkpoint, name, arguments.weights)
    parts = (checkpoint.name, arguments.network, "raw" if arguments.weights == "raw" else None)
    out = Path(arguments.out) if arguments.out else run_dir / "exports" / "_".join(filter(None, parts))
    if out.exists() and not (out / "config.json").exists():
        raise InputError(f"--out {out}: exists and is no export, choose another folder")
    try:
        write_export(out, config, weights)
    except Exception as error:
        raise write_error(error, f"export {out}") or error from None
    print(f"wrote {name} of step {manifest['step']} to {out}")
    return EXIT_DONE


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
    export = ExportConfig.model_validate(manifest["export"] | {"step": manifest["step"]})
    if name == "fake_score":
        export = _fake_score_config(config, export)
    kind = "ema" if weights == "ema" else "master"
    return export, SavedEngine(checkpoint / name).whole(kind, engines[name]["parameters"])


def _frozen_teacher(checkpoint: Path, source: str) -> tuple[ExportConfig, dict[str, torch.Tensor]]:
    from .networks.teachers import read_teacher

    if source == "analytic":
        raise InputError(f"{checkpoint}: its teacher is a closed form, there is no network to export")
    return read_teacher(source)


def _fake_score_config(config: dict, generator: ExportConfig) -> ExportConfig:
    """The fake score's network is the teacher's, or that of the config's section ``network`` for a toy."""
    from .networks.teachers import read_teacher_config

    values = generator.model_dump(mode="json") | {"role": "teacher", "reading": None, "generator_sigma": None}
    if config["teacher"] == "analytic":
        return ExportConfig.model_validate(values | {"network": config["network"]})
    teacher = read_teacher_config(config["teacher"])
    own = {name: getattr(generator, name) for name in ("step", "target_class", "transport_weights")}
    return teacher.model_copy(update=own)
