"""A study of the trade-off between quality and faithfulness: what is trained, translated and measured on what data.

One YAML file (configs/digits/study.yaml) describes it; ``rdmd figures --only tradeoff lambda`` computes it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field, model_validator

from rdmd_fast.baselines import BaselineOptions
from rdmd_fast.baselines.energy import EnergyTrainingOptions
from rdmd_fast.baselines.options import NEEDS_SOURCE_TEACHER
from rdmd_fast.errors import InputError
from rdmd_fast.options import Options
from rdmd_fast.paths import data_path, path_to_read, with_paths
from rdmd_fast.yaml_values import read_values

Weight = Annotated[float, Field(ge=0)]
Overrides = Annotated[list[str], Field(default_factory=list, description="key=value changes of the configuration")]


_PATHS = {
    **{f"{domain}.{part}": data_path for domain in ("source", "target") for part in ("train", "test")},
    **{f"teachers.{domain}.{kind}": path_to_read for domain in ("source", "target") for kind in ("export", "config")},
    "rdmd.config": path_to_read,
    "conditioned.config": path_to_read,
    "judge": data_path,
    "features": path_to_read,
}


class DomainOptions(Options):
    """Shards of one domain."""

    train: str = Field(description="shards that models are trained on")
    test: str = Field(description="held-out shards that are translated (source) or compared with (target)")


class TeacherOptions(Options):
    """A diffusion model of one domain: there already, or trained as a point of the study."""

    export: str | None = Field(None, description="RUN/export of the teacher stage, an EDM .pkl or a diffusers folder")
    config: str | None = Field(
        None, description="configuration of the teacher stage to train instead; the study sets its data"
    )
    overrides: Overrides

    @model_validator(mode="after")
    def _one_of_them(self):
        if (self.export is None) == (self.config is None):
            raise ValueError("name one of export (a trained teacher) and config (to train one)")
        if self.export is not None and self.overrides:
            raise ValueError("overrides: are of a config, an export is taken as it is")
        return self


class TeachersOptions(Options):
    target: TeacherOptions = Field(description="of the target domain: RDMD's and every baseline's")
    source: TeacherOptions | None = Field(None, description="of the source domain, for ddib and cyclediffusion")


class TrainingOptions(Options):
    """A configuration of the rdmd stage, and the λ at which its generators are compared."""

    config: str = Field(description="configuration of the rdmd stage; the study sets data, teacher, seed and λ")
    overrides: Overrides
    transport_weights: list[Weight] = Field(min_length=1, description="λ, each measured over all seeds")

    @model_validator(mode="after")
    def _distinct(self):
        if len(set(self.transport_weights)) != len(self.transport_weights):
            raise ValueError("transport_weights: names a λ twice")
        return self


class StudyOptions(Options):
    """The whole study."""

    source: DomainOptions
    target: DomainOptions
    pack: list[str] = Field(
        default_factory=list, description="arguments of `rdmd pack`, called where a set of shards is missing"
    )
    held_out: int = Field(1000, ge=2, le=10**6, description="held-out samples of each domain that are used at most")
    judge: str | None = Field(None, description="labelled digit shards ROOT/<digit>/train|test: share and Fréchet")
    judge_label: int | None = Field(None, description="label of the target domain for the judge")
    features: str | None = Field(None, description="TorchScript feature extractor: FID and KID")
    batch_size: int = Field(64, ge=1, le=10**5, description="images translated at a time (timed so, too)")
    teachers: TeachersOptions
    rdmd: TrainingOptions
    conditioned: TrainingOptions | None = Field(
        None, description="one generator for a range of λ, compared with those of `rdmd` at the same λ"
    )
    energy: EnergyTrainingOptions = Field(
        default_factory=EnergyTrainingOptions, description="EGSDE's energy network, trained on both domains"
    )
    baselines: list[BaselineOptions] = Field(default_factory=list, description="settings of the baselines")

    @model_validator(mode="before")
    @classmethod
    def _on_this_machine(cls, values):
        return with_paths(values, _PATHS)

    @model_validator(mode="after")
    def _consistent(self):
        if self.judge is None and self.features is None:
            raise ValueError("judge, features: name one, quality is measured in its features")
        if self.judge is not None and self.judge_label is None:
            raise ValueError("judge_label: missing, name the label of the target domain")
        settings = [each.model_dump_json() for each in self.baselines]
        twice = next((each for each in settings if settings.count(each) > 1), None)
        if twice:
            raise ValueError(f"baselines: has a setting twice, {twice}")
        if self.conditioned is not None:
            alone = [each for each in self.conditioned.transport_weights if each not in self.rdmd.transport_weights]
            if alone:
                raise ValueError(f"conditioned.transport_weights: rdmd.transport_weights lacks {alone[0]:g}, add it")
        wanting = [each.method for each in self.baselines if each.method in NEEDS_SOURCE_TEACHER]
        if wanting and self.teachers.source is None:
            raise ValueError(f"teachers.source: missing, {wanting[0]} needs it")
        return self

    @property
    def quality(self) -> str:
        """The metric of quality, lower is better: by the judge's features if there is one."""
        return "frechet" if self.judge else "fid"


def load_study(path: str, overrides: list[str] = ()) -> StudyOptions:
    """Read and check a study file.

    Raises:
        InputError: one line that names the file, the key and what is wrong.
    """
    return StudyOptions.parse(read_values(path, overrides, "study", StudyOptions), f"study {path}")


CONFIGS = Path(__file__).parents[2] / "configs"


class FigureOptions(NamedTuple):
    """Attributes: ``seeds`` trainings of each setting (seeds 0 ... N - 1), ``jobs`` points at a time (None: one for
    each GPU, or for each core without one), ``study`` a YAML file that replaces a figure's own study (None: its own),
    ``pack`` runs ``rdmd pack`` with a study's arguments.
    """

    seeds: int
    jobs: int | None
    study: str | None
    pack: Callable[[list[str]], None]


def shipped_config(name: str) -> str:
    """Path of configs/NAME. Raises InputError where the package is used without its repository."""
    path = CONFIGS / name
    if not path.is_file():
        raise InputError(f"{path}: no such file; the figures train the repository's configs, run them from a clone")
    return str(path)
