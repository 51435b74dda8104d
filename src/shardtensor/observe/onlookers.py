"""Ranks of a process group that the program made itself say whom they wait for; none is ended.

`st.init` does more (see `failures`): it knows when the program ends, and owns the store. Here a
thread borrows the store of the default process group for each look, so that the program may destroy
the group and make another at the same port.
"""

from __future__ import annotations

import atexit
import itertools
import os
import threading
from contextlib import suppress
from weakref import ref

import torch.distributed as dist

from .. import _torch
from . import failures
from .hangs import Look, say

# seconds between looks
_TICK = 0.5
_numbers = itertools.count()
_here: Onlooker | None = None


class Onlooker:
    """A thread that looks at this rank's main thread until the process group is another."""

    def __init__(self) -> None:
        self.process, self.world = os.getpid(), ref(dist.group.WORLD)
        self.prefix = f"shardtensor/onlookers/{next(_numbers)}"
        self.look = Look(None, dist.get_rank(), dist.get_world_size())
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True, name="shardtensor-onlooker")
        self.thread.start()

    def follows(self) -> bool:
        """Whether this looks at the process group that is there, in this process."""
        same = dist.is_initialized() and self.world() is dist.group.WORLD
        return same and self.process == os.getpid() and not failures.is_started()

    def _run(self) -> None:
        while not self.ending.wait(_TICK) and self.follows():
            # the store may go at any time
            with suppress(RuntimeError, ValueError):
                self._once()

    def _once(self) -> None:
        self.look.store = dist.PrefixStore(self.prefix, _torch.default_store())
        try:
            text = self.look.look()
            if text:
                say(text)
        finally:
            self.look.store = None

    def leave(self) -> None:
        """End, and tell the others that this rank's program ends."""
        if self.process != os.getpid():
            return
        self.ending.set()
        self.thread.join(1.0)
        if dist.is_initialized() and self.world() is dist.group.WORLD:
            with suppress(RuntimeError):
                store = dist.PrefixStore(self.prefix, _torch.default_store())
                store.set(f"left/{self.look.rank}", "")


def start() -> None:
    """Look on in the process group that is there, unless `st.init` or this does already."""
    global _here
    if failures.is_started() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if not any(kind in dist.get_backend() for kind in ("gloo", "nccl")):
        return
    if _here is None or not _here.follows():
        _here = Onlooker()
        atexit.register(_here.leave)
