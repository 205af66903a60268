"""How the C library treats memory that tensors on the CPU have let go of."""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc takes no more
NEVER = 2**31 - 1


def keep_freed_memory(trim_threshold: int = NEVER) -> bool:
    """Let the process keep what is freed below 32 MiB at once, for the next tensor; True if the C library can.

    glibc gives the upper end of the heap back to the system as soon as 64 MiB of it are free: every iteration then has
    its pages mapped and zeroed anew, a tenth of the time of a step of SongUNet at 64×64 on two cores. The peak stays;
    what is between peaks is not given back. ``MALLOC_TRIM_THRESHOLD_`` in the environment is left to decide.

    Args:
        trim_threshold: bytes that may be free at the end of the heap.
    """
    if "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD) and mallopt(_TRIM_THRESHOLD, trim_threshold))
