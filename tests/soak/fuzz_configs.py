"""Mutated training configurations: most by ``--dry-run``, some by a short training; and checkpoints to resume from."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import random
import shutil
from itertools import pairwise
from pathlib import Path

import yaml
from fuzz_mutations import Edits, mutate_bytes, mutate_text, mutate_tree, noted, odd_files, odd_value, replace_by_odd
from fuzz_networks import mutate_header, mutate_weights
from fuzz_sandbox import ROOT, Rules, as_command

from rdmd_fast import cli, trainer
from rdmd_fast.config import option_table

REAL = 25  # one configuration in so many is trained for two iterations
LARGEST = 1e18  # no number but the seed may be larger in a configuration that is accepted

# YAML that no safe_dump writes. @ stands for the place of a value.
SNIPPETS = [
    '!!python/object/apply:os.system ["touch executed"]', "!!python/name:os.system", "!!python/module:os",
    '!!python/object/new:subprocess.Popen [["touch", "executed"]]', "!!python/tuple [1, 2]", '!!int ""', "!!int x",
    "!!bool x", "!!float x", "!!timestamp x", "!!binary x", '!!binary "/w=="', "!!set {a, b}", "!!omap [a: 1]",
    "!!pairs [a: 1]", "!!null x", "!!str 1", "!!map [1]", "!!seq {a: 1}", "!unknown x", "!<tag:x> y", "! x",
    "2001-01-01", "2001-99-99", "2001-01-01 25:61:61", "0x" + "f" * 5000, "9" * 5000, "0b" + "1" * 20000, "1_000",
    "1:30:30", "0o777", "0777", ".inf", "-.inf", ".nan", "1e999", "*undefined", "&a [*a]", "&a {b: *a}", '"\\ud800"',
    '"\\x00"', '"\\e[31m"', "{[1]: 2}", "{{a: 1}: 2}", "{1: 2}", "{null: 2}", "{? : 1}", "'unterminated", "[1, 2",
    "{a: 1", "]", "|", ">", "@", "`", "%TAG", "? a", "<<", "{<<: 1}", "{<<: [1]}", "{<<: *x}", "[" * 2000,
    "[" * 300 + "]" * 300, "[" * 20 + "]" * 20, "{a: " * 300 + "1" + "}" * 300, "1" + "0" * 400, "-1", "1e-400", "~",
    "yes", "on", "=", "!!python/object/apply:builtins.eval ['__import__(\"os\").system(\"touch executed\")']",
]  # fmt: skip
LETTERS = "abcdefghij"


def laughs(width: int = 9) -> str:
    """Ten anchors, each a list of the one before: 10^9 values in a few lines."""
    rows = [f"&a [{', '.join(['x'] * width)}]"]
    rows += [f"&{new} [{', '.join([f'*{old}'] * width)}]" for old, new in pairwise(LETTERS)]
    return f"[{', '.join(rows)}]"


def merges(width: int = 9) -> str:
    """The same through merge keys, which the loader itself expands."""
    rows = ["a: &a {k: 1}"]
    rows += [f"{new}: &{new} {{<<: [{', '.join([f'*{o}'] * width)}]}}" for o, new in pairwise(LETTERS)]
    return f"{{{', '.join(rows)}}}"


SNIPPETS += [laughs(), merges()]


class Configs:
    """Every preset of configs/ on the fuzz's own tiny data, and two that train in an instant."""

    name = "configs"

    def __init__(self, material):
        self.material = material
        self.bases = []
        for path in sorted((ROOT / "configs").rglob("*.yaml")):
            if path.name != "study.yaml":  # of many trainings
                self.bases.append(on_own_data(yaml.safe_load(path.read_text()), material))
        self.small = [small_rdmd(), small_teacher(material), small_distillation(material)]
        keys = [key for key, _, _ in option_table()]
        self.mutations = {
            "tree": lambda case, chance: mutate_tree(case.values, chance, self.paths),
            "key": lambda case, chance: case.override(f"{chance.choice(keys)}={case.snippet(chance, self.paths)}"),
            "snippet": lambda case, chance: case.put_snippet(chance),
            "override": lambda case, chance: case.override(chance.choice(OVERRIDES)),
            "text": lambda case, chance: case.damage.append(chance.randrange(2**31)),
            "file": lambda case, chance: setattr(case, "odd", chance.randrange(2**31)),
        }
        self.weights = {"tree": 8, "key": 8, "snippet": 4, "override": 1, "text": 3, "file": 0.5}

    @property
    def paths(self) -> tuple[str, ...]:
        made = self.material
        return (
            "fifo", "folder", "loop", "dangling", "empty", "zeros", "noise", "to_zero", str(made.images),
            str(made.latents), str(made.teacher), str(made.generator), str(made.pickle), str(made.diffusers),
        )  # fmt: skip

    def start(self, chance: random.Random, number: int):
        real = number % REAL == 0
        base = copy.deepcopy(chance.choice(self.small if real else self.bases + self.small))
        return ConfigCase(base, real)

    def finish(self, case: ConfigCase, folder: Path):
        odd_files(folder)
        path = folder / "config.yaml"
        text = yaml.safe_dump(case.values, sort_keys=False, allow_unicode=True, width=10**9)
        for token, raw in case.raw.items():
            text = text.replace(token, raw)
        data = text.encode(errors="surrogatepass")
        for seed in case.damage:
            chance = random.Random(seed)
            text = data.decode(errors="replace")
            data = mutate_text(text, chance) if chance.random() < 0.7 else mutate_bytes(data, chance)
        path.write_bytes(data)
        given = "config.yaml"
        if case.odd is not None:
            chance = random.Random(case.odd)
            odd = ["/dev/zero", "/dev/stdin", "folder", "", "a\nb", "x" * 300]
            given = chance.choice(["config.yaml", "config.yaml", *odd])
            if given == "config.yaml":
                replace_by_odd(path, folder, chance)
        arguments = ["--config", given, *case.overrides]
        if not case.real:
            arguments.append("--dry-run")
            return lambda: trainer.main(arguments), Rules(), accepted
        # Where it writes and how long it takes are the fuzz's; all else is the configuration's.
        arguments += ["run_dir=run", "train.steps=2"]
        (folder / "run").mkdir()
        rules = Rules(statuses=(0, 2, 75), notes=DEEPSPEED_SAYS, stop=True)
        return lambda: trainer.main(arguments), rules, None


