"""The kernels under the oldest Triton that setup.py takes: the static gate, and each kernel on its PTX.

It is looked for in the folder that OLDEST_TRITON names (pip install --no-deps --target FOLDER triton==3.6.0), else
downloaded.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu_stand_in.child import run, run_pytest

ROOT = Path(__file__).parents[2]
VERSION = re.search(r'"triton>=([\d.]+);', (ROOT / "setup.py").read_text())[1] + ".0"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """PYTHONPATH with that Triton ahead of the installed one."""
    folder = os.environ.get("OLDEST_TRITON")
    if not folder:
        folder = tmp_path_factory.mktemp("triton")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*pip, f"triton=={VERSION}"], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no triton=={VERSION}: OLDEST_TRITON names no folder with it, and pip cannot fetch it")
    assert (Path(folder) / f"triton-{VERSION}.dist-info").is_dir(), f"{folder} holds no triton=={VERSION}"
    return f"{folder}:{ROOT}"


def test_every_kernel_keeps_its_limits(path):
    said = run("-m", "benchmarks.static", "--kernels", "tests/kernels/static_cases.py", PYTHONPATH=path)
    assert ", 0 limits broken" in said


def test_every_kernel_equals_its_reference_on_its_ptx(path):
    said = run_pytest("tests/kernels/test_on_gpu.py", PYTHONPATH=path)
    assert "passed" in said and "skipped" not in said


def test_the_interpreter_names_the_numpy_that_it_wants(path):
    """Where NumPy is too new for it; else kernels are interpreted."""
    import numpy as np

    say = "from rdmd_fast.kernels import _dispatch; print(_dispatch.INTERPRETED)"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", say], capture_output=True, text=True, env=environment, cwd=ROOT)
    if np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        assert "install numpy<2.4 or triton>=3.7" in done.stderr.splitlines()[-1]
    else:
        assert done.stdout.split() == ["True"], done.stderr
