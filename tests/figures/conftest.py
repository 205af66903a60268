import pytest

from rdmd_fast import points


@pytest.fixture
def computed(monkeypatch):
    """Names of the points that were computed, in this process: starting another takes seconds."""
    names = []

    def compute(todo, jobs, say):
        for folder, point in todo.items():
            names.append(point.name)
            points._work(point, folder)

    monkeypatch.setattr(points, "_compute", compute)
    return names
