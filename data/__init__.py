"""Data and what the commands need around it. Importing it settles two things of the process, so it comes before torch."""

import ctypes
import os
import sys

# OpenMP's threads spin by default while they wait; where other processes want the cores too, that slows a step tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# glibc gives large blocks back to the system and has them cleared page by page when they are wanted again, at every step.
if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
    ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
