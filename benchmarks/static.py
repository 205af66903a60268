"""What can be known of the kernels without a GPU: registers, spills, access width, launches and bytes moved.

    python -m benchmarks.static [--json FILE] [--markdown] [--kernels FILE.py] [--arch N …] [--jobs N]

Every ``StaticCase`` of tests/kernels/static_cases.py is compiled ahead of time for five architectures; ptxas reports
registers and spills, the PTX tells the width of each argument's accesses. Launches and bytes of a training turn are
counted by benchmarks/traffic.py. Exit status 1 if a limit is broken: spills, atomics, access width, registers, bytes,
launches.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CASES = ROOT / "tests/kernels/static_cases.py"
ARCHITECTURES = (80, 89, 90, 100, 120)
MAX_REGISTERS = 128  # at 128 threads a block four blocks fit an SM, enough to hide the latency of streaming
# By Triton's version, below which: 3.6's assembler stores one register once, and reads it once, in four of the cases.
SPILLS = {(3, 7): 8}
VECTOR_BYTES = 16
# Arguments of one number a sample, a channel or a chunk, or one at all: the width of their accesses does not matter.
NARROW = re.compile(
    r"seed|positions|table|\w*partials|statistics|losses|residuals"
    r"|weights?|bias|x_bias|second|sums|scale|shift|addend|contributions|modulation|slopes"
)

# Bytes over N (one fp32 batch) and launches that a turn may cost outside its networks.
TURN_LIMITS = {"generator": (6.0, 3), "generator_uniform": (6.0, 3), "generator_dmd": (7.5, 3), "fake": (4.0, 3)}

_USED = re.compile(r"Used (\d+) registers")
_SPILLED = re.compile(r"(\d+) bytes spill (?:stores|loads)")
_ATOMIC = re.compile(r"^\s*(?:@!?%\w+\s+)?((?:atom|red)\.\S+)", re.MULTILINE)
_PARAMETER = re.compile(r"ld\.param\.\S+\s+(%\w+), \[\w+_param_(\d+)\]")
_ACCESS = re.compile(r"\b(ld|st)\.global(\.\S+)\s+(.*)")
_WIDTH = re.compile(r"(?:\.v(\d))?\.[bfus](\d+)$")
_INSTRUCTION = re.compile(r"^\s*(?:@!?%\w+\s+)?[a-z][\w.:]*\s+(%\w+), (.*);")
_REGISTER = re.compile(r"%\w+")


def access_widths(ptx: str, arguments: list[str | None]) -> dict[str, int]:
    """Bytes of the widest global access made through each pointer argument.

    Pointers are followed from ``ld.param`` through the address arithmetic; one chosen at run time among several
    counts for all of them, one read from memory is "by way of" the argument that led there.

    Args:
        ptx: text of one kernel.
        arguments: the arguments that are no constants, in order: a pointer's name, or None for a number.
    """
    origins: dict[str, frozenset[str]] = {}
    widths: dict[str, int] = {}
    for line in ptx.splitlines():
        if parameter := _PARAMETER.search(line):
            register, index = parameter[1], int(parameter[2])
            if index < len(arguments) and arguments[index]:  # Triton appends scratch pointers of its own
                origins[register] = frozenset((arguments[index],))
        elif access := _ACCESS.search(line):
            address = access[3][access[3].index("[") :].split("]")[0]
            count, bits = _WIDTH.search(access[2]).groups()
            width = int(count or 1) * int(bits) // 8
            names = frozenset().union(*(origins.get(r, frozenset()) for r in _REGISTER.findall(address)))
            for name in names:
                widths[name] = max(width, widths.get(name, 0))
            if access[1] == "ld" and bits == "64":  # what is loaded may be an address itself
                loaded = frozenset(f"by way of {name}" for name in names)
                origins.update(dict.fromkeys(_REGISTER.findall(access[3].split("[")[0]), loaded))
        elif instruction := _INSTRUCTION.match(line):
            sources = (origins.get(r, frozenset()) for r in _REGISTER.findall(instruction[2]))
            origins[instruction[1]] = origins.get(instruction[1], frozenset()).union(*sources)
    return widths


def source_and_options(case) -> tuple:
    """What ``triton.compile`` takes for a case."""
    from triton.compiler import ASTSource

    names = list(case.signature)
    source = ASTSource(
        case.kernel,
        dict(case.signature),
        {(names.index(name),): value for name, value in case.constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible_by_16},
    )
    return source, {name: getattr(case, name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}


def compile_case(case, architectures: Sequence[int]) -> list[dict]:
    """Registers, spill bytes, atomics and access widths of one case on each architecture (80 for sm_80).

    Triton's own IR, which half of the time goes into, is the same for all of them.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    source, options = source_and_options(case)
    records = []
    with tempfile.NamedTemporaryFile("w", suffix=".ttir") as file:
        for architecture in architectures:
            log = io.StringIO()
            with contextlib.redirect_stdout(log):
                compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
            records.append(_record(case, architecture, log.getvalue(), compiled.asm["ptx"]))
            if source != file.name:
                file.write(compiled.asm["ttir"])
                file.flush()
                source = file.name
    return records


