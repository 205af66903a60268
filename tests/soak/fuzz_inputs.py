"""Mutated inputs of every kind against the real entry points: no traceback, no hang, no memory blow-up, nothing run.

    python tests/soak/fuzz_inputs.py --jobs 2 --out fuzz_findings
    python tests/soak/fuzz_inputs.py --only exports:137 --seed 0      (one case again, with what it says)

Each case is a few mutations of a sound input, drawn from (seed, kind, number), and runs in a process forked from one
that has imported everything. It must end with status 0 or 2, within the time and the memory, and say one line on 2.
What does not is printed with its number, reduced to the mutations that it needs, and kept under --out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("MPLCONFIGDIR", tempfile.gettempdir())
sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (0, 2, 1)]

import fuzz_sandbox as sandbox  # noqa: E402

MOST_MUTATIONS = 3
DEFAULTS = {"configs": 1500, "exports": 600, "diffusers": 600, "pickles": 600, "shards": 600, "pictures": 500}
DEFAULTS |= {"checkpoints": 600}


@dataclass
class Tally:
    """What a kind's cases came to."""

    cases: int = 0
    done: int = 0
    refused: int = 0
    other: int = 0
    seconds: float = 0.0
    bytes: int = 0
    largest: int = 0  # the case that took the most
    findings: list[dict] = field(default_factory=list)


def kinds(material) -> dict:
    from fuzz_configs import Checkpoints, Configs
    from fuzz_networks import Diffusers, Exports, Pickles
    from fuzz_pictures import Pictures
    from fuzz_shards import Shards

    every = (Configs, Exports, Diffusers, Pickles, Shards, Pictures, Checkpoints)
    return {kind.name: kind for kind in (each(material) for each in every)}


def plan_of(kind, seed: int, number: int) -> dict:
    """The case as data: how it starts, and (mutation, seed) of each change."""
    chance = random.Random(f"{seed} {kind.name} {number}")
    names, weights = zip(*kind.weights.items(), strict=True)
    count = chance.choice([1, 1, 1, 2, MOST_MUTATIONS])
    mutations = [(name, chance.randrange(2**31)) for name in chance.choices(names, weights, k=count)]
    return {"number": number, "start": chance.randrange(2**31), "mutations": mutations}


