"""The table at the end of a call of run_gpu.sh, of the JSON that its parts have left.

python -m benchmarks.gpu_summary 1|2|3 [FOLDER]
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from benchmarks.report import by_case, load_rows

MIB = 2**20
ABSENT = "not measured"
# github.com/tianweiy/DMD2, experiments/imagenet/README.md and its scripts: ADM at 64×64 in bf16, 7 × 40 samples an
# iteration, of them one in five with a generator update; 200k iterations in 53 h, 410k (without GAN) in 70 h.
DMD2 = "DMD2 has published 42 to 65 a GPU, on A100s: other hardware"


def read(folder: Path, name: str):
    """Contents of a file of results; None if it is not there."""
    file = folder / name
    return json.loads(file.read_text()) if file.exists() else None


def correctness(folder: Path) -> Iterator[str]:
    kept = read(folder, "correctness.json")
    if kept is None:
        yield f"kernels against their references: {ABSENT}"
        return
    totals = {
        outcome: sum(counts[outcome] for counts in kept["tests"].values())
        for outcome in ("passed", "failed", "skipped")
    }
    cut = "" if kept["finished"] else ", CUT OFF"
    yield (
        f"kernels against their references: {', '.join(f'{count} {name}' for name, count in totals.items())} "
        f"in {kept['seconds']:.0f} s{cut}"
    )
    bits = [counts for name, counts in kept["tests"].items() if "has_the_bits" in name]
    equal = (
        "no" if any(counts["failed"] for counts in bits) else f"yes, in {sum(each['passed'] for each in bits)} tests"
    )
    yield f"noise bit-equal to the CPU's: {equal if bits else ABSENT}"
    failures = list(kept["failures"].items())
    yield from (f"  {name.rpartition('::')[2]}: {error}"[:100] for name, error in failures[:6])
    if len(failures) > 6:
        yield f"  and {len(failures) - 6} more in correctness.json"


def peaks(folder: Path) -> Iterator[str]:
    kept = read(folder, "peaks.json")
    if kept is None:
        yield f"memory bandwidth, matrix products: {ABSENT}"
        return
    products = ", ".join(f"{rate / 1e12:.0f} in {name}" for name, rate in kept["matmul"].items())
    yield f"copies {kept['copy_bandwidth'] / 1e9:.0f} GB/s; matrix products, TFLOP/s: {products} (fp32 as TF32)"


def kernels(folder: Path) -> Iterator[str]:
    file = folder / "kernels_largest.json"
    if not file.exists():
        yield f"kernels at their largest sizes: {ABSENT}"
        return
    yield f"{'operation':<27}{'case':<24}{'MB':>7}{'us':>9}{'GB/s':>7}{'% copy':>8}{'eager':>8}{'compiled':>10}"
    for (operation, case), measured in by_case(load_rows(file)).items():
        if (ours := measured.get("ours")) is None:
            continue
        others = [
            f"{measured[name]['us'] / ours['us']:.2f}" if name in measured else "-" for name in ("eager", "compile")
        ]
        yield (
            f"{operation:<27}{case:<24}{ours['bytes'] / 1e6:>7.1f}{ours['us']:>9.1f}{ours['GBps']:>7.0f}"
            f"{ours['percent_of_copy']:>8.1f}{others[0]:>8}{others[1]:>10}"
        )
    yield "eager, compiled: how many times ours the plain formulation takes, as written and under torch.compile"


SIDES = ("ours", "plain", "plain_fp32", "ours_compiled", "plain_compiled")


def step_lines(entry: dict) -> Iterator[str]:
    predicted = entry["predicted_bytes"] / MIB
    batch = f"batch {entry['batch']}, {entry['fake_updates']} fake updates"
    yield f"{entry['case']}, {entry['dtype']}, {batch}; memory as predicted for ours {predicted:.1f} MiB"
    titles = (
        ("ms", 9),
        ("images/s", 10),
        ("MFU", 7),
        ("peak MiB", 10),
        ("of predicted", 14),
        ("waits", 7),
        ("launches", 10),
    )
    yield " " * 18 + "".join(f"{title:>{width}}" for title, width in titles)
    for name in SIDES:
        if (row := entry.get(name)) is None:
            continue
        share = f"{row['peak_bytes'] / MIB / predicted:.0%}" if name.startswith("ours") else "-"
        yield (
            f"  {name:<16}{row['seconds'] * 1e3:>9.2f}{row['images_per_second']:>10.1f}{row['mfu']:>7.1%}"
            f"{row['peak_bytes'] / MIB:>10.1f}{share:>14}{row['host_syncs']:>7}{row['launches']:>10}"
        )


def step(folder: Path) -> Iterator[str]:
    entries = read(folder, "step_songunet64.json")
    if entries is None:
        yield f"training step of SongUNet: {ABSENT}"
        return
    [entry] = entries
    yield from step_lines(entry)
    for our, ratios in entry["ratios"].items():
        if ratios:
            yield f"  {our}: {', '.join(f'{ratio:.2f} times {name}' for name, ratio in ratios.items())}"
    for who, count in entry["ours"]["host_syncs_of"].items():
        yield f"  waits of {who}: {count}"
    phases = entry["phases"]
    listing = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in phases.items())
    yield from textwrap.wrap(f"ours by phase, ms: {listing}", 98, initial_indent="  ", subsequent_indent="    ")
    yield from (f"  {name}: {ABSENT}" for name in SIDES if name not in entry and name != "plain_fp32")


def determinism(folder: Path) -> Iterator[str]:
    kept = read(folder, "determinism.json") or {}
    words = {True: "yes", False: "NO", None: ABSENT}
    yield f"train.deterministic=true: two runs end bit for bit alike: {words[kept.get('alike')]}"
    yield f"  a run that was killed and went on ends as one that was not: {words[kept.get('resumed_alike')]}"
    usual, exact = (read(folder, f"step_{name}.json") for name in ("as_usual", "deterministic"))
    if not usual or not exact:
        yield f"  its cost: {ABSENT}"
        return
    before, after = (entries[0]["ours"]["seconds"] * 1e3 for entries in (usual, exact))
    case, more = usual[0]["case"], after / before - 1
    yield f"  its cost, a step of {case}: {before:.2f} ms without, {after:.2f} with it, {more:+.1%}"


def adm(folder: Path) -> Iterator[str]:
    entries = read(folder, "step_adm64.json")
    if entries is None:
        yield f"training step of ADM: {ABSENT}; {DMD2}"
        return
    [entry] = entries
    yield from step_lines(entry)
    # Each of DMD2's iterations is a fake update on a batch of its own.
    counted = entry["ours"]["images_per_second"] * entry["fake_updates"]
    yield f"  {counted:.1f} images/s as DMD2 counts, a batch for each fake update;"
    yield f"  {DMD2}"


CALLS = {"1": (correctness, peaks, kernels), "2": (step,), "3": (determinism, adm)}


def summary(call: str, folder: Path) -> list[str]:
    return [line for part in CALLS[call] for line in part(folder)]


if __name__ == "__main__":
    call, folder = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "benchmarks/results/gpu")
    print(f"-- run_gpu.sh {call}, {folder} --", *summary(call, folder), sep="\n")
