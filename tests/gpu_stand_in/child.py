"""Runs things on the stand-in in processes of their own, since it must be in place before anything looks for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.gpu_stand_in import build
from tests.gpu_stand_in.log import ROOT


def environment() -> dict[str, str]:
    """The environment of such a process: this one's, without what tests and trainings here have set for themselves."""
    own = ("PYTEST_", "RDMD_", "DS_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    return variables | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}


def run(*arguments: str, **variables: str) -> str:
    """What ``python ARGUMENTS`` writes; skips the test where the stand-in cannot be built.

    Raises:
        AssertionError: it failed.
    """
    return _run([sys.executable, *map(str, arguments)], **variables)


def _run(command: list[str], **variables: str) -> str:
    lacking = build.obstacle()
    if lacking:
        pytest.skip(lacking)
    done = subprocess.run(command, cwd=ROOT, env={**environment(), **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def run_script(script: str, *arguments: str, **variables: str) -> str:
    """What ``bash SCRIPT ARGUMENTS`` writes, with each process of Python that it starts on the stand-in."""
    everywhere = f"{ROOT / 'tests/gpu_stand_in/everywhere'}:{ROOT}"
    return _run(["bash", script, *arguments], PYTHON=sys.executable, PYTHONPATH=everywhere, **variables)


def run_pytest(file: str, *arguments: str, **variables: str) -> str:
    """Run pytest on a file, on the stand-in."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "tests.gpu_stand_in.plugin"]
    return run("-m", "pytest", *options, file, *arguments, **variables)


def run_cases(file: str) -> str:
    """Run pytest on a file of this folder."""
    return run_pytest(f"tests/gpu_stand_in/{file}")
