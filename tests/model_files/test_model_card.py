"""The README.md of an export: what the run's config says, and nothing that comes from outside unescaped."""

import json

import pytest
import yaml

from rdmd_fast.config import validate_config
from rdmd_fast.files import sha256_of
from rdmd_fast.model_files.export_format import ExportConfig
from rdmd_fast.model_files.model_card import (
    EDM_LICENSE,
    Run,
    code,
    data_facts,
    last_validation,
    model_card,
    stated_license,
)

VALUES = {"network": {"kind": "mlp"}, "sample_shape": [3, 8, 8], "diffusion": {}, "step": 7}
GENERATOR = ExportConfig.model_validate(VALUES | {"role": "generator", "reading": "mlp", "generator_sigma": 1.5})
TEACHER = ExportConfig.model_validate(VALUES | {"role": "teacher"})
HOSTILE = "x`|\n---\n# <script>alert(1)</script> ![a](http://b) | `` ` license: mit"


def resolved(**sections) -> dict:
    values = {"stage": "rdmd", "run_dir": "runs/a", "data": {"source": "shards/cats"}, "teacher": "runs/dogs/export"}
    return validate_config(values | sections, "test").model_dump(mode="json")


def parts(card: str) -> tuple[dict, str]:
    """Front matter and text."""
    start, head, text = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(head), text


def rows(card: str) -> dict[str, str]:
    lines = [line[2:-2].split(" | ") for line in card.splitlines() if line.startswith("| ")]
    assert all(len(line) == 2 for line in lines)
    return dict(lines)


def test_card_says_what_the_config_says(tmp_path):
    manifest = tmp_path / "cats/manifest.json"
    manifest.parent.mkdir()
    manifest.write_text(json.dumps({"count": 5153}))
    config = resolved(
        data={"source": str(tmp_path / "cats"), "source_holdout": "shards/cats/test", "target_class": 2},
        rdmd={"transport_weight": 0.125, "weighting": "sigma2", "generator_sigma": 1.5, "fake_updates": 3,
              "cost": {"kind": "l1"}},
        seed=77, train={"global_batch_size": 48, "dtype": "bf16"}, license="mit",
    )  # fmt: skip
    card = model_card(GENERATOR, Run(config, {"frechet": 12.3456789, "share": 1}, 6))
    head, text = parts(card)
    assert head["license"] == "mit" and head["pipeline_tag"] == "image-to-image"
    found = rows(card)
    assert found["source data"] == f"`{tmp_path}/cats`, 5,153 samples, SHA-256 of its manifest `{sha256_of(manifest)}`"
    assert found["λ, weight of the transport cost"] == "`0.125`"
    expected = {"weighting": "sigma2", "transport cost": "l1", "fake-score updates an iteration": 3, "seed": 77,
                "noise level that the generator reads": 1.5, "step": 7, "batch size": 48, "precision": "bf16",
                "target class": 2}  # fmt: skip
    assert {name: found[name] for name in expected} == {name: f"`{value}`" for name, value in expected.items()}
    assert found["teacher"].startswith("`runs/dogs/export`")
    assert "## Metrics at step 6" in text and (found["`frechet`"], found["`share`"]) == ("12.35", "1")
    assert "source `shards/cats/test`" in text
    assert 'load_generator("DIR")' in text and "rdmd_fast 0" in text


def test_range_of_weights():
    config = GENERATOR.model_copy(update={"transport_weights": [0.01, 2.0]})
    run = Run(resolved(rdmd={"transport_weight": {"log_uniform": [0.01, 2.0]}}))
    assert rows(model_card(config, run))["λ, weight of the transport cost"] == "`log-uniform in [0.01, 2.0]`"
    assert "from 0.01 to 2," in model_card(config, run)
    assert '"transport_weight": w' in model_card(config, run, graph="onnx")
    assert "generator(x, w)" in model_card(config, run, graph="torch-export")


def test_teacher_stage_and_unknown_facts():
    config = resolved(stage="teacher", data={"target": {"toy": "8gaussians"}}, teacher=None,
                      network={"kind": "mlp"})  # fmt: skip
    found = rows(model_card(TEACHER, Run(config)))
    assert found["target data"].startswith("toy `8gaussians`")
    assert not {"λ, weight of the transport cost", "teacher", "source data"} & found.keys()
    for card in (model_card(TEACHER), model_card(GENERATOR, Run({"data": 3})), model_card(TEACHER, Run({"rdmd": []}))):
        assert "license" not in parts(card)[0]


