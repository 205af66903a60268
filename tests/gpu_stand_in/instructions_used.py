"""Writes the name of every instruction in the PTX of every kernel, as tests/kernels/static_cases.py specialises them.

python -m tests.gpu_stand_in.instructions_used
"""

from __future__ import annotations

import re
from pathlib import Path


def instructions_in_tests() -> set[str]:
    """Names of instructions that test_ptx.py has."""
    text = Path(__file__).with_name("test_ptx.py").read_text().replace("::", ".")
    return set(re.findall(r"\b[a-z]\w*(?:\.\w+)+", text))


def instructions_of(case) -> set[str]:
    import triton

    from benchmarks.static import source_and_options
    from tests.gpu_stand_in.ptx.text import parse
    from tests.gpu_stand_in.triton_driver import TARGET

    source, options = source_and_options(case)
    ptx = triton.compile(source, target=TARGET, options=options).asm["ptx"]
    program = parse(ptx.decode())
    return {".".join(instruction.parts) for instruction in program.code}


def main() -> None:
    from tests.gpu_stand_in import install

    install()
    from tests.kernels.static_cases import static_cases

    print(*sorted(set().union(*map(instructions_of, static_cases()))), sep="\n")


if __name__ == "__main__":
    main()
