"""How a process waits, how it keeps memory, and that it has a home directory. The import configures
it, before that of torch: OpenMP reads its environment once, when it is loaded."""

import ctypes
import os
import sys


def configure_threads():
    """Let OpenMP's threads spin only briefly, and let the process keep the memory that it frees,
    on a GPU in segments that can grow."""
    # OpenMP's threads spin for long while they wait. If other processes need the cores too, that
    # slows a step tenfold. Not spinning at all is slow as well: waking a thread takes longer than
    # the small matrix products of a decoding step.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

    # By default glibc returns large blocks to the system, which zeroes their pages when they are
    # allocated again, at every step. Other C libraries are left alone.
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, -1)

    # Micro-batches have many shapes. In blocks of fixed size their memory would be fragmented.
    # The first name is the present one, and the user's choice counts under any of them.
    names = [f"PYTORCH_{kind}ALLOC_CONF" for kind in ("", "CUDA_", "HIP_")]
    if sys.platform == "linux" and not any(name in os.environ for name in names):
        os.environ[names[0]] = "expandable_segments:True"


def provide_home():
    """Set HOME where there is no home directory, as for a container's user who has no entry in
    /etc/passwd. Without one, libraries fail to load or take `~` for a folder's name."""
    if os.name == "posix" and os.path.expanduser("~") == "~":
        directory = os.environ.get("TMPDIR") or "/tmp"
        os.environ["HOME"] = os.path.join(directory, f"promptkd-{os.getuid()}")
        note = f"this user has no home directory, and {os.environ['HOME']} is taken for it"
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: {note}; set HOME to a directory for downloads", file=sys.stderr)


configure_threads()
provide_home()