def test_hostile_names_are_text():
    config = resolved(data={"source": "shards/cats"}, license="MIT; see |`x`")
    config |= {"data": {"source": HOSTILE, "target_class": HOSTILE}, "seed": HOSTILE, "teacher": HOSTILE}
    card = model_card(GENERATOR, Run(config, {HOSTILE: 1.0}, 3))
    head, text = parts(card)
    assert head["license"] == "other" and head["license_name"] == "MIT; see |`x`"
    assert "\n# <script>" not in text and text.count("\n---\n") == 0
    assert rows(card)["seed"] == code(HOSTILE) and rows(card)["target class"] == code(HOSTILE)
    inside = code(HOSTILE)
    assert "\n" not in inside and "|" not in inside
    assert inside.startswith("``` ") and inside.endswith(" ```") and "```" not in inside[3:-3]
    for license in (HOSTILE, "a\nlicense: mit", "[1, 2]", "{a: b}"):
        head, _ = parts(model_card(GENERATOR, None, license))
        assert head["license"] == "other" and isinstance(head["license_name"], str)


@pytest.mark.parametrize(("spec", "expected"), [
    ("https://user:secret@host/shards?token=secret", "`https://host/shards`"),
    ("https://host/shards?token=a@secret", "`https://…`"),
    ("https://host/shards#secret", "`https://host/shards`"),
    ("HTTPS://user:secret@host/shards", "`HTTPS://host/shards`"),
    ("s3://AKIA:se/cret@bucket/x.tar", "`s3://bucket/x.tar`"),
    ("s3://AKIA:se?cret@bucket/x.tar", "`s3://…`"),
    ("pipe:aws s3 cp --key secret -", "samples from a command"),
    ("pipe:curl -H 'X: a::secret' u", "samples from a command"),
    ("a::PIPE:curl -H secret", "samples from a command"),
    (["a", "pipe:curl -H 'X: a::secret' u"], "`a`; samples from a command"),
    (["a::https://u:secret@host/b"], "`a`; `https://host/b`"),
    (["a", "b"], "`a`; `b`"),
    ("a::b", "`a`; `b`"),
])  # fmt: skip
def test_data_without_its_keys(spec, expected):
    assert data_facts(spec) == expected


@pytest.mark.parametrize(("front", "license"), [
    ("license: apache-2.0", "apache-2.0"),
    ("tags:\n- a\nlicense: 'openrail'\n", "openrail"),
    ("license: other\nlicense_name: my-terms", "my-terms"),
    ("title: license", None),
    ("license:", None),
])  # fmt: skip
def test_licence_of_a_diffusers_folder(tmp_path, front, license):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text("{}")
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# Model\nlicense: mit\n")
    assert stated_license(tmp_path / "README.md") == license
    card = model_card(GENERATOR, Run(resolved(teacher=str(tmp_path))))
    head, text = parts(card)
    assert head.get("license_name", head.get("license")) == license
    assert "a diffusers folder" in text and ("Not stated" in text) == (license is None)


def test_licence_goes_from_teacher_to_generator(tmp_path):
    """An EDM pickle's, through the export that `rdmd import-edm` writes of it."""
    card = model_card(TEACHER, Run({"teacher": "edm-afhqv2-64x64-uncond-vp.pkl"}))
    assert parts(card)[0]["license"] == EDM_LICENSE
    (tmp_path / "README.md").write_text(card)
    run = Run(resolved(teacher=str(tmp_path)))
    assert parts(model_card(GENERATOR, run))[0]["license"] == EDM_LICENSE
    assert "no commercial use" in model_card(GENERATOR, run)
    assert parts(model_card(GENERATOR, run, "mit"))[0]["license"] == "mit"  # whoever exports has the last word
    toy = {"toy": "gaussian"}
    analytic = resolved(
        teacher="analytic", data={"source": toy, "target": toy}, generator={"kind": "mlp"}, network={"kind": "mlp"}
    )
    assert "license" not in parts(model_card(GENERATOR, Run(analytic)))[0]


def test_last_validation_up_to_a_step(tmp_path):
    lines = [{"step": 1, "validation": {"l2": 1.0}}, {"step": 2, "loss": 0.5}, {"step": 3, "validation": {"l2": 3.0}}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert last_validation(tmp_path, 2) == ({"l2": 1.0}, 1)
    assert last_validation(tmp_path, None) == ({"l2": 3.0}, 3)
    assert last_validation(tmp_path / "none", 2) == ({}, None)
