"""A run folder that ranks do not share ends the run at its start, on all of them."""

import os
import threading
import time
from pathlib import Path

from rdmd_fast.processes import shared_folder

ROOT = Path(__file__).parents[2]
# A rank whose patience with network file systems is short.
RANK = (
    "import sys; from rdmd_fast import trainer; from rdmd_fast.processes import shared_folder; "
    "shared_folder.STALE_SECONDS = 0.5; sys.exit(trainer.main(sys.argv[1:]))"
)


def test_ranks_with_other_run_folders_exit_2_with_one_line(fork_python, tmp_path):
    (tmp_path / "b/run").mkdir(parents=True)
    (tmp_path / "a").mkdir()
    config = ROOT / "configs/toy/gaussian_to_gaussian.yaml"
    command = [RANK, "--config", config, "run_dir=run", "train.steps=2"]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + os.getpid() % 10_000)}
    ranks = [
        fork_python(*command, folder=tmp_path / folder, **meeting, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank, folder in enumerate("ab")
    ]
    try:
        errors = [rank.finish()[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [2, 2], errors
    lines = [line for text in errors for line in text.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and lines[0] in errors[0], errors
    assert f"{tmp_path}/a/run) is not the same folder on" in lines[0] and f"({tmp_path}/b/run); name one" in lines[0]
    assert not any((tmp_path / "b/run").iterdir())
    assert [path.name for path in (tmp_path / "a/run").iterdir()] == [".lock"]


def test_a_file_that_a_network_file_system_shows_late_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_folder, "STALE_SECONDS", 20.0)
    path = tmp_path / "run/token"

    def write():
        time.sleep(0.3)
        path.parent.mkdir()
        path.touch()

    writer = threading.Thread(target=write)
    writer.start()
    assert shared_folder._appears(path)
    writer.join()
    monkeypatch.setattr(shared_folder, "STALE_SECONDS", 0.2)
    assert not shared_folder._appears(tmp_path / "run/other")
