"""The three calls of benchmarks/run_gpu.sh at toy size, on the stand-in."""

import json

import pytest

from tests.gpu_stand_in.child import run_script

pytestmark = [pytest.mark.gpu_stand_in, pytest.mark.timeout(1800)]


@pytest.fixture
def call(tmp_path):
    """``call(number)`` makes a call; gives what it prints and, by name, what its parts have kept."""

    def make(number):
        said = run_script("benchmarks/run_gpu.sh", number, RESULTS=str(tmp_path / "results"), RUN_GPU_SIZE="toy")
        table = said[said.index("-- run_gpu.sh") :].splitlines()
        assert len(table) <= 40 and max(map(len, table)) <= 100
        assert "FAILED" not in said and "CUT OFF" not in said and "not measured" not in said
        return table, {file.stem: json.loads(file.read_text()) for file in (tmp_path / "results").glob("*.json")}

    return make


def test_first_call_says_that_kernels_are_right_and_how_fast_they_are(call):
    table, kept = call("1")
    one = {"passed": 1, "failed": 0, "skipped": 0}
    assert kept["correctness"]["tests"] == {"test_averaging": one, "test_noise_has_the_bits_of_the_cpu": one}
    assert kept["correctness"]["finished"] and not kept["correctness"]["failures"]
    assert kept["peaks"]["copy_bandwidth"] > 0 and set(kept["peaks"]["matmul"]) == {"fp32", "bf16"}
    rows = [row["extra_info"] for row in kept["kernels_largest"]["benchmarks"]]
    assert [(row["operation"], row["implementation"]) for row in rows] == [
        ("denoising_gradient", "ours"), ("denoising_gradient", "eager"),
    ]  # fmt: skip
    assert "2 passed, 0 failed" in table[1] and table[2].endswith("yes, in 1 tests")
    assert any(line.startswith("denoising_gradient") for line in table)


def test_second_call_sets_the_step_beside_the_plain_one_written_and_compiled(call):
    table, kept = call("2")
    [entry] = kept["step_songunet64"]
    for side in ("ours", "plain", "ours_compiled", "plain_compiled"):
        assert entry[side]["images_per_second"] == pytest.approx(entry["batch"] / entry[side]["seconds"])
        assert entry[side]["peak_bytes"] > 0 and entry[side]["mfu"] > 0
        assert [line for line in table if line.split()[0] == side]
    assert set(entry["losses"]) == {"ours", "ours_compiled"}
    # What the allocator holds at its height is what --dry-run says, but for what is not counted there.
    assert entry["ours"]["peak_bytes"] == pytest.approx(entry["predicted_bytes"], rel=0.1)


def test_third_call_says_that_runs_end_alike_and_what_that_costs(call):
    table, kept = call("3")
    assert kept["determinism"]["alike"] and kept["determinism"]["resumed_alike"]
    assert kept["step_as_usual"][0]["set"] == [] and kept["step_deterministic"][0]["set"] == [
        "train.deterministic=true"
    ]
    [adm] = kept["step_adm64"]
    assert adm["fake_updates"] == 5
    assert f"{5 * adm['ours']['images_per_second']:.1f} images/s as DMD2 counts" in table[-2]
