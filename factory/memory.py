"""No memory left, recognised whoever noticed it: Python, torch, CUDA, safetensors or the system."""

import errno
import re

TEXTS = re.compile(
    "out of memory|can't allocate memory|cannot allocate memory|bad_alloc|can't start new thread"
    "|failed to map segment from shared object",
    re.IGNORECASE,
)
ALLOCATION = re.compile(r"[Tt]ried to allocate ([\d.]+ ?[A-Za-z]+)")


def no_memory(error: BaseException | None) -> str | None:
    """What could not be allocated, in words; None where that is not the trouble.

    Looks at the error and at what it came from.
    """
    while error is not None:
        text = str(error)
        full = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        if full or (isinstance(error, Exception) and TEXTS.search(text)):
            where = "GPU" if "CUDA" in text else "host"
            wanted = ALLOCATION.search(text)
            return f"the {where}'s memory is full" + (f": {wanted[1]} more were asked for" if wanted else "")
        error = error.__cause__ or error.__context__
    return None
