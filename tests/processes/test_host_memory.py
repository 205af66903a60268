"""Freed memory stays with the process: a second round of the same allocations maps no page."""

import os
import platform
import subprocess
import sys

import pytest

ROUNDS = """
import resource
from rdmd_fast.processes.host_memory import keep_freed_memory

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
        env={key: value for key, value in os.environ.items() if key != "MALLOC_TRIM_THRESHOLD_"} | environment,
    )  # fmt: skip
    said, faults = done.stdout.split()
    return said, int(faults)


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")


@glibc
def test_pages_are_mapped_once():
    pages = 16 * (8 << 20) // os.sysconf("SC_PAGESIZE")
    said, kept = rounds(True)
    assert said == "True"
    assert rounds(False)[1] > 0.9 * pages
    assert kept < 0.01 * pages


def test_the_environment_decides_first():
    assert rounds(True, MALLOC_TRIM_THRESHOLD_="67108864")[0] == "False"


@glibc
def test_joining_the_world_keeps_it():
    program = "from rdmd_fast.processes import world as w; w.keep_freed_memory = lambda: print('kept'); w.join_world()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines().count("kept") == 1
