"""README.md of an export: a model card with Hugging Face's front matter, from the run's config and metrics.

It says what is known and leaves out the rest. Whatever comes from outside (paths, class names, licences) stands as
code in Markdown, where nothing in it means anything, and goes through a YAML writer in the front matter.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from rdmd_fast.errors import InputError, one_line
from rdmd_fast.extras import own_version
from rdmd_fast.files import read_text, sha256_of
from rdmd_fast.model_files.export_format import ExportConfig

NAME = "README.md"
MOST_BYTES = 1 << 26  # of a manifest, as data/parts.py has it
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
        return _card(config, run, license, graph)
    except Exception as error:  # odd facts are no reason for an export, and the training before it, to be lost
        return _page(license, [f"Exported by rdmd_fast {own_version()}. The facts of its run are not readable: "
                               f"{code(type(error).__name__)}."])  # fmt: skip


def _card(config: ExportConfig, run: Run | None, license: str | None, graph: str) -> str:
    values = run.config if run else {}
    teacher = teacher_facts(values.get("teacher"))
    license = license or values.get("license") or (teacher.license if teacher else None)
    sections = [
        _what(config),
        _table("Training", ("", ""), _training(config, values, teacher)),
        _table(_metrics_title(run), ("metric", "value"), _metrics(run), _held_out(values)),
        _licence(license, teacher),
        _limits(config),
        _loading(config, graph),
        f"Made by rdmd_fast {own_version()} with torch {torch.__version__} and Python {platform.python_version()}.",
    ]
    return _page(license, filter(None, sections))


def _page(license: str | None, sections: Iterable[str]) -> str:
    head: dict = {"library_name": "rdmd_fast", "pipeline_tag": "image-to-image"}
    if license and re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", license):
        head["license"] = license
    elif license:
        head |= {"license": "other", "license_name": one_line(license)}
    head["tags"] = ["diffusion-distillation", "unpaired-image-to-image-translation"]
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n" + "\n\n".join(sections) + "\n"


def code(text: object) -> str:
    """``text`` as Markdown code of one line, which may stand in a table."""
    text = one_line(str(text)).replace("|", "¦")  # a bar would end the cell even there
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text or not text.strip() else f"{fence}{text}{fence}"


def _table(title: str, head: tuple[str, str], rows: list[tuple[str, str]], note: str = "") -> str:
    if not rows:
        return ""
    lines = [f"| {' | '.join(row)} |" for row in (head, ("---", "---"), *rows)]
    return "\n".join([f"## {title}", "", *([note, ""] if note else []), *lines])


# -- what it is --------------------------------------------------------------------------------------------------------


def _what(config: ExportConfig) -> str:
    shape = "×".join(map(str, config.sample_shape))
    if config.role == "generator":
        title = "One-step image-to-image translator"
        text = (
            "A generator that turns a sample of a source domain into one of a target domain in a single network "
            "evaluation. It was trained without pairs by RDMD, Regularized Distribution Matching Distillation "
            "(arXiv 2406.14762), with rdmd_fast."
        )
        if config.transport_weights:
            low, high = config.transport_weights
            text += (
                f" It takes the weight of the transport cost, λ, from {low:g} to {high:g}, at every call: more keeps "
                "more of the input."
            )
    else:
        title = "Diffusion model"
        text = "A denoiser of one image domain (EDM, arXiv 2206.00364), a teacher for RDMD (arXiv 2406.14762)."
    units = ", from -1 to 1" if len(config.sample_shape) == 3 else ""
    return f"# {title}\n\n{text} Network: {code(config.network.kind)}, samples of shape {shape}{units}."


def _limits(config: ExportConfig) -> str:
    use = (
        "Meant for images like those of its source domain. Other images, and other resolutions than its own, are "
        "outside of what it has learned. It invents what the target domain needs and the input lacks: an output is no "
        "evidence of what its input shows."
        if config.role == "generator"
        else "Meant as a teacher of the distillation, and for samples of its domain."
    )
    return f"## Use and limits\n\n{use} It carries over what is uneven or unwanted in its training data."


def _loading(config: ExportConfig, graph: str) -> str:
    batch = "[N, C, H, W] in [-1, 1]" if len(config.sample_shape) == 3 else "[N, D] in data units"
    if graph == "onnx":
        inputs = '{"images": x, "transport_weight": w}' if config.transport_weights else '{"images": x}'
        lines = [
            "import onnxruntime",
            'session = onnxruntime.InferenceSession("generator.onnx")',
            f"y = session.run(None, {inputs})[0]  # x: float32 {batch}, a NumPy array",
        ]
    elif graph:
        weight = ", w" if config.transport_weights else ""
        lines = [
            "import torch",
            'generator = torch.export.load("generator.pt2").module()',
            f"y = generator(x{weight})  # x: float32 {batch}",
        ]
    elif config.role == "generator":
        lines = [
            "from rdmd_fast import load_generator",
            'generator = load_generator("DIR")  # this folder',
            f"y = generator(x)  # x: float32 {batch}",
        ]
    else:
        lines = [
            "from rdmd_fast import load_denoiser",
            'denoiser = load_denoiser("DIR")  # this folder',
            f"y = denoiser(x_noisy, sigma)  # x_noisy: {batch}, and noise of deviation sigma",
        ]
    note = "`w`: λ, float32 [N], cut to the range above.\n\n" if graph and config.transport_weights else ""
    return "## Loading\n\n" + note + "\n".join(["```python", *lines, "```"])


# -- training ----------------------------------------------------------------------------------------------------------


def _training(config: ExportConfig, values: Mapping, teacher: Teacher | None) -> list[tuple[str, str]]:
    data, rdmd, train = (values.get(name) or {} for name in ("data", "rdmd", "train"))
    rows = []
    distilled = values.get("stage") == "rdmd"
    for title, key in (("source data", "source"), ("target data", "target")):
        if data.get(key) is not None and not (distilled and key == "target"):  # it is not trained on
            rows.append((title, data_facts(data[key])))
    if teacher:
        rows.append(("teacher" if distilled else "started from", f"{code(teacher.name)}, {teacher.kind}"))
        if teacher.data is not None:
            rows.append(("teacher's data", data_facts(teacher.data)))
    if data.get("target_class") is not None:
        rows.append(("target class", code(data["target_class"])))
    if distilled:
        weight, cost = rdmd.get("transport_weight"), rdmd.get("cost") or {}
        if isinstance(weight, Mapping) and weight.get("log_uniform"):
            weight = f"log-uniform in {weight['log_uniform']}"
        facts = {
            "λ, weight of the transport cost": weight,
            "transport cost": cost.get("kind"),
            "noise level that the generator reads": rdmd.get("generator_sigma"),
            "weighting": rdmd.get("weighting"),
            "fake-score updates an iteration": rdmd.get("fake_updates"),
        }
        rows += [(title, code(value)) for title, value in facts.items() if value is not None]
    rows += [("step", code(config.step))] if config.step is not None else []
    facts = {"batch size": train.get("global_batch_size"), "precision": train.get("dtype"), "seed": values.get("seed")}
    return rows + [(title, code(value)) for title, value in facts.items() if value is not None]


def data_facts(spec: object) -> str:
    """A data set by the name that the user gave it, with its size and hash where it is a packed folder."""
    if isinstance(spec, Mapping):
        return ", ".join(f"{key} {code(value)}" for key, value in spec.items() if value is not None)
    parts = list(map(str, spec)) if isinstance(spec, list) else [str(spec)]
    # A command may hold "::" itself.
    parts = [piece for part in parts for piece in ([part] if _is_command(part) else part.split("::"))]
    return "; ".join(map(_one_set, parts))


def _is_command(part: str) -> bool:
    return "pipe:" in part.lower()


def _one_set(part: str) -> str:
    if _is_command(part):
        return "samples from a command"  # which may hold keys
    if scheme := re.match(r"[a-z][a-z0-9+.-]*://", part, re.IGNORECASE):
        return code(scheme[0] + _without_keys(part[scheme.end() :]))
    facts = [code(part)]
    path = Path(part) / "manifest.json"
    try:
        manifest = json.loads(read_text(path, MOST_BYTES))
        facts.append(f"{int(manifest['count']):,} samples")
        facts.append(f"SHA-256 of its manifest {code(sha256_of(path))}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return ", ".join(facts)


def _without_keys(address: str) -> str:
    """What follows an address's scheme, without user, password, query and fragment.

    Passwords may hold "/" where nobody has escaped it, so all before the last "@" goes. With an "@" behind a "?" it is
    open which of them is a password's, and nothing is left.
    """
    place, _, query = re.sub("[?#]", "?", address).partition("?")
    return "…" if "@" in query else place.rpartition("@")[2]


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
    except (OSError, ValueError):
        return None
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    stated = dict(re.findall(r"^(license|license_name):[ \t]*(.*?)[ \t]*$", head[1] if head else "", re.MULTILINE))
    name = stated.get("license_name") if stated.get("license") == "other" else stated.get("license")
    name = one_line((name or "").strip("'\"")).strip()
    return name if 0 < len(name) <= 100 else None


def _licence(license: str | None, teacher: Teacher | None) -> str:
    lines = ["## Licence", ""]
    if license:
        lines.append(f"{code(license)}.")
    else:
        lines.append(
            "Not stated. Before this is shared, state one: `license` in the config, or `rdmd export --license`."
        )
    if teacher and teacher.license == EDM_LICENSE:
        lines.append(
            "The networks that NVIDIA published with EDM are under CC BY-NC-SA 4.0, which goes for what is made of "
            "them: no commercial use, and the same licence."
        )
    elif teacher and teacher.license:
        lines.append(f"Its teacher states {code(teacher.license)}.")
    elif teacher and teacher.name != "analytic":
        lines.append("That of its teacher, of which this is a derivative, is not known here.")
    return "\n".join(lines)


# -- metrics -----------------------------------------------------------------------------------------------------------


def _metrics_title(run: Run | None) -> str:
    return f"Metrics at step {run.metrics_step}" if run and run.metrics_step is not None else "Metrics"


def _metrics(run: Run | None) -> list[tuple[str, str]]:
    found = run.metrics if run else {}
    return [(code(name), f"{value:.4g}") for name, value in found.items() if isinstance(value, int | float)]


def _held_out(values: Mapping) -> str:
    data = values.get("data") or {}
    sets = [f"{key} {data_facts(data[f'{key}_holdout'])}" for key in ("source", "target") if data.get(f"{key}_holdout")]
    return f"On held-out data: {'; '.join(sets)}." if sets else ""


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
