"""Runs tests on the stand-in: ``python -m pytest -p tests.gpu_stand_in.plugin FILE``.

The device is there before any module of a test is imported, many of which ask once whether there is a GPU.
"""

from __future__ import annotations

import pytest

from tests.gpu_stand_in import build


def pytest_configure() -> None:
    lacking = build.obstacle()
    if lacking:
        raise pytest.UsageError(lacking)
    from tests.gpu_stand_in import install

    install()
