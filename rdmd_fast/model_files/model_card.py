"""README.md of an export: a model card with Hugging Face's front matter, from the run's config and metrics.

Its text is in model_card.md.j2; the facts for it are gathered here. It says what is known and leaves out the rest.
Whatever comes from outside (paths, class names, licences) stands as code in Markdown, where nothing in it means
anything, and goes through a YAML writer in the front matter.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import yaml

from rdmd_fast.errors import InputError, one_line
from rdmd_fast.extras import own_version
from rdmd_fast.files import read_text, sha256_of
from rdmd_fast.model_files.export_format import ExportConfig
from rdmd_fast.paths import is_command, without_keys

if TYPE_CHECKING:
    from jinja2 import Template

NAME = "README.md"
MOST_BYTES = 1 << 26  # of a manifest, as data/shards/parts.py has it
EDM_LICENSE = "cc-by-nc-sa-4.0"
"""Of the checkpoints that NVIDIA published with EDM (arXiv 2206.00364)."""


class Run(NamedTuple):
    """What is known of the run that an export comes from.

    Attributes:
        config: the resolved config.
        metrics: of the last validation, at ``metrics_step``.
    """

    config: Mapping
    metrics: Mapping[str, float] = {}
    metrics_step: int | None = None


class Teacher(NamedTuple):
    name: str
    kind: str
    license: str | None = None
    data: object = None  # as data.target of its own run


def model_card(config: ExportConfig, run: Run | None = None, license: str | None = None, graph: str = "") -> str:
    """The card of an export.

    Args:
        run: where it comes from, if that is known.
        license: of the export; None for that of the run's config, or else of its teacher.
        graph: "torch-export" or "onnx" for a generator that is exported as a graph.
    """
    try:
        return _template().render(_facts(config, run, license, graph))
    except Exception as error:  # odd facts are no reason for an export, and the training before it, to be lost
        fault = f"The facts of its run are not readable: {code(type(error).__name__)}."
        return f"{_front_matter(license)}\nExported by rdmd_fast {own_version()}. {fault}\n"


@cache
def _template() -> Template:
    """Compile model_card.md.j2. Jinja is imported here: only who exports needs it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"code": code, "data_facts": data_facts}
    return environment.get_template("model_card.md.j2")


def _facts(config: ExportConfig, run: Run | None, license: str | None, graph: str) -> dict:
    """Gather what the template names; None for what is not known."""
    values = run.config if run else {}
    teacher = teacher_facts(values.get("teacher"))
    license = license or values.get("license") or (teacher.license if teacher else None)
    distilled = values.get("stage") == "rdmd"
    data, rdmd, train = (values.get(name) or {} for name in ("data", "rdmd", "train"))
    if not distilled:
        rdmd = {}
    weight, cost = rdmd.get("transport_weight"), rdmd.get("cost") or {}
    if isinstance(weight, Mapping) and weight.get("log_uniform"):
        weight = f"log-uniform in {weight['log_uniform']}"
    metrics = run.metrics if run else {}
    return {
        "front_matter": _front_matter(license),
        "config": config,
        "images": len(config.sample_shape) == 3,
        "graph": graph,
        "distilled": distilled,
        "source": data.get("source"),
        "target": None if distilled else data.get("target"),  # a distillation is not trained on it
        "target_class": data.get("target_class"),
        "prompt": values.get("teacher_prompt"),
        "guidance": values.get("teacher_guidance") if distilled else None,
        "guidance_embedding": _generators_embedding(values) if distilled else values.get("guidance_embedding"),
        "lora": _adapter(values.get("lora")),
        "teacher": teacher,
        "transport_weight": weight,
        "cost": cost.get("kind"),
        **{name: rdmd.get(name) for name in ("generator_sigma", "weighting", "fake_updates")},
        "batch_size": train.get("global_batch_size"),
        "precision": train.get("dtype"),
        "seed": values.get("seed"),
        "metrics": [(name, value) for name, value in metrics.items() if isinstance(value, int | float)],
        "metrics_step": run.metrics_step if run else None,
        "holdouts": [(key, data[f"{key}_holdout"]) for key in ("source", "target") if data.get(f"{key}_holdout")],
        "license": license,
        "EDM_LICENSE": EDM_LICENSE,
        "version": own_version(),
        "torch_version": torch.__version__,
        "python_version": platform.python_version(),
    }


def _generators_embedding(values: Mapping) -> float | None:
    """Where the config states one."""
    own = values.get("student_guidance_embedding")
    return values.get("guidance_embedding") if own is None else own


