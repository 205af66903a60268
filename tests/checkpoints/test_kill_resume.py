"""The short form of tests/soak/kill_resume.py."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "soak/kill_resume.py"


def test_killed_runs_end_as_the_unbroken_one_bit_for_bit(tmp_path):
    """In a process of its own, since its ranks are forked: nothing may have threads there."""
    command = [sys.executable, str(SCRIPT), "--kills", "3", "--in-saves", "2", "--stages", "2", "--seed", "5"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills, 2 of them inside a save" in done.stdout and "all equal" in done.stdout
    assert not list(tmp_path.iterdir())
