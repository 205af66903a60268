"""The trainings and measurements that a study asks for, as points in OUT/points: shared by the figures made of it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rdmd_fast.baselines.options import NEEDS_SOURCE_TEACHER
from rdmd_fast.config import Config, load_config
from rdmd_fast.errors import InputError
from rdmd_fast.extras import require
from rdmd_fast.monitoring.drawing import GREEK
from rdmd_fast.studies.jobs import Job, run_jobs
from rdmd_fast.studies.measurement_jobs import measure
from rdmd_fast.studies.options import (
    FigureOptions,
    StudyOptions,
    TeacherOptions,
    TrainingOptions,
    load_study,
    shipped_config,
)
from rdmd_fast.studies.training_jobs import (
    data_digest,
    digest,
    energy_job,
    file_reference,
    job_reference,
    training_job,
)

RDMD, IDENTITY = "RDMD", "identity"
BASELINES = {
    "sdedit": "SDEdit", "ilvr": "ILVR", "egsde": "EGSDE", "ddib": "DDIB", "cyclediffusion": "CycleDiffusion"
}  # fmt: skip
DRAW_NO_NOISE = ("ddib",)  # the same with every seed: measured once


class Candidate(NamedTuple):
    """A translation to measure.

    Attributes:
        method: its name in tables.
        setting: of the method, in words.
        seed: which of its repetitions.
        model: what ``measurement_jobs.translator`` takes.
        training: result of its training point, if it has one.
    """

    method: str
    setting: str
    seed: int
    model: dict
    training: dict | None = None


class StudyRuns:
    """A study at work: every method computes what is not there yet and returns results, or references to them.

    Args:
        out: folder of the figures; points lie in ``out/points``.
        options: seeds, jobs, and the study file (None: configs/digits/study.yaml).
    """

    def __init__(self, out: Path, options: FigureOptions):
        self.path = options.study or shipped_config("digits/study.yaml")
        self.study: StudyOptions = load_study(self.path)
        self.folder, self.jobs, self.seeds = Path(out) / "points", options.jobs, range(options.seeds)
        self.pack = options.pack
        self._teachers: dict[str, dict] = {}
        self._check()

    def _check(self) -> None:
        """What would stop the study is found before anything is packed or trained.

        Raises:
            InputError: a configuration, a package or a file that the study names is missing.
        """
        study = self.study
        for role, teacher in study.teachers:
            if teacher is not None and teacher.config is not None:
                self._teacher_config(role, teacher)
        for options in (study.rdmd, study.conditioned):
            if options is not None:
                self.training_config(options, 0)
        require("skimage.metrics", "eval")
        if study.features:
            digest(study.features)
        pack_missing(study, self.path, self.pack)
        if study.judge:
            require("sklearn.neighbors", "eval")
            if not (Path(study.judge) / str(study.judge_label) / "train").is_dir():
                raise InputError(f"study {self.path}: judge {study.judge}: has no shards {study.judge_label}/train")

    def run(self, points: list[Job]) -> list[dict]:
        return run_jobs(points, self.folder, self.jobs)

    def teachers(self) -> dict[str, dict]:
        """References of the teachers by domain, ``target`` and, if the study has one, ``source``."""
        if self._teachers:
            return self._teachers
        wanted = {role: teacher for role, teacher in self.study.teachers if teacher is not None}
        trained = {
            role: training_job(f"teacher-{role}", self._teacher_config(role, teacher))
            for role, teacher in wanted.items()
            if teacher.config is not None
        }
        results = dict(zip(trained, self.run(list(trained.values())), strict=True))
        for role, teacher in wanted.items():
            if role in trained:
                self._teachers[role] = job_reference(trained[role], self.folder, results[role])
            else:
                self._teachers[role] = file_reference(teacher.export)
        return self._teachers

    def _teacher_config(self, role: str, teacher: TeacherOptions) -> Config:
        """A configuration of the teacher stage on the domain's training shards."""
        shards = getattr(self.study, role).train
        config = load_config(teacher.config, [*teacher.overrides, f"data.target={json.dumps(shards)}"])
        if config.stage != "teacher":
            raise InputError(f"study {self.path}: teachers: {teacher.config} is of stage {config.stage}, not teacher")
        return config

    def training_config(self, options: TrainingOptions, seed: int, *overrides: str) -> Config:
        """A configuration of the rdmd stage on the study's data; the teacher comes by its reference."""
        study = self.study
        config = load_config(
            options.config,
            [
                *options.overrides,
                f"seed={seed}",
                f"data.source={json.dumps(study.source.train)}",
                f"data.source_holdout={json.dumps(study.source.test)}",
                f"data.target_holdout={json.dumps(study.target.test)}",
                f"validation.judge={json.dumps(study.judge)}",
                f"validation.judge_label={json.dumps(study.judge_label)}",
                "teacher=the study's",
                *overrides,
            ],
        )
        if config.stage != "rdmd":
            raise InputError(f"study {self.path}: {options.config} is of stage {config.stage}, not rdmd")
        return config

    def train(self, transport_weights: list[float]) -> None:
        """Everything that the trade-off trains, so that all cores have work: generators and the energy network."""
        generators = [point for _, _, point in self._generator_points(transport_weights)]
        energy = [self._energy_point()] if any(map(needs_energy, self.study.baselines)) else []
        self.run([*energy, *generators])

    def generators(self, transport_weights: list[float]) -> list[Candidate]:
        """A generator trained at each λ with each seed."""
        planned = self._generator_points(transport_weights)
        results = self.run([point for _, _, point in planned])
        return [
            Candidate(RDMD, f"λ {weight:g}", seed, self._generator(point, result), result)
            for (weight, seed, point), result in zip(planned, results, strict=True)
        ]

    def _generator_points(self, transport_weights: list[float]) -> list[tuple[float, int, Job]]:
        teacher = self.teachers()["target"]
        planned = []
        for seed in self.seeds:
            for weight in transport_weights:
                config = self.training_config(self.study.rdmd, seed, f"rdmd.transport_weight={weight}")
                planned.append((weight, seed, training_job(f"rdmd-{weight:g}-seed{seed}", config, teacher)))
        return planned

    def conditioned_generators(self) -> list[Candidate]:
        """The generator for all λ, trained with each seed, at each λ of the study."""
        teacher, options = self.teachers()["target"], self.study.conditioned
        points = [
            training_job(f"conditioned-seed{seed}", self.training_config(options, seed), teacher) for seed in self.seeds
        ]
        trained = list(zip(self.seeds, points, self.run(points), strict=True))
        return [
            Candidate(f"{RDMD}, one generator", f"λ {weight:g}", seed, self._generator(point, result, weight), result)
            for seed, point, result in trained
            for weight in options.transport_weights
        ]

    def _generator(self, point: Job, result: dict, transport_weight: float | None = None) -> dict:
        reference = job_reference(point, self.folder, result)
        return {"kind": "generator", "export": reference, "transport_weight": transport_weight}

    def untouched(self) -> list[Candidate]:
        """What costs no training: the sources themselves, and the generator before its first update."""
        sigma = self.training_config(self.study.rdmd, 0).rdmd.generator_sigma
        untrained = {"kind": "untrained", "teacher": self.teachers()["target"], "generator_sigma": sigma}
        return [
            Candidate(IDENTITY, "", 0, {"kind": "identity"}),
            Candidate("untrained generator", f"σ {sigma:g}", 0, untrained),
        ]

    def baselines(self) -> list[Candidate]:
        """Every baseline at every setting with each seed, which is that of its noise."""
        return self.baselines_of(self.energy() if any(map(needs_energy, self.study.baselines)) else None)

    def baselines_of(self, energy: dict | None) -> list[Candidate]:
        """The same with an energy network that is there."""
        found = []
        for options in self.study.baselines:
            model = {
                "kind": "baseline",
                "options": options.model_dump(mode="json"),
                "target": self.teachers()["target"],
            }
            if options.method in NEEDS_SOURCE_TEACHER:
                model["source"] = self.teachers()["source"]
            if needs_energy(options):
                model["energy"] = energy
            chosen = options.model_dump(exclude_unset=True, exclude={"method"})
            setting = ", ".join(f"{key} {value}" for key, value in chosen.items())
            seeds = self.seeds[:1] if options.method in DRAW_NO_NOISE else self.seeds
            found += [Candidate(BASELINES[options.method], setting, seed, model | {"seed": seed}) for seed in seeds]
        return found

    def energy(self) -> dict:
        """Reference of EGSDE's energy network."""
        point = self._energy_point()
        return job_reference(point, self.folder, self.run([point])[0])

    def _energy_point(self) -> Job:
        return energy_job(self.study.energy, self.study.source.train, self.study.target.train)

    def measure(self, candidates: list[Candidate]) -> list[dict]:
        """A row of the table for each: method, setting, seed, metrics, costs; ``folder`` of its point."""
        points = [self._measuring_point(candidate) for candidate in candidates]
        return [
            {
                "method": candidate.method,
                "setting": candidate.setting,
                "seed": candidate.seed,
                **{key: value for key, value in result.items() if key != "seconds"},
                "training_steps": candidate.training["training_steps"] if candidate.training else None,
                "training_seconds": candidate.training["training_seconds"] if candidate.training else None,
                "folder": point.folder(self.folder).name,
            }
            for candidate, point, result in zip(candidates, points, self.run(points), strict=True)
        ]

    def _measuring_point(self, candidate: Candidate) -> Job:
        study = self.study
        metrics = {"judge": study.judge, "label": study.judge_label, "features": study.features}
        if study.judge:
            metrics["judge_digest"] = data_digest(study.judge)
        if study.features:
            metrics["features_digest"] = digest(study.features)
        data = {
            "source": study.source.test,
            "target": study.target.test,
            "held_out": study.held_out,
            "digests": [data_digest(study.source.test), data_digest(study.target.test)],
        }
        name = re.sub(r"[^a-z0-9.]+", "-", f"{candidate.method} {candidate.setting}".translate(GREEK).lower()).strip(
            "-"
        )
        settings = {"model": candidate.model, "data": data, "metrics": metrics, "batch_size": study.batch_size}
        return Job(f"measure-{name}-seed{candidate.seed}", "measure", measure, settings)


def needs_energy(options) -> bool:
    return options.method == "egsde" and options.lambda_s > 0


def pack_missing(study: StudyOptions, path: str, pack: Callable[[list[str]], None]) -> None:
    """Run ``rdmd pack`` as the study says where one of its sets is not there.

    Raises:
        InputError: a set is missing and nothing is said of packing, or it does not make that set.
    """
    folders = [study.source.train, study.source.test, study.target.train, study.target.test]
    if study.pack and not all(Path(folder).exists() for folder in folders):
        pack(study.pack)
    missing = next((folder for folder in folders if not Path(folder).exists()), None)
    if missing:
        raise InputError(f"study {path}: {missing}: no such shards, make them with `rdmd pack SOURCE --out {missing}`")