def _record(case, architecture: int, log: str, ptx: str) -> dict:
    if not (used := _USED.search(log)):
        raise RuntimeError(f"{case.name}: no ptxas log; set TRITON_DUMP_PTXAS_LOG=1 and TRITON_ALWAYS_COMPILE=1")
    types = [(name, kind) for name, kind in case.signature.items() if kind != "constexpr"]
    accesses = access_widths(ptx, [name if kind[0] == "*" else None for name, kind in types])
    bulk = [width for name, width in accesses.items() if not NARROW.fullmatch(name)]
    return {
        "name": case.name,
        "arch": f"sm_{architecture}",
        "registers": int(used[1]),
        "spill_bytes": sum(map(int, _SPILLED.findall(log))),
        "vector_bytes": min(bulk or accesses.values(), default=0),
        "accesses": accesses,
        "atomics": _ATOMIC.findall(ptx),
        "must_vectorise": case.vector_pointers,
    }


def kernel_modules() -> list:
    package = importlib.import_module("rdmd_fast.kernels")
    return [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]


def static_cases(file: Path | None = None) -> list:
    """All cases, those of the kernels in one file of kernels/, or those that another file's ``static_cases`` lists."""
    of_kernels = file is not None and file.resolve().parent == ROOT / "kernels"
    source = CASES if file is None or of_kernels else file
    spec = importlib.util.spec_from_file_location(source.stem, source)
    module = importlib.util.module_from_spec(spec)
    sys.modules[source.stem] = module
    spec.loader.exec_module(module)
    cases = module.static_cases()
    if not of_kernels:
        return cases
    # An operation's kernels may lie in a file of their own: _group_norm_silu.py.
    return [case for case in cases if case.kernel.__module__.split(".")[-1].strip("_") == file.stem.strip("_")]


def uncovered_kernels(cases: list) -> list[str]:
    """Kernels (named ``*_kernel``) of which no case exists, one line each."""
    covered = {id(case.kernel) for case in cases}
    return [
        f"{module.__name__}.{name}: no static case"
        for module in kernel_modules()
        for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "arg_names") and id(value) not in covered
    ]


def most_spills() -> int:
    """Bytes that a kernel may spill under the Triton at hand."""
    import triton

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    return max((size for below, size in SPILLS.items() if version < below), default=0)


def kernel_violations(record: dict) -> list[str]:
    """What this record breaks, one line each."""
    where = f"{record['name']} on {record['arch']}"
    broken = []
    if record["spill_bytes"] > most_spills():
        broken.append(f"{where}: spills {record['spill_bytes']} bytes")
    if record["atomics"]:
        broken.append(f"{where}: results depend on the order of threads, by {record['atomics'][0]}")
    if record["registers"] > MAX_REGISTERS:
        broken.append(f"{where}: {record['registers']} registers, at most {MAX_REGISTERS}")
    if record["must_vectorise"] and record["vector_bytes"] < VECTOR_BYTES:
        broken.append(f"{where}: narrowest argument moves {record['vector_bytes']} bytes at once, want {VECTOR_BYTES}")
    return broken


def turn_violations(turns: dict) -> list[str]:
    """Which of our turns go over their limits, one line each."""
    broken = []
    for name, (bytes_over_n, launches) in TURN_LIMITS.items():
        turn = turns[name]
        if turn["bytes_over_N"] > bytes_over_n or turn["launches"] > launches:
            found = f"{turn['bytes_over_N']:.2f} N in {turn['launches']} launches"
            broken.append(f"turn {name}: {found}, at most {bytes_over_n} N in {launches}")
    return broken


_cases: list = []  # set before the workers fork: kernels cannot be pickled


