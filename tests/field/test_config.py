"""What people write into configurations: things twice, texts that YAML misreads, DeepSpeed's keys, paths."""

import os
from pathlib import Path

import pytest
import yaml

from rdmd_fast import cli
from rdmd_fast.config import check_compatible, dump_config, load_config, validate_config
from rdmd_fast.engine.deepspeed_section import section_problems
from rdmd_fast.errors import InputError
from rdmd_fast.studies.options import load_study
from rdmd_fast.trainer import main
from rdmd_fast.yaml_values import dump_values, read_values

ROOT = Path(__file__).parents[2]
EARLIER = ROOT / "tests/fixtures/version_0_1_099ac61"
BASE = "stage: teacher\nrun_dir: run\ndata: {target: {toy: 8gaussians}}\nnetwork: {kind: mlp}\n"


@pytest.fixture
def config(tmp_path, monkeypatch):
    """``config(text)`` writes config.yaml of a toy teacher and ``text`` into the working folder; returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(text="", base=BASE):
        Path("config.yaml").write_text(base + text)
        return "config.yaml"

    return write


def refusal(*arguments):
    with pytest.raises(InputError) as caught:
        load_config(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- said twice --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "line", "first"),
    [
        ("train: {steps: 300}\ntelemetry: {log_every: 10}\ntrain: {dtype: bf16}\n", "train", 7, 5),
        ("telemetry:\n  log_every: 3\n  sample_every: 4\n  log_every: 5\n", "log_every", 8, 6),
        ("train: {steps: 1,\n  guard: {skip_above: 2, skip_above: 3}}\n", "skip_above", 6, 6),
        ("train: {steps: 1, 'steps': 1}\n", "steps", 5, 5),
        ("checkpoint: {<<: {every: 1}, <<: {keep: 2}}\n", "<<", 5, 5),
    ],
)
def test_a_key_that_stands_twice_is_named_with_both_its_lines(config, text, key, line, first):
    said = refusal(config(text))
    assert said.startswith("config config.yaml: ")
    assert f"at line {line} ({key} stands at line {first} already" in said


def test_a_key_beside_a_merged_mapping_overrides_it(config):
    text = "checkpoint: &often {every: 7, keep: 3}\nvalidation: {<<: {every: 5, count: 9}, every: 6}\n"
    loaded = load_config(config(text))
    assert (loaded.checkpoint.keep, loaded.validation.every, loaded.validation.count) == (3, 6, 9)


def test_overrides_say_a_key_once_and_the_last_of_them_counts(config):
    said = refusal(config(), ["train={steps: 1, steps: 2}"])
    assert said.startswith("override 'train={steps: 1, steps: 2}'") and "steps stands" in said
    assert load_config(config(), ["train.steps=1", "train.steps=2"]).train.steps == 2


def test_studies_are_read_alike(tmp_path):
    study = ROOT / "configs/digits/study.yaml"
    assert load_study(study, ["judge=010 #2"]).judge == "010 #2"
    (tmp_path / "study.yaml").write_text(study.read_text() + "held_out: 5\nheld_out: 6\n")
    with pytest.raises(InputError, match="held_out stands at line"):
        load_study(tmp_path / "study.yaml")


# -- texts and numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "runs/a #2",
        "010",
        "yes",
        "off",
        "1e3",
        "0x10",
        "12:30",
        "1_000",
        "2026-01-31",
        "a: b",
        "[1",
        "{a}",
        "*",
        "&a",
        "!!int",
    ],
)
def test_the_text_of_an_override_is_taken_as_it_stands(config, text):
    loaded = load_config(config(), [f"run_dir={text}", f"telemetry.wandb_project={text}"])
    assert loaded.run_dir == loaded.telemetry.wandb_project == text


def test_quotes_lists_sections_and_null_of_an_override_are_yamls(config):
    data = load_config(config(), ["data.source=[010, 'b # c']", "data.target_holdout='x y'", "license=null"])
    assert (data.data.source, data.data.target_holdout, data.license) == (["010", "b # c"], "x y", None)
    assert load_config(config(), ["data.source={toy: circles}"]).data.source.toy == "circles"
    assert load_config(config(), ["data.source={a,b}/*.tar"]).data.source == "{a,b}/*.tar"
    assert "run_dir: input should be a valid string, found None" in refusal(config(), ["run_dir=null"])


def test_texts_of_a_file_are_kept_where_yaml_reads_numbers_dates_and_booleans(config):
    text = "license: 2026-01-31\ntelemetry: {wandb_project: 010}\nvalidation: {best_by: yes}\n"
    loaded = load_config(config(text))
    assert (loaded.license, loaded.telemetry.wandb_project) == ("2026-01-31", "010")
    assert loaded.validation.best_by == "yes"
    assert "found 'off'" in refusal(config(), ["train.dtype=off"])


@pytest.mark.parametrize(
    ("text", "number"), [("010", 10), ("08", 8), ("1_000", 1000), ("0x10", 16), ("0b11", 3), ("+5", 5)]
)
def test_numbers_are_decimal_unless_they_say_otherwise(config, text, number):
    assert load_config(config(), [f"seed={text}"]).seed == number
    assert load_config(config(f"seed: {text}\n")).seed == number


@pytest.mark.parametrize("text", ["12:30", "0o17", "1e3", "yes"])
def test_what_is_no_whole_number_is_refused(config, text):
    assert "seed: input should be a valid integer" in refusal(config(), [f"seed={text}"])


def test_booleans_and_floats_are_read_as_before(config):
    loaded = load_config(config(), ["data.flip=yes", "teacher_stage.optimizer.lr=1e-4"])
    assert (loaded.data.flip, loaded.teacher_stage.optimizer.lr) == (True, 1e-4)


def test_what_is_written_is_read_back(config, tmp_path):
    texts = ["09", "010", "1e4", "1e-4", "yes", "12:30", "null", "~", "2026-01-31", "a # b", "1_0", ""]
    values = {"texts": texts, "numbers": [9, 1e-4, 1e10, True, None]}
    (tmp_path / "values.yaml").write_text(dump_values(values))
    assert read_values(tmp_path / "values.yaml") == yaml.safe_load(dump_values(values)) == values
    loaded = load_config(config(), ["run_dir=1e3", "license=09"])
    assert load_config(config(dump_config(loaded), base="")) == loaded


# -- DeepSpeed's keys --------------------------------------------------------------------------------------------------

ZERO = "deepspeed.zero_optimization"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("deepspeed.zero_optimisation.stage=2", "did you mean deepspeed.zero_optimization?"),
        ("deepspeed.stage=2", f"unknown key deepspeed.stage, did you mean {ZERO}.stage?"),
        ("deepspeed.bfloat16.enabled=true", "deepspeed.bfloat16: set train.dtype instead"),
        ("deepspeed.torch_autocast.enabled=true", "deepspeed.torch_autocast: set train.dtype instead"),
        ("deepspeed.activation_checkpointing={}", "set train.activation_checkpointing instead"),
        ("deepspeed.pipeline.stages=2", "unknown key deepspeed.pipeline"),
        (f"{ZERO}.stages=2", f"unknown key {ZERO}.stages, did you mean {ZERO}.stage?"),
        (f"{ZERO}.stage3_prefetch_buket_size=2", f"did you mean {ZERO}.stage3_prefetch_bucket_size?"),
        (f"{ZERO}.offload_optimizer.devise=cpu", f"did you mean {ZERO}.offload_optimizer.device?"),
        (f"{ZERO}.offload_optimizer.device=gpu", f"{ZERO}.offload_optimizer.device: input should be 'none', 'cpu'"),
        (f"{ZERO}.reduce_bucket_size=auto", f"{ZERO}.reduce_bucket_size: 'auto' is filled in by transformers"),
        (f"{ZERO}.reduce_bucket_size=-1", f"{ZERO}.reduce_bucket_size: input should be greater than 0, found -1"),
        (f"{ZERO}.reduce_bucket_size=true", f"{ZERO}.reduce_bucket_size: must be a number, found True"),
        (f"{ZERO}.overlap_comm='no'", f"{ZERO}.overlap_comm: must be true or false, found 'no'"),
        (f"{ZERO}.cpu_offload=true", f"{ZERO}.cpu_offload: DeepSpeed calls it deprecated, set offload_optimizer"),
        ("deepspeed.data_types.grad_accum_dtype=float32", "grad_accum_dtype: input should be 'fp32', 'fp16' or 'bf16'"),
        ("deepspeed.steps_per_print=x", "deepspeed.steps_per_print: must be a number, found 'x'"),
    ],
)
def test_a_deepspeed_key_without_effect_ends_run_and_plan_alike(config, capsys, override, says):
    lines = set()
    for more in ([], ["--dry-run"]):
        assert main(["--config", config(), *more, override]) == 2
        lines.add(capsys.readouterr().err)
    assert len(lines) == 1 and says in lines.pop()
    assert os.listdir() == ["config.yaml"]


def test_what_deepspeed_heeds_is_accepted():
    zero = {"stage": 3, "reduce_bucket_size": 5e8, "stage3_prefetch_bucket_size": 0, "param_persistence_threshold": 10}
    section = {
        "zero_optimization": {**zero, "offload_optimizer": {"device": "cpu", "pin_memory": False}, "zenflow": None},
        "timers": {"throughput": {"enabled": True}},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": None,
        "gradient_predivide_factor": 2,
        "csv_monitor": {"enabled": True, "output_path": "csv"},
        "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
        "flops_profiler": {"enabled": True, "output_file": None},
    }
    assert not list(section_problems(section))


# -- paths -------------------------------------------------------------------------------------------------------------


def test_home_is_expanded_in_every_path(config, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    keys = ["run_dir", "teacher", "data.source", "data.target_holdout", "data.cache_dir", "telemetry.decoder"]
    text = "run_dir: ~/runs/x\nstage: teacher\ndata: {target: [~/a, b]}\n"
    loaded = load_config(config(text, base=""), [f"{key}=~/x" for key in keys])
    found = loaded.model_dump()
    for key in keys:
        section, _, leaf = key.rpartition(".")
        assert (found[section] if section else found)[leaf] == "/home/me/x", key
    assert loaded.data.target == ["/home/me/a", "b"]
    assert load_config(config(), ["data.source=~/a::b/~::~/c"]).data.source == "/home/me/a::b/~::/home/me/c"


@pytest.mark.parametrize("name", ["$SCRATCH", "${SCRATCH}", "~nobody.here"])
def test_what_only_a_shell_expands_is_said_unless_a_file_is_called_so(config, name):
    os.environ.pop("SCRATCH", None)
    for key in ("run_dir", "teacher", "data.target", "data.cache_dir", "validation.judge"):
        said = refusal(config(), [f"{key}={name}/x"])
        assert f"{key}: {name}/x: only a shell expands {name}, outside single quotes" in said
    Path(name).mkdir()
    assert load_config(config(), [f"run_dir={name}/x"]).run_dir == f"{name}/x"
    assert load_config(config(), ["run_dir=costs$5/~b"]).run_dir == "costs$5/~b"


@pytest.mark.parametrize("address", ["s3://bucket/run", "gs://bucket/run", "file:///tmp/run", "S3://bucket/run"])
def test_an_address_is_refused_where_a_folder_is_meant(config, address):
    for key in ("run_dir", "teacher", "data.cache_dir"):
        assert f"{key}: {address}: " in refusal(config(), [f"{key}={address}"])


@pytest.mark.parametrize("spec", ["s3://b/{0..9}.tar", "hf://x/y", "https://h/a?b=$c", "pipe:cat $HOME/a.tar # all"])
def test_data_are_brought_from_where_they_were(config, spec):
    assert load_config(config(), [f"data.source={spec}"]).data.source == spec


def test_a_link_to_what_is_gone_is_called_one(config):
    where = config()
    os.symlink("/purged/run", "link")
    for override in ("run_dir=link", "teacher=link/export", "data.target=link/*.tar", "data.target=[a, link]"):
        assert ": link: is a link to /purged/run, which is not there" in refusal(where, [override])
    with pytest.raises(SystemExit) as ended:
        cli.main(["sample", "--model", "link", "--out", "x"])
    assert ended.value.code == 2


def test_options_of_commands_are_paths_too(config, rdmd, monkeypatch, capfd):
    config()
    monkeypatch.setenv("HOME", str(Path.cwd()))
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", "--model", "$RUN/export", "--source", "a", "--target", "b"])
    assert ended.value.code == 2
    assert "argument --model: $RUN/export: only a shell expands $RUN" in capfd.readouterr().err
    done = rdmd("evaluate", "--run=~/run")
    assert done.status == 2 and f"{Path.cwd()}/run: no run there" in done.err


# -- what earlier versions wrote ---------------------------------------------------------------------------------------


def test_configurations_of_earlier_versions_mean_what_they_did():
    for name in ("rdmd.yaml", "teacher.yaml", "run/config.yaml"):
        path = EARLIER / name
        assert load_config(path) == validate_config(yaml.safe_load(path.read_text()), "earlier")


def test_a_run_goes_on_whatever_its_free_sections_were_checked_for(config):
    saved = load_config(config()).model_dump(mode="json")
    saved |= {"run_dir": "s3://bucket/run", "deepspeed": {"stage": 2}}
    del saved["data"]["flip"]
    now = load_config(config()).model_dump(mode="json")
    check_compatible(Path("checkpoint"), {"config": saved}, now, {})