def run_plan(kind, plan: dict, folder: Path) -> tuple[sandbox.Outcome, list[str]]:
    """Build a case in a fresh ``folder`` and run it; returns how it ended and what was changed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    case, told, limit = kind.start(random.Random(plan["start"]), plan["number"]), [], sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)  # to write what is nested deeply
    for name, seed in plan["mutations"]:
        told.append(f"{name}: {kind.mutations[name](case, random.Random(seed))}")
    action, rules, check = kind.finish(case, folder)
    sys.setrecursionlimit(limit)
    outcome = sandbox.run(action, folder, rules, sandbox.Limits())
    if outcome.problem is None and outcome.status == 0 and check is not None:
        outcome.problem = check(outcome, folder)
    return outcome, told


def reduce_plan(kind, plan: dict, problem: str, folder: Path) -> dict:
    """The plan without mutations that the finding does not need."""
    for index in reversed(range(len(plan["mutations"]))):
        fewer = plan | {"mutations": plan["mutations"][:index] + plan["mutations"][index + 1 :]}
        if run_plan(kind, fewer, folder)[0].problem == problem:
            plan = fewer
    return plan


def work(kind, seed: int, numbers: list[int], scratch: Path, out: Path | None) -> Tally:
    """Run the cases ``numbers`` of a kind; a finding is reduced and kept the first time that it is met here."""
    tally, seen = Tally(), set()
    folder = scratch / f"{kind.name}-{os.getpid()}"
    for number in numbers:
        plan = plan_of(kind, seed, number)
        outcome, _ = run_plan(kind, plan, folder)
        tally.cases += 1
        tally.done += outcome.status == 0
        tally.refused += outcome.status == 2
        tally.other += outcome.status not in (0, 2)
        tally.seconds = max(tally.seconds, outcome.seconds)
        tally.bytes, tally.largest = max((tally.bytes, tally.largest), (outcome.bytes, number))
        if outcome.problem is None:
            continue
        finding = {"kind": kind.name, "number": number, "problem": outcome.problem}
        if outcome.problem not in seen:
            seen.add(outcome.problem)
            plan = reduce_plan(kind, plan, outcome.problem, folder)
            outcome, told = run_plan(kind, plan, folder)
            finding |= {"mutations": told, "stderr": outcome.stderr[-4000:]}
            print(f"FINDING {kind.name}:{number} {finding['problem']}  [{'; '.join(told)[:300]}]", flush=True)
            if out is not None:
                keep(folder, out / f"{kind.name}-{number}", finding | {"plan": plan, "seed": seed})
        tally.findings.append(finding)
    shutil.rmtree(folder, ignore_errors=True)
    return tally


def keep(folder: Path, target: Path, finding: dict) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)

    # Pipes and devices cannot be copied; the plan makes them again.
    def special(parent: str, names: list[str]) -> list[str]:
        return [name for name in names if (Path(parent) / name).is_fifo()]

    shutil.copytree(folder, target / "input", symlinks=True, ignore=special)
    sandbox.save_json(target / "finding.json", finding)


def merge(tallies: list[Tally]) -> Tally:
    whole = Tally()
    for each in tallies:
        for name in ("cases", "done", "refused", "other", "findings"):
            setattr(whole, name, getattr(whole, name) + getattr(each, name))
        whole.seconds = max(whole.seconds, each.seconds)
        whole.bytes, whole.largest = max((whole.bytes, whole.largest), (each.bytes, each.largest))
    return whole


def spread(kind, arguments, count: int, scratch: Path) -> Tally:
    """All cases of a kind over the jobs."""
    context = multiprocessing.get_context("fork")
    jobs = []
    for job in range(arguments.jobs):
        numbers, result = list(range(job, count, arguments.jobs)), scratch / f"{kind.name}-{job}.json"

        def live(numbers=numbers, result=result) -> None:
            sandbox.save_json(result, asdict(work(kind, arguments.seed, numbers, scratch, arguments.out)))

        jobs.append((context.Process(target=live), result))
        jobs[-1][0].start()
    for child, _ in jobs:
        child.join()
    if not all(result.exists() for _, result in jobs):
        raise SystemExit(f"{kind.name}: the fuzz itself failed, see above")
    return merge([Tally(**json.loads(result.read_text())) for _, result in jobs])


def again(kind, arguments, number: int, scratch: Path) -> int:
    """One case, with everything that it says."""
    plan = plan_of(kind, arguments.seed, number)
    outcome, told = run_plan(kind, plan, scratch / "again")
    print("\n".join(told), outcome.stdout[-3000:], outcome.stderr, sep="\n")
    print(f"status {outcome.status}, {outcome.seconds:.2f} s, {outcome.bytes >> 20} MiB")
    print(outcome.problem or "as it should be")
    if outcome.problem and arguments.out is not None:
        keep(scratch / "again", arguments.out / f"{kind.name}-{number}", {"problem": outcome.problem, "plan": plan})
    return int(outcome.problem is not None)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=count, metavar="N", help=f"cases ({count})")
    parser.add_argument("--seed", type=int, default=0, help="of all mutations (0)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (one a core)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where inputs of findings are kept")
    parser.add_argument("--edm", type=Path, metavar="DIR", help="a folder of EDM .pkl files to mutate beside our own")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="one case again")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rdmd_fuzz_") as name:
        from fuzz_material import Material

        scratch = Path(name).resolve()
        material = Material(scratch / "material", arguments.edm)
        every = kinds(material)
        if arguments.only:
            kind, _, number = arguments.only.partition(":")
            return again(every[kind], arguments, int(number), scratch)
        tallies = {}
        for kind in every.values():
            count = getattr(arguments, kind.name)
            if count:
                tallies[kind.name] = spread(kind, arguments, count, scratch)
                print(row(kind.name, tallies[kind.name]), flush=True)
    report(tallies, arguments, time.monotonic() - begin)
    return int(any(tally.findings for tally in tallies.values()))


def report(tallies: dict[str, Tally], arguments, seconds: float) -> None:
    problems = {}
    for tally in tallies.values():
        for finding in tally.findings:
            problems.setdefault((finding["kind"], finding["problem"]), []).append(finding["number"])
    for (kind, problem), numbers in sorted(problems.items()):
        print(f"{kind:<12} {len(numbers):>5} × {problem}  (--only {kind}:{min(numbers)} --seed {arguments.seed})")
    heads = ("cases", "exit 0", "exit 2", "other", "findings", "worst s", "worst MiB", "of case")
    print("\n" + " ".join([f"{'kind':<12}", *(f"{head:>9}" for head in heads)]))
    for kind, tally in tallies.items():
        print(row(kind, tally))
    print(json.dumps({"seed": arguments.seed, "seconds": round(seconds, 1)}))


def row(kind: str, tally: Tally) -> str:
    counts = (tally.cases, tally.done, tally.refused, tally.other, len(tally.findings))
    return " ".join(
        [
            f"{kind:<12}",
            *(f"{count:>9}" for count in counts),
            f"{tally.seconds:>9.2f}",
            f"{tally.bytes / 2**20:>9.0f}",
            f"{tally.largest:>9}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
