"""Freed memory stays with the process: a second round of the same allocations maps no page."""

import os
import subprocess
import sys

ROUNDS = """
import resource
from rdmd_fast.host_memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(8 << 20) for _ in range(16)]
    for block in blocks:
        block[::4096] = b"x" * len(block[::4096])
    del blocks, block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if KEEP:
    print(keep_freed_memory())
else:
    print(None)
faults(), faults()
print(faults())
"""


def rounds(keep, **environment):
    done = subprocess.run(
        [sys.executable, "-c", ROUNDS.replace("KEEP", str(keep))], capture_output=True, text=True, check=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    said, faults = done.stdout.split()
    return said, int(faults)


def test_pages_are_mapped_once():
    pages = 16 * (8 << 20) // os.sysconf("SC_PAGESIZE")
    said, kept = rounds(True)
    if said == "False":  # no glibc
        return
    assert rounds(False)[1] > 0.9 * pages
    assert kept < 0.01 * pages


def test_the_environment_decides_first():
    assert rounds(True, MALLOC_TRIM_THRESHOLD_="67108864")[0] == "False"
