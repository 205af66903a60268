"""A short form of tests/soak/fuzz_inputs.py, and configurations of made-up structure."""

import math
import subprocess
import sys
from pathlib import Path

import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rdmd_fast.config import dump_config, load_config, option_table
from rdmd_fast.errors import LONGEST, InputError

ROOT = Path(__file__).parent.parent
TOY = yaml.safe_load((ROOT / "configs/toy/gaussian_to_8gaussians.yaml").read_text())
KEYS = [key for key, _, _ in option_table()]

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def test_fuzz_in_short():
    counts = {
        "configs": 30,
        "exports": 10,
        "diffusers": 6,
        "pickles": 12,
        "shards": 12,
        "pictures": 40,
        "checkpoints": 6,
    }
    counts = [text for kind, count in counts.items() for text in (f"--{kind}", str(count))]
    command = [sys.executable, str(ROOT / "tests/soak/fuzz_inputs.py"), "--seed", "1", "--jobs", "1", *counts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("configs", "exports", "pickles"))]
    assert cases[-3:] == ["30", "10", "12"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(KEYS), value=VALUES)
@example(key="train.steps", value=10**30)
@example(key="rdmd.generator_optimizer.lr", value=math.inf)
@example(key="rdmd.generator_optimizer.betas", value=[0.9, 1.0])
@example(key="deepspeed", value={"zero_optimization": {"stage": True}})
@example(key="deepspeed", value={"a": {"b": math.nan}})
def test_any_value_of_any_key_is_refused_in_a_line_or_can_be_written_back(tmp_path, key, value):
    values = {**TOY}
    *parents, leaf = key.split(".")
    section = values
    for part in parents:
        section[part] = dict(section[part]) if isinstance(section.get(part), dict) else {}
        section = section[part]
    section[leaf] = value
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    try:
        config = load_config(str(path))
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) <= LONGEST
        return
    (tmp_path / "again.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(str(tmp_path / "again.yaml")) == config
    assert all(math.isfinite(number) for number in numbers(config.model_dump(mode="json")))


def numbers(tree):
    if isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from numbers(value)
    elif isinstance(tree, int | float):
        yield tree