def _adapter(lora: Mapping | None) -> str | None:
    return ", ".join(f"{key} {value}" for key, value in lora.items() if value is not None) if lora else None


def _front_matter(license: str | None) -> str:
    head: dict = {"library_name": "rdmd_fast", "pipeline_tag": "image-to-image"}
    if license and re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", license):
        head["license"] = license
    elif license:
        head |= {"license": "other", "license_name": one_line(license)}
    head["tags"] = ["diffusion-distillation", "unpaired-image-to-image-translation"]
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n"


def code(text: object) -> str:
    """``text`` as Markdown code of one line, which may stand in a table."""
    text = one_line(str(text)).replace("|", "¦")  # a bar would end the cell even there
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text or not text.strip() else f"{fence}{text}{fence}"


def data_facts(spec: object) -> str:
    """A data set by the name that the user gave it, with its size and hash where it is a packed folder."""
    if isinstance(spec, Mapping):
        return ", ".join(f"{key} {code(value)}" for key, value in spec.items() if value is not None)
    parts = list(map(str, spec)) if isinstance(spec, list) else [str(spec)]
    # A command may hold "::" itself.
    parts = [piece for part in parts for piece in ([part] if is_command(part) else part.split("::"))]
    return "; ".join(map(_one_set, parts))


def _one_set(part: str) -> str:
    if is_command(part):
        return "samples from a command"  # which may hold keys
    if (shown := without_keys(part)) is not None:
        return code(shown)
    facts = [code(part)]
    path = Path(part) / "manifest.json"
    try:
        manifest = json.loads(read_text(path, MOST_BYTES))
        facts.append(f"{int(manifest['count']):,} samples")
        facts.append(f"SHA-256 of its manifest {code(sha256_of(path))}")
    except (InputError, OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return ", ".join(facts)


def teacher_facts(spec: object) -> Teacher | None:
    """What a config's ``teacher`` tells; None for none."""
    from rdmd_fast.model_files.diffusers_folder import is_diffusers_folder

    if not isinstance(spec, str):
        return None
    path = Path(spec)
    if spec == "analytic":
        return Teacher(spec, "the target's score in closed form")
    if path.suffix == ".pkl" or path.is_file():
        return Teacher(spec, "a network in the format of NVIDIA EDM", EDM_LICENSE)
    license = stated_license(path / NAME)
    if is_diffusers_folder(path):
        return Teacher(spec, "a diffusers folder", license)
    return Teacher(spec, "an export of rdmd_fast", license, _own_data(path))


def _own_data(export: Path) -> object:
    """What the run around an export trained on, if the run's folder is there."""
    try:
        return config_of(export.parent)["data"]["target"]
    except (InputError, LookupError, TypeError):
        return None


def stated_license(readme: Path) -> str | None:
    """The licence in the front matter of a model card; None where there is none."""
    try:
        text = read_text(readme, 1 << 20)
    except (InputError, OSError, ValueError):
        return None
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    stated = dict(re.findall(r"^(license|license_name):[ \t]*(.*?)[ \t]*$", head[1] if head else "", re.MULTILINE))
    name = stated.get("license_name") if stated.get("license") == "other" else stated.get("license")
    name = one_line((name or "").strip("'\"")).strip()
    return name if 0 < len(name) <= 100 else None


def last_validation(run_dir: Path, step: int | None) -> tuple[dict, int | None]:
    """The newest validation in RUN/metrics.jsonl at or before ``step``, and its step; ({}, None) if there is none."""
    found: tuple[dict, int | None] = {}, None
    try:
        with open(run_dir / "metrics.jsonl", encoding="utf-8") as file:
            for text in file:
                if '"validation"' not in text:
                    continue
                line = json.loads(text)
                if step is None or line["step"] <= step:
                    found = dict(line["validation"]), line["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return found


def run_of_export(folder: Path) -> Run | None:
    """The run that RUN/export or RUN/best is of; None for a folder that stands elsewhere."""
    from rdmd_fast.model_files.export_format import read_export_config

    try:
        values = config_of(folder.parent)
        role = "generator" if values["stage"] == "rdmd" else "teacher"
        return Run(values, *last_validation(folder.parent, read_export_config(folder, role).step))
    except (InputError, LookupError):
        return None


def config_of(run_dir: Path) -> dict:
    """Plain values of RUN/config.yaml; InputError where there are none."""
    from rdmd_fast.yaml_values import read_values

    return read_values(str(run_dir / "config.yaml"))
