"""Every trial of two_nodes.py: launchers on two nodes, a node that dies, a run folder that is not shared."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("two_nodes.py")
NOTHING_TRIED = 77


@pytest.mark.slow
def test_launchers_on_two_nodes():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    if done.returncode == NOTHING_TRIED:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
