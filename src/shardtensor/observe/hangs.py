"""What a rank that waits long waits for, and what the others do; no op is noted for it.

A thread looks at the stack of the program's main thread. Where that has stood in one collective for
`LONG` seconds, it asks in the store; every rank's thread answers with where its rank is and how
many collectives of each group it has come to, which torch counts. One rank tells all. Ranks of
which none can ever go on, because each waits for another, are found from the same answers.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType
from typing import Any

import torch

from .._torch import world
from ..caller import call_of_user, op_of
from ..comm import groups
from ..comm.launcher import seconds

# seconds in one collective until a rank asks, and until it asks again
LONG = seconds("SHARDTENSOR_WAIT", 10.0)
_AGAIN = (1.0, 6.0, 36.0)
# seconds that ranks have for an answer
_ANSWER = 2.0
_TORCH = os.path.join(os.path.dirname(torch.__file__), "distributed") + os.sep
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
# what waits for files, not for ranks
_FILES = (os.path.join(_TORCH, "checkpoint", ""), os.path.join(_TORCH, "elastic", ""))
_WRAPPERS = {"wrapper", "inner", "_fn", "wait_tensor"}


def here(thread: int) -> dict[str, Any]:
    """Where a thread is: line, op, collective and group, and how many of each group it came to."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return {"line": "", "op": "", "collective": "", "group": None, "counts": {}}
    line, called = call_of_user(frame)
    return {
        "line": line,
        "op": op_of(frame) or called,
        "collective": _collective(frame),
        "group": _group(frame),
        "counts": world.collectives(),
    }


def _waits(frame: FrameType) -> bool:
    """Whether the frame is where Python waits for other ranks."""
    file = frame.f_code.co_filename
    if file.startswith(_TORCH):
        return not file.startswith(_FILES)
    return file == os.path.join(_OURS, "comm", "counters.py") and frame.f_code.co_name == "finish"


def _collective(frame: FrameType) -> str:
    """What the innermost frame waits in, "" if it does not wait."""
    if not _waits(frame):
        return ""
    name, at = "", frame
    while at is not None:
        file, function = at.f_code.co_filename, at.f_code.co_name
        if file == os.path.join(_OURS, "comm", "wire.py"):
            # the outermost, but for what an exchange is for
            name = str(at.f_locals.get("label", function)).removeprefix("start_")
        elif file.startswith(_TORCH) and function not in _WRAPPERS:
            name = name or function
        at = at.f_back  # type: ignore[assignment]
    return (name or "a collective").replace("_", "-")


def _group(frame: FrameType) -> str | None:
    """The group of the collective that the innermost frame waits in, None where it is not seen."""
    if not _waits(frame):
        return None
    with suppress(Exception):
        if frame.f_code.co_filename.endswith("distributed_c10d.py"):
            return world.group_key(frame.f_locals.get("group"))
        at = frame.f_back
        while at is not None and at.f_code.co_filename.startswith(os.path.join(_OURS, "comm")):
            if isinstance(at.f_locals.get("group"), str):
                return world.group_key(groups.resolve(at.f_locals["group"]))
            at = at.f_back
    # a wait for what was started earlier
    return None


class Look:
    """What one rank's thread has seen of its main thread, and what it asks and answers."""

    def __init__(self, store: Any, rank: int, ranks: int, thread: int | None = None) -> None:
        self.store, self.rank, self.ranks = store, rank, ranks
        self.thread = thread or threading.main_thread().ident or 0
        self.seen: Any = None
        self.since = time.monotonic()
        self.asked = self.round = 0
        self.speaks: tuple[int, float] | None = None
        self.doomed: Any = None

    def look(self) -> str:
        """One look; returns what ends all ranks, if they wait for each other for ever."""
        frame = sys._current_frames().get(self.thread)
        seen = None
        if frame is not None and (_waits(frame) or world.cuda_runs()):
            counts = tuple(world.collectives().items())
            seen = (id(frame), frame.f_lasti, counts)
        del frame
        now = time.monotonic()
        if seen is None or seen != self.seen:
            self.seen, self.since, self.asked, self.doomed = seen, now, 0, None
        if self.store.check([f"ask/{self.round}"]):
            if seen is not None and now - self.since > self._limit() / 2 and not self.doomed:
                # whoever asked tells of this rank, too
                self.asked += 1
            self._answer(now)
        elif seen is not None and now - self.since > self._limit() and self.speaks is None:
            self.asked += 1
            first = self.store.compare_set(f"ask/{self.round}", "", str(self.rank)).decode()
            if first == str(self.rank):
                self.speaks = (self.round, now + _ANSWER)
            self._answer(now)
        if self.speaks is not None and now > self.speaks[1]:
            number, self.speaks = self.speaks[0], None
            return self._speak(number, now)
        return ""

    def _limit(self) -> float:
        if self.doomed:
            # a second look decides
            return LONG * 2
        return LONG * _AGAIN[min(self.asked, len(_AGAIN) - 1)]

    def _answer(self, now: float) -> None:
        state = here(self.thread) | {"seconds": now - self.since if self.seen else 0.0}
        self.store.set(f"at/{self.round}/{self.rank}", json.dumps(state))
        self.round += 1

    def _speak(self, number: int, now: float) -> str:
        """Tell what all ranks do; the text, if it can never end."""
        states: dict[int, dict[str, Any]] = {}
        for r in range(self.ranks):
            if self.store.check([f"left/{r}"]):
                states[r] = {"left": True}
            elif self.store.check([f"at/{number}/{r}"]):
                states[r] = json.loads(self.store.get(f"at/{number}/{r}"))
        # this rank, or one that it tells of
        order = sorted(states, key=lambda r: (r != self.rank, r))
        waits = [r for r in order if states[r].get("seconds", 0.0) > LONG / 2]
        subject = next((r for r in waits if late(r, states[r], states)), None)
        if subject is None:
            subject = next((r for r in waits if apart(states[r], states)), None)
        if subject is None:
            return ""
        stuck = doomed(states)
        text = told(subject, states, self.ranks)
        if stuck and stuck == self.doomed:
            return f"ranks wait for each other for ever: {text}"
        self.doomed = stuck or None
        say(text)
        return ""


