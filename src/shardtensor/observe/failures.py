"""A rank that raises or dies ends the others, with its message.

`init` starts it. An exception that ends the program is left in the store of the process group; a
process that dies is noticed by its neighbours (see `liveness`), which leave that, as they do if
ranks wait for each other for ever (see `hangs`). On every other rank a thread looks for such news:
it prints it, a collective that fails raises it, and a rank that goes on regardless ends after
`GRACE` seconds.
"""

from __future__ import annotations

import faulthandler
import os
import re
import sys
import threading
import time
from contextlib import suppress

import torch.distributed as dist

from .. import _torch
from ..caller import described
from ..comm import observers
from ..errors import RankError
from .hangs import Look, here, say, standing
from .liveness import Links

GRACE = 5.0
# a rank that raised waits for the others to have read why, before its launcher ends them
_TOLD = 2.0
# seconds between looks at the store; the death of a neighbour shows at once
_TICK = 0.5
_LOST = re.compile(
    r"closed by peer|reset by peer|broken pipe|timed out|refused|remote|aborted", re.I
)
_CAUSES = (
    "killed, out of memory, a crash, or gloo's end of collectives of which ranks came to different "
    "ones, which SHARDTENSOR_DEBUG=1 names"
)
_watch: Watch | None = None
_hooked = False
_numbers = iter(range(1 << 30))


class Watch:
    """What one rank knows of the others' ends."""

    def __init__(self, one_host: bool) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.process = os.getpid()
        prefix = f"shardtensor/watch/{next(_numbers)}"
        self.store = dist.PrefixStore(prefix, _torch.default_store())
        self.links = Links(self.store, self.rank, self.ranks, one_host)
        self.waiting = Look(self.store, self.rank, self.ranks)
        self.news, self.ending = threading.Event(), threading.Event()
        self.text = ""
        # known to have ended in order when the store ended
        self.gone: list[int] = []
        # joined in `leave`: a thread inside torch when Python ends aborts the process
        self.thread = threading.Thread(target=self._look, daemon=True, name="shardtensor-watch")
        self.thread.start()

    def tell(self, text: str) -> None:
        """Leave news for all ranks, if it is the first; wait until those that go on know it."""
        with suppress(RuntimeError):
            self.store.compare_set("news", "", f"{self.rank}:{text}")
            self.reached("told", _TOLD)

    def reached(self, key: str, seconds: float) -> None:
        """Wait until all ranks have counted up a key or have ended, but not for longer."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            if self.store.add(key, 0) + (key != "ended") * self.store.add("ended", 0) >= self.ranks:
                return
            time.sleep(0.01)

    def _look(self) -> None:
        """Wait for news of a rank that ended, or that waits for ever; then end this one."""
        lost, known = None, False
        while not (self.ending.is_set() or known):
            try:
                if lost is None:
                    lost = self.links.lost(_TICK)
                    if lost is not None and not self.ending.is_set():
                        died = f"rank {lost} died without a word ({_CAUSES}){self._standing()}"
                        self.store.compare_set("news", "", f":{died}")
                known = self.store.check(["news"])
                ends = "" if known or self.ending.is_set() else self.waiting.look()
                if ends:
                    self.store.compare_set("news", "", f":{ends}")
            except RuntimeError:
                # in order it would have said so
                self._end("", "the process that keeps the store (rank 0 or the launcher) died")
                return
        if known:
            author, _, text = self.store.get("news").decode().partition(":")
            self.gone = [] if text else self.left()
            self.store.add("told", 1)
            self._end(author, text)

    def left(self) -> list[int]:
        """The ranks that have ended their programs in order."""
        with suppress(RuntimeError):
            return [r for r in range(self.ranks) if self.store.check([f"left/{r}"])]
        return self.gone

    def _standing(self) -> str:
        """Where this rank is, if it waits."""
        place = standing(here(self.waiting.thread))
        return f"; rank {self.rank} waits in {place}" if place else ""

    def _end(self, author: str, text: str) -> None:
        """What comes after news; no text: the rank that keeps the store ended in order."""
        if self.ending.is_set() or not text or not dist.is_initialized():
            return
        self.text = text
        self.news.set()
        if author != str(self.rank):
            say(f"{text}. Rank {self.rank} ends.")
            if not self.ending.wait(GRACE) and dist.is_initialized():
                sys.stdout.flush()
                os._exit(1)


def leave() -> None:
    """The end in order: wait up to `GRACE` seconds for the others, and say goodbye.

    gloo's threads abort a process now and then that others leave behind. (Seen with torch 2.13
    alone: a mesh, an all-to-all, the end of the program.)
    """
    global _watch
    watch, _watch = _watch, None
    if watch is None or watch.process != os.getpid():
        return
    observers.Hooks.explained = None
    with suppress(RuntimeError):
        if not watch.text:
            watch.store.add("ended", 1)
            watch.reached("ended", GRACE)
        watch.store.set(f"left/{watch.rank}", "")
        if watch.rank == 0 and not watch.text:
            # nobody shall take the end of the store for a failure
            watch.tell("")
    watch.ending.set()
    watch.thread.join(1.0)
    watch.links.leave()


def is_started() -> bool:
    """Whether this process watches others."""
    return _watch is not None and _watch.process == os.getpid()


def start(one_host: bool) -> None:
    """Watch the ranks of the process group that was initialised."""
    global _watch, _hooked
    _watch = Watch(one_host)
    if not faulthandler.is_enabled():
        # where this process is, should C++ end it
        faulthandler.enable()
    observers.Hooks.explained = _explained
    if not _hooked:
        _torch.at_uncaught(_uncaught)
        _hooked = True


def _uncaught(error: BaseException) -> None:
    watch = _watch
    if watch is None or watch.process != os.getpid() or watch.text or not dist.is_initialized():
        return
    watch.text = f"rank {watch.rank} raised {described(error)}"
    watch.tell(watch.text)


def _explained(error: BaseException) -> BaseException | None:
    """The error that says why a collective failed, where another rank's end is the reason."""
    if _watch is None or isinstance(error, RankError) or not _LOST.search(str(error)):
        return None
    _watch.news.wait(2.0)
    if _watch.text:
        return RankError(_watch.text)
    gone = _watch.left()
    if gone:
        return RankError(f"ranks {gone} have ended their programs; this rank waits for them")
    return None