def _compile(index: int, architectures: Sequence[int]) -> list[dict]:
    return compile_case(_cases[index], architectures)


def compile_all(cases: list, architectures: Sequence[int], jobs: int) -> list[dict]:
    """Records of all cases on each architecture, in that order."""
    names = [case.name for case in cases]
    if len(set(names)) != len(names):
        raise ValueError(f"static cases of one name: {sorted({n for n in names if names.count(n) > 1})}")
    _cases[:] = cases
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        listings = pool.map(partial(_compile, architectures=architectures), range(len(cases)))
        return [record for listing in listings for record in listing]


def count_turns() -> dict:
    """Bytes and launches of each turn; in a process of its own, since it interprets the kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "RDMD_KERNELS": "triton"}
    command = [sys.executable, "-m", "benchmarks.traffic"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"benchmarks.traffic failed:\n{result.stderr}")
    return json.loads(result.stdout)


def print_kernels(records: list[dict], architectures: Sequence[int]) -> None:
    width = max(len(record["name"]) for record in records)
    heading = " ".join(f"{architecture:>4}" for architecture in architectures)
    print(f"{'kernel':{width}}  registers on sm_{heading}  spills  bytes of the widest access by argument")
    for start in range(0, len(records), len(architectures)):
        rows = records[start : start + len(architectures)]
        registers = " ".join(f"{row['registers']:>4}" for row in rows)
        narrowest = {name: min(row["accesses"].get(name, 0) for row in rows) for name in rows[0]["accesses"]}
        accesses = ", ".join(f"{name} {size}" for name, size in narrowest.items())
        spills = max(row["spill_bytes"] for row in rows)
        print(f"{rows[0]['name']:{width}}               {registers}  {spills:>6}  {accesses}")


def print_markdown(records: list[dict], architectures: Sequence[int]) -> None:
    """The table of docs/kernels.md: a line a kernel, over all its cases and architectures."""
    kernels: dict[str, list[dict]] = {}
    for record in records:
        parts = record["name"].split("/")
        kernels.setdefault("/".join(parts[:2]) if parts[0] == "group_norm_silu" else parts[0], []).append(record)
    print("| kernel | cases | registers | spill bytes | bytes an access |\n|---|---:|---:|---:|---:|")
    for name, rows in kernels.items():
        registers = [row["registers"] for row in rows]
        bulk = [row for row in rows if not all(map(NARROW.fullmatch, row["accesses"]))]
        # Points, say, allow no 16 bytes: where some case must have them, the others do not speak for the kernel.
        widths = [row["vector_bytes"] for row in bulk if row["must_vectorise"]]
        width = min(widths) if widths else max((row["vector_bytes"] for row in bulk), default="tables only")
        print(
            f"| `{name}` | {len(rows) // len(architectures)} | {min(registers)} to {max(registers)} "
            f"| {max(row['spill_bytes'] for row in rows)} | {width} |"
        )


def print_turns(turns: dict) -> None:
    print(f"\n{'turn':22} {'bytes / N':>9} {'launches':>8}   N = one fp32 batch, networks in bf16")
    for name, turn in turns.items():
        print(f"{name:22} {turn['bytes_over_N']:>9.2f} {turn['launches']:>8}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument(
        "--kernels", type=Path, help="check the kernels of this file of kernels/, or its own cases, only"
    )
    parser.add_argument("--markdown", action="store_true", help="print the short table of docs/kernels.md")
    parser.add_argument(
        "--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES, help="90 for sm_90 (default: all)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compiling processes (default: all cores)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="rdmd_static_") as cache:
        # Read by Triton when a kernel is defined or compiled. A kernel found in the cache would leave no ptxas log.
        os.environ.update(
            TRITON_INTERPRET="0", TRITON_DUMP_PTXAS_LOG="1", TRITON_ALWAYS_COMPILE="1", TRITON_CACHE_DIR=cache
        )
        cases = static_cases(options.kernels)
        records = compile_all(cases, options.arch, options.jobs)
    (print_markdown if options.markdown else print_kernels)(records, options.arch)
    broken = [line for record in records for line in kernel_violations(record)]
    result = {"kernels": records}
    if options.kernels is None:
        result["turns"] = count_turns()
        print_turns(result["turns"])
        broken += uncovered_kernels(cases) + turn_violations(result["turns"])
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\n{len(records)} kernels and architectures, {len(broken)} limits broken")
    print("\n".join(broken), end="\n" if broken else "")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
