"""Training runs as points of a study: what they depend on is hashed, so that other data or teachers make new points."""

import hashlib
import json
import time
from pathlib import Path

import yaml

from rdmd_fast.baselines.energy import EnergyTrainingOptions
from rdmd_fast.config import Config
from rdmd_fast.errors import InputError
from rdmd_fast.files import sha256_of, write_atomically
from rdmd_fast.studies.jobs import Job, train_run

EXPORT = "run/export"  # below the folder of a training point


def digest(path: str | Path, pattern: str = "**/*") -> str:
    """SHA-256 over names and contents of a file, or of the files of a folder that match; hidden ones do not count.

    Raises:
        InputError: nothing there.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(file for file in path.glob(pattern) if file.is_file())
    files = [file for file in files if not file.name.startswith(".")]
    if not files:
        raise InputError(f"{path}: no such file or folder of files")
    hashes = [(file.relative_to(path).as_posix(), sha256_of(file)) for file in files]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def data_digest(folder: str | Path) -> str | None:
    """Digest of packed sets by their manifests, which hold the hashes of their shards; None for other data."""
    path = Path(folder)
    packed = path.is_dir() and next(path.glob("**/manifest.json"), None)
    return digest(path, "**/manifest.json") if packed else None


def file_reference(path: str) -> dict:
    """A model that the user names, by its contents."""
    return {"path": str(path), "sha256": digest(path)}


def job_reference(point: Job, study: Path, result: dict) -> dict:
    """The export of a training point of the same study."""
    return {"point": point.folder(study).name, "sha256": result["sha256"]}


def referred(reference: dict, folder: Path) -> str:
    """Path of a referenced model, seen from a point's folder."""
    return reference["path"] if "path" in reference else str(folder.parent / reference["point"] / EXPORT)


def training_job(name: str, config: Config, teacher: dict | None = None) -> Job:
    """A point that trains ``config``, its run_dir aside.

    Args:
        teacher: reference of the teacher in place of the path in ``config``; None where that is none, or ``analytic``.
    """
    plain = config.model_dump(mode="json", exclude={"run_dir"} | ({"teacher"} if teacher else set()))
    named = [
        plain["data"].get(key) for key in ("source", "target", "source_holdout", "target_holdout")
    ] + [plain["validation"]["judge"]]  # fmt: skip
    data = {folder: data_digest(folder) for folder in named if isinstance(folder, str)}
    return Job(name, "train", train, {"config": plain, "teacher": teacher, "data": data})


def train(folder: Path, settings: dict) -> dict:
    """Work of a training point.

    Returns:
        ``sha256`` of the export, ``training_steps``, ``training_seconds`` between the first and the last iteration,
        ``validation`` at the end (None without held-out data).
    """
    values = settings["config"] | {"run_dir": str(folder / "run")}
    if settings["teacher"]:
        values["teacher"] = referred(settings["teacher"], folder)
    write_atomically(folder / "config.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    train_run(str(folder / "config.yaml"), [], folder / "run")
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    validations = [line["validation"] for line in lines if "validation" in line]
    return {
        "sha256": digest(folder / EXPORT),
        "training_steps": settings["config"]["train"]["steps"],
        "training_seconds": sum(line["seconds"]["interval"] for line in lines if "seconds" in line),
        "validation": validations[-1] if validations else None,
    }


def energy_job(options: EnergyTrainingOptions, source: str, target: str, seed: int = 0) -> Job:
    """A point that trains EGSDE's energy network on the shards of two domains."""
    data = {"source": [source, data_digest(source)], "target": [target, data_digest(target)]}
    return Job(
        "energy", "train energy", train_energy, {"energy": options.model_dump(mode="json"), "seed": seed, **data}
    )


def train_energy(folder: Path, settings: dict) -> dict:
    """Work of an energy point. Returns ``sha256`` of the export, ``training_seconds`` and ``accuracy``."""
    from rdmd_fast.baselines import energy
    from rdmd_fast.model_files.export_format import write_export
    from rdmd_fast.processes.devices import pick_device

    options = energy.EnergyTrainingOptions.model_validate(settings["energy"])
    folders = [settings[role][0] for role in ("source", "target")]
    start = time.perf_counter()
    network, accuracy = energy.train_on_shards(options, *folders, settings["seed"], pick_device("auto"))
    seconds = time.perf_counter() - start
    write_export(folder / EXPORT, network.config, network.model.state_dict())
    return {"sha256": digest(folder / EXPORT), "training_seconds": seconds, "accuracy": accuracy}
