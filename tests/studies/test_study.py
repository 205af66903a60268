from collections import Counter
from pathlib import Path

import pytest

from rdmd_fast.config import load_config
from rdmd_fast.errors import InputError
from rdmd_fast.studies.options import load_study

CONFIGS = Path(__file__).parents[2] / "configs"
DIGITS = str(CONFIGS / "digits/study.yaml")


@pytest.mark.parametrize("name", ["digits", "afhqv2"])
def test_shipped_studies_are_valid_and_wide_enough(name):
    study = load_study(str(CONFIGS / name / "study.yaml"))
    assert len(study.rdmd.transport_weights) >= 5
    assert len(study.conditioned.transport_weights) >= 4
    methods = Counter(baseline.method for baseline in study.baselines)
    assert set(methods) == {"sdedit", "ilvr", "egsde", "ddib", "cyclediffusion"}
    assert min(methods.values()) >= 5
    assert study.quality == {"digits": "frechet", "afhqv2": "fid"}[name]


@pytest.mark.parametrize("name", ["digits", "afhqv2"])
def test_trainings_of_the_shipped_studies(name, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)  # their paths are of the repository
    study = load_study(f"configs/{name}/study.yaml")
    for weight in study.rdmd.transport_weights:
        config = load_config(study.rdmd.config, [*study.rdmd.overrides, f"rdmd.transport_weight={weight}"])
        assert config.stage == "rdmd" and config.rdmd.transport_weight == weight
    one = load_config(study.conditioned.config, study.conditioned.overrides)
    low, high = one.rdmd.transport_weight.log_uniform
    assert low <= min(study.conditioned.transport_weights) and max(study.conditioned.transport_weights) <= high
    assert one.train == config.train  # one run's iterations for all λ
    for teacher in (study.teachers.target, study.teachers.source):
        assert teacher.export or load_config(teacher.config, teacher.overrides).stage == "teacher"


@pytest.mark.parametrize("override, line", [
    ("judge_label=null", "judge_label: missing, name the label of the target domain"),
    ("judge=null", "judge, features: name one, quality is measured in its features"),
    ("source.val=x", "unknown key source.val"),
    ("rdmd.transport_weights=[0.1, 0.1]", "rdmd: transport_weights: names a λ twice"),
    ("rdmd.transport_weights=[-1]", "rdmd.transport_weights.0: input should be greater than or equal to 0"),
    ("rdmd.transport_weights=[1]", "conditioned.transport_weights: rdmd.transport_weights lacks 0.02, add it"),
    ("baselines=[{method: ilvr}, {method: ilvr, factor: 4}]", "baselines: has a setting twice, .*"),
    ("teachers.target.export=x", "teachers.target: name one of export .* and config"),
    ("teachers.source=null", "teachers.source: missing, ddib needs it"),
    ("baselines=[{method: sdedit, sigma: 1}]", "unknown key baselines.0.sigma, did you mean baselines.sigma0"),
    ("baselines=[{method: cut}]", "baselines.0: input tag 'cut' found using 'method' does not match"),
    ("teachers.source={export: x, overrides: [a=b]}", "teachers.source: overrides: are of a config"),
])  # fmt: skip
def test_what_is_wrong_with_a_study_is_one_line(override, line):
    with pytest.raises(InputError, match=rf"^study .*study.yaml: {line}[^\n]*$"):
        load_study(DIGITS, [override])


def test_no_study_there():
    with pytest.raises(InputError, match=r"^study nowhere.yaml: cannot be read"):
        load_study("nowhere.yaml")
