"""How a process waits and keeps memory. Free of torch, since it must be called before its import."""

import ctypes
import os
import sys


def configure_threads():
    """Let OpenMP's threads wait for a moment only, and let the process keep memory that it frees.

    Call it before `import torch`: OpenMP reads its environment once, when it is loaded.
    """
    # OpenMP's threads spin for long while they wait; where other processes want the cores too, that slows a step tenfold. Not at all is
    # slow as well: to be woken takes longer than the small products of a decoding step.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

    # By default glibc gives large blocks back to the system, which clears them page by page when they are wanted again: at every step.
    # Other C libraries are left alone.
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, -1)
