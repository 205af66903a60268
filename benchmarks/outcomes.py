"""A plugin of pytest that keeps outcomes by test function as JSON, while the tests run.

python -m pytest -p benchmarks.outcomes --outcomes FILE tests/kernels/test_on_gpu.py
"""

from __future__ import annotations

import json
import time
from pathlib import Path


def pytest_addoption(parser) -> None:
    parser.addoption("--outcomes", metavar="FILE", help="keep what passed, failed and was skipped there")


def pytest_configure(config) -> None:
    if (file := config.getoption("--outcomes")) and not hasattr(config, "workerinput"):  # xdist's workers report here
        config.pluginmanager.register(Outcomes(Path(file)))


class Outcomes:
    """Counts, and what failed with the last line of its error; ``finished`` once all tests have run."""

    def __init__(self, file: Path):
        self._file, self._start = file, time.monotonic()
        self._kept = {"tests": {}, "failures": {}, "finished": False}

    def pytest_runtest_logreport(self, report) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        function = report.nodeid.rpartition("::")[2].partition("[")[0]
        counts = self._kept["tests"].setdefault(function, {"passed": 0, "failed": 0, "skipped": 0})
        counts[report.outcome] += 1
        if report.failed:
            self._kept["failures"][report.nodeid] = report.longreprtext.strip().rpartition("\n")[2]
        self._write()

    def pytest_sessionfinish(self, exitstatus) -> None:
        self._kept["finished"] = int(exitstatus) in (0, 1)
        self._write()

    def _write(self) -> None:
        self._kept["seconds"] = time.monotonic() - self._start
        self._file.write_text(json.dumps(self._kept, indent=1) + "\n")
