import os
import subprocess

# One thread per rank and test: the machines that run these have two cores, and sums must not depend on their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nan_filled_empty():
    """Fill ``torch.empty`` and its like with NaN, so that a partial write shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def small_disk(tmp_path):
    """``small_disk(KiB)`` mounts a tmpfs of that size, or resizes it, and returns its folder."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def resize(kib: int):
        mounted = os.path.ismount(disk)
        options = f"{'remount,' * mounted}size={kib}k"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True)
        if not mounted and done.returncode:
            pytest.skip("mounting is not permitted here")
        assert done.returncode == 0, done.stderr
        return disk

    yield resize
    if os.path.ismount(disk):
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
