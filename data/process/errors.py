"""Errors that a user can mend, each in one line."""

import re
import traceback
from contextlib import contextmanager


class InputError(Exception):
    """The user's input is wrong. The message is one line: what is wrong, and how to fix it."""


# How errors for lack of memory read: of Python, C and C++, PyTorch, CUDA's libraries, oneDNN.
OUT_OF_MEMORY = re.compile(
    r"MemoryError|out of memory|not enough memory|(can't|cannot|could not) allocate|bad_alloc"
    r"|_ALLOC_FAILED|failed to map segment|could not create a (memory( object)?|primitive)$",
    re.IGNORECASE,
)


@contextmanager
def explain_out_of_memory(location, fix):
    """Turn an error for lack of memory, of a CPU or a GPU, into an InputError. The innermost of
    several contexts reports it. location: what needed the memory. fix: what to lower."""

    def is_out_of_memory(error):
        text = getattr(error, "strerror", None) or error  # an OSError without its file's name
        found = OUT_OF_MEMORY.search(f"{type(error).__name__}: {text}")
        return found and not isinstance(error, InputError)

    try:
        yield
    except Exception as error:
        # An error for lack of memory may be the reason for another one, as in reading a file.
        reason = error
        while reason is not None and not is_out_of_memory(reason):
            reason = reason.__cause__ if reason.__suppress_context__ else reason.__context__
        if reason is None:
            raise
        # The frames hold the tensors that took the memory. The message needs a little of it.
        traceback.clear_frames(reason.__traceback__)
        raise InputError(f"{location}: out of memory; {fix}") from None