DEEPSPEED_SAYS = r"\[20\d\d-|Stage 3 initialize|\[Gloo\]"

OVERRIDES = [
    "=", "a", "a=", ".=1", "a.=1", ".a=1", "a..b=1", "train=1", "train.steps.x=1", "seed.x=1", "stage.x.y=1",
    "data=", "data.source=[", "teacher=!!python/name:os.system", "x" * 5000 + "=1", ".".join("a" * 2000) + "=1",
    "seed=-1", "\x00=1", "run_dir=\udcff", "train.steps=1e3", "train={}", "train=[]", "train=null", "data=null",
    "rdmd.sigma=null", "network=null", "generator={}", "diffusion={}", "=" * 300, "train.steps=1=2",
    "deepspeed.a.b.c.d=1", "deepspeed=[1]", "деньги=1",
]  # fmt: skip


class ConfigCase:
    """A configuration in the making."""

    def __init__(self, values: dict, real: bool):
        self.values, self.real = values, real
        self.overrides: list[str] = []
        self.raw: dict[str, str] = {}
        self.damage: list[int] = []
        self.odd: int | None = None

    def override(self, text: str) -> str:
        self.overrides.append(text)
        return text[:100]

    def snippet(self, chance: random.Random, paths: tuple[str, ...]) -> str:
        if chance.random() < 0.5:
            return chance.choice(SNIPPETS)
        text = yaml.safe_dump(odd_value(chance, paths), default_flow_style=True, width=10**9)
        return text.removesuffix("\n...\n").strip()

    def put_snippet(self, chance: random.Random) -> str:
        section = chance.choice([self.values, *(value for value in self.values.values() if isinstance(value, dict))])
        token = f"@{len(self.raw)}@"
        while token in self.raw:
            token += "@"
        names = [*map(str, section), "deepspeed", "extra"]
        section[chance.choice(names)] = token
        snippet = chance.choice(SNIPPETS)
        self.raw |= {f"'{token}'": snippet}
        return snippet[:100]