def say(text: str) -> None:
    """One line on stderr."""
    # one write: ranks share the stream
    with suppress(OSError):
        os.write(2, f"shardtensor: {text}\n".encode())


State = Mapping[str, Any]


def late(rank: int, mine: State, states: Mapping[int, State]) -> list[int]:
    """The ranks that have not come where this one waits; where that is unclear, all behind it."""
    asked = mine["counts"] if mine["group"] is None else [mine["group"]]
    found = set()
    for group in asked:
        n = mine["counts"].get(group, 0)
        members = map(int, group.partition("/")[0].split(","))
        found |= {
            r
            for r in members
            if r != rank
            and (_count(states.get(r), group) < n or _elsewhere(mine, states[r], group))
        }
    return sorted(found)


def _count(state: State | None, group: str) -> float:
    return -1 if state is None or state.get("left") else state["counts"].get(group, 0)


def _elsewhere(mine: State, other: State, group: str) -> bool:
    """Whether another rank has come to another collective of the group at the same time."""
    same = other["counts"].get(group) == mine["counts"].get(group)
    there = other["group"] == mine["group"] == group
    return bool(same and there and other["collective"] != mine["collective"])


def apart(mine: State, states: Mapping[int, State]) -> bool:
    """Whether one waits in a collective in which not all of its group are; else it takes long."""
    if not mine["collective"] or mine["group"] is None:
        return False
    members = map(int, mine["group"].partition("/")[0].split(","))
    return any(states.get(r, {}).get("collective") != mine["collective"] for r in members)


def doomed(states: Mapping[int, State]) -> list[int]:
    """The ranks that can never go on: each waits for one that ended, or for another of them."""
    waits = {
        r: set(late(r, s, states)) if s["group"] is not None and s["collective"] else set()
        for r, s in states.items()
        if not s.get("left")
    }
    ended = {r for r, s in states.items() if s.get("left")}
    found = {r for r, of in waits.items() if of}
    while True:
        kept = {r for r in found if waits[r] & (found | ended)}
        if kept == found:
            return sorted(found)
        found = kept


def told(rank: int, states: Mapping[int, State], ranks: int) -> str:
    """Where each rank is, and what to do."""
    mine = states[rank]
    what = (
        f"waits for {mine['seconds']:.0f} s in {_place(mine)}"
        if mine["collective"]
        else (f"has stood for {mine['seconds']:.0f} s at {mine['line']}")
    )
    missing = late(rank, mine, states)
    came = f"{_ranks(missing)} did not come" if missing else "all came, maybe with other sizes"
    said: dict[str, list[int]] = {}
    for r in range(ranks):
        if r != rank:
            said.setdefault(_doing(states.get(r), mine), []).append(r)
    others = "; ".join(f"{_ranks(of)} {text}" for text, of in said.items())
    return (
        f"rank {rank} {what}, to which {came}: {others}. Every rank must "
        "call the same ops: look for a branch on the rank, or an error that one rank caught; "
        "SHARDTENSOR_DEBUG=1 names the first op that differs"
    )


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def standing(state: State) -> str:
    """What a rank waits in, and where; "" if it waits in nothing."""
    return _place(state) if state["collective"] else ""


def _place(state: State) -> str:
    op, name = state["op"], state["collective"]
    line = f" at {state['line']}" if state["line"] else ""
    return (f"`{op}` ({name})" if op and op != name else name) + line


def _doing(state: State | None, mine: State) -> str:
    if state is None:
        return "does not answer (stopped, or in code that holds Python's lock)"
    if state.get("left"):
        return "ended the program"
    if state["collective"]:
        return f"waits in {_place(state)}"
    op = f" in `{state['op']}`" if state["op"] else ""
    return f"runs {state['line'] or 'no line of the program'}{op}{_numbers(state, mine)}"


def _numbers(state: State, mine: State) -> str:
    if mine["group"] is None:
        return ""
    came, n = (s["counts"].get(mine["group"], 0) for s in (state, mine))
    return f", after {came} of {n} collectives of this group"
