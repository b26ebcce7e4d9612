"""Memory of this process that nothing uses any more."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # not glibc: its allocator gives memory back in its own way
        return None
    return found


def give_back() -> None:
    """Let the allocator return freed memory to the system, where it would keep it for later.

    Blocks of a model come and go; what is kept between them adds to the peak of every later one.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