def accepted(outcome, folder: Path) -> str | None:
    """What is wrong with a configuration that passed: it must be what a training could start with."""
    text = outcome.stdout.partition("\ngenerator   ")[0].partition("\nteacher     ")[0]
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return f"dry-run prints no YAML: {type(error).__name__}"
    if list((folder / "runs").rglob("*")) if (folder / "runs").exists() else False:
        return "dry-run writes into run_dir"
    if (folder / "executed").exists():
        return "executed: a file was touched"
    return next(absurd(values, ""), None)


def absurd(values, key: str):
    """Numbers that no training can mean."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from absurd(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            yield from absurd(value, key)
    elif isinstance(values, int | float) and key != "seed" and not abs(values) <= LARGEST:
        yield f"accepted: {key} = {values:.3g}" if isinstance(values, float) else f"accepted: a huge {key}"


def on_own_data(values: dict, material) -> dict:
    """A preset with the paths in it replaced by what is there."""
    for key, value in values.get("data", {}).items():
        if isinstance(value, str):
            values["data"][key] = str(material.images)
    if values.get("teacher") not in (None, "analytic"):
        values["teacher"] = str(material.teacher)
    if "judge" in values.get("validation", {}):
        values["validation"] = {"every": 50}
    values.setdefault("telemetry", {}).pop("decoder", None)
    return values


def small_rdmd() -> dict:
    network = {"kind": "mlp", "hidden": 8, "depth": 2, "embedding": 4}
    return {
        "stage": "rdmd", "run_dir": "run", "data": {"source": {"toy": "gaussian"}, "target": {"toy": "8gaussians"}},
        "teacher": "analytic", "network": network, "generator": dict(network),
        "rdmd": {"weighting": "sigma2", "fake_updates": 2, "generator_optimizer": {"lr": 1e-3}},
        "train": {"steps": 2, "global_batch_size": 8}, "checkpoint": {"every": 0}, "deepspeed": {},
        "telemetry": {"log_every": 1, "sample_every": 0, "sample_count": 2, "tensorboard": False},
        "validation": {"count": 16},
    }  # fmt: skip


def small_teacher(material) -> dict:
    return {
        "stage": "teacher", "run_dir": "run", "data": {"target": str(material.images), "flip": True},
        "network": {"kind": "song_unet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1,
                    "attn_resolutions": []},
        "teacher_stage": {"optimizer": {"lr": 1e-3, "betas": [0.9, 0.99]}, "ema": {"half_life": 100.0}},
        "train": {"steps": 2, "global_batch_size": 4}, "checkpoint": {"every": 0}, "deepspeed": {},
        "telemetry": {"log_every": 1, "sample_every": 0, "sample_count": 2, "tensorboard": False},
    }  # fmt: skip


def small_distillation(material) -> dict:
    return {
        "stage": "rdmd", "run_dir": "run", 
        "data": {"source": str(material.images), "source_holdout": str(material.images)},
        "teacher": str(material.teacher), "rdmd": {"sigma": {"kind": "lognormal", "mean": -1.0, "std": 1.0}},
        "train": {"steps": 2, "global_batch_size": 4, "micro_batch_size": 2}, "checkpoint": {"every": 1, "keep": 1},
        "deepspeed": {"zero_optimization": {"stage": 1}}, "validation": {"every": 1, "count": 4},
        "telemetry": {"log_every": 1, "sample_every": 1, "sample_count": 2, "tensorboard": False},
    }  # fmt: skip


class Checkpoints:
    """Run folders whose checkpoints are damaged: found by auto and by name, exported, now and then resumed."""

    name = "checkpoints"

    def __init__(self, material):
        self.material = material
        self.weights = {"manifest": 6, "tensors": 4, "bytes": 3, "file": 2, "latest": 2}
        self.mutations = noted(*self.weights)

    def start(self, chance: random.Random, number: int) -> Edits:
        return Edits(real=number % 10 == 0, named=chance.random() < 0.4, sealed=chance.random() < 0.6, number=number)

    def finish(self, case: Edits, folder: Path):
        odd_files(folder)
        shutil.copytree(self.material.run, folder / "run")
        root = folder / "run/checkpoints"
        for kind, seed in case:
            damage_checkpoint(root, kind, random.Random(seed), folder)
        steps = sorted(path.name for path in root.glob("step_*"))
        for step in steps if case.sealed else ():
            seal(root / step)
        resume = f"run/checkpoints/{steps[-1]}" if case.named and steps else "auto"
        if case.real:
            path = folder / "config.yaml"
            values = small_rdmd() | {"train": {"steps": 3, "global_batch_size": 8}}
            path.write_text(yaml.safe_dump(values))
            arguments = ["--config", "config.yaml", "run_dir=run", "--resume", resume]
            return lambda: trainer.main(arguments), Rules(statuses=(0, 2, 75), notes=DEEPSPEED_SAYS, stop=True), None
        if case.number % 5 < 3:
            network = ["generator", "fake_score", "teacher"][case.number % 3]
            return lambda: cli.main(["export", "run", "--network", network, "--out", "out"]), Rules(), None
        return lambda: as_command(find, resume), Rules(), None


def find(resume: str) -> None:
    import torch

    from rdmd_fast.checkpoints.checkpoint import find_checkpoint
    from rdmd_fast.processes.world import World

    print(find_checkpoint(Path("run"), resume, World(0, 1, torch.device("cpu"))))


def damage_checkpoint(root: Path, kind: str, chance: random.Random, folder: Path) -> None:
    """One damage to one of a checkpoint's files, or to what names the newest one."""
    if kind == "latest":
        (root / "latest").unlink(missing_ok=True)
        (root / "latest").write_bytes(chance.choice([b"", b"nowhere", b"../..", b"\xff\xfe", b"/etc", b"a" * 5000]))
        return
    suffix = {"manifest": ".json", "tensors": ".safetensors"}.get(kind, "")
    files = sorted(path for path in root.rglob(f"*{suffix}") if path.is_file())
    if not files:
        return
    path = chance.choice(files)
    if kind == "file":
        replace_by_odd(path, folder, chance)
    elif kind == "bytes":
        path.write_bytes(mutate_bytes(path.read_bytes(), chance))
    elif kind == "tensors":
        path.write_bytes(chance.choice([mutate_header, mutate_weights])(path.read_bytes(), chance))
    else:
        with contextlib.suppress(ValueError):
            values = json.loads(path.read_text())
            mutate_tree(values, chance, ("../../latest", "/etc/passwd", "fifo", "loop"))
            path.write_text(json.dumps(values))


def seal(checkpoint: Path) -> None:
    """Sizes and hashes of what is there into the manifest, and its own: the damage is to be met in the content."""
    path = checkpoint / "manifest.json"
    if not path.is_file():
        return
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        values = json.loads(path.read_text())
        for name, entry in values["files"].items():
            content = (checkpoint / name).read_bytes() if (checkpoint / name).is_file() else b""
            entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        rest = {key: value for key, value in values.items() if key != "sha256"}
        values["sha256"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(values))
