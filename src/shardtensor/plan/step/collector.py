"""The garbage collector during a plan: what is booked ends when it does, and old objects wait."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from . import caches

_quick = False


@contextmanager
def quick_collector() -> Iterator[None]:
    """Inside, `collect` looks at what was made since it was last called; no cache keeps any of it.

    Where somebody has frozen objects already it looks at all others.
    """
    global _quick
    before, _quick = _quick, not gc.get_freeze_count()
    if _quick:
        # with what nobody holds any longer, of which nothing is booked: to look for it takes long
        gc.freeze()
    try:
        yield
    finally:
        # what it made, while all else is frozen
        gc.collect()
        if _quick:
            gc.unfreeze()
        _quick = before
        if caches.left_over():
            caches.forget()


def collect() -> None:
    """Release what nobody holds."""
    gc.collect()
    if _quick:
        gc.freeze()
