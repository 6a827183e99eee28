"""Data and what the commands need around it. Importing it settles how the process waits and keeps memory, so it comes before torch."""

import ctypes
import os
import sys

# OpenMP's threads spin for long while they wait; where other processes want the cores too, that slows a step tenfold. Not at all is
# slow as well: to be woken takes longer than the small products of a decoding step.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


# The process keeps memory that it frees. By default glibc gives large blocks back to the system, which clears them page by page when
# they are wanted again: at every step. Other C libraries are left alone.
if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
    ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, -1)
