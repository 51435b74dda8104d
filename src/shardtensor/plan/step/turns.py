"""What ranks that take turns in one memory move to files: the pager's rule on fake tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ...paged import pager
from .ledger import Ledger, Move, Read, Turn

# kinds of memory that every rank has of its own
_OWN = ("activations", "communication", "inputs", "gradients")
# events that are replayed at most: of fewer ranks in less memory, then
EVENTS = 2**21


class Moved(NamedTuple):
    """Bytes moved to files, and in files at once, at most."""

    spilled: int
    most: int


def paged(ledger: Ledger, begin: int) -> tuple[Turn, ...]:
    """What a rank makes, reads and ends of its own from an event on, and where ranks meet.

    What was there before begins first.
    """
    return (*alive(own(ledger, 0, begin)), *own(ledger, begin))


def alive(turns: Iterable[Turn]) -> list[Move]:
    """What is held after so many turns: of each tensor all its moves in one."""
    held: dict[int, int] = {}
    for turn in turns:
        if isinstance(turn, Move):
            held[turn.number] = held.get(turn.number, 0) + turn.nbytes
    return [Move(n, nbytes) for n, nbytes in held.items() if nbytes]


def own(ledger: Ledger, begin: int, end: int | None = None) -> list[Turn]:
    """The turns from one to another that are about what a rank has of its own."""

    def is_own(number: int) -> bool:
        return ledger.kinds[number] in _OWN

    found: list[Turn] = []
    for turn in (ledger.turns or [])[begin:end]:
        if turn is None:
            found.append(None)
        elif isinstance(turn, Move):
            found += [turn] if is_own(turn.number) else []
        else:
            found.append(turn._replace(numbers=tuple(filter(is_own, turn.numbers))))
    return found


def moved(turns: Sequence[Turn], ranks: int, memory: int) -> Moved:
    """Of so many ranks, each of which goes on to where all meet before the next one does.

    After that those go on first which stopped last, the very last after the one before it, as
    `paged.ranks` has it.
    """
    few = min(ranks, max(2, EVENTS // max(1, len(turns))))
    files, order = _Files(memory * few // ranks), [*range(few)]
    segment: list[Move | Read] = []
    for turn in (*turns, None):
        if turn is not None:
            segment.append(turn)
            continue
        for rank in order:
            for event in segment:
                files.see(rank, event)
        segment, order = [], order[::-1]
        order[:2] = order[1::-1]
    return Moved(files.spilled * ranks // few, files.most * ranks // few)


def moved_apart(segments: Iterable[tuple[Any, Sequence[Turn]]], memory: int) -> Moved:
    """Of segments one after the other, each of which names whose its tensors are."""
    files = _Files(memory)
    for key, turns in segments:
        for event in turns:
            if event is not None:
                files.see(key, event)
    return Moved(files.spilled, files.most)


def left(turns: Sequence[Turn]) -> int:
    """Bytes that are held after so many turns, as the pager counts them."""
    moves = [t.nbytes for t in turns if isinstance(t, Move)]
    return sum(n for n in moves if abs(n) >= pager.LEAST)


class _Page:
    __slots__ = ("filed", "nbytes")

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.filed = nbytes, False


class _Files:
    """Those used last stay in memory, as `paged.pager` has it."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        # in memory, the one used longest ago first; and those that are in files alone
        self.held: OrderedDict[tuple[Any, int], _Page] = OrderedDict()
        self.gone: dict[tuple[Any, int], _Page] = {}
        self.resident = self.filed = self.spilled = self.most = 0

    def see(self, rank: Any, event: Move | Read) -> None:
        if not isinstance(event, Move):
            self._read([(rank, n) for n in event.numbers], event.nbytes)
            return
        if abs(event.nbytes) < pager.LEAST:
            return
        key = rank, event.number
        if event.nbytes > 0:
            self._hold(key, _Page(event.nbytes))
            return
        page = self.held.pop(key, None)
        if page is not None:
            self.resident -= page.nbytes
        else:
            page = self.gone.pop(key, None)
        if page is not None and page.filed:
            self.filed -= page.nbytes

    def _hold(self, key: tuple[Any, int], page: _Page) -> None:
        self.held[key] = page
        self.resident += page.nbytes

    def _read(self, keys: list[tuple[Any, int]], nbytes: int) -> None:
        for key in keys:
            if key in self.held:
                self.held.move_to_end(key)
            elif key in self.gone:
                page = self.gone.pop(key)
                self._room(page.nbytes, keys)
                self._hold(key, page)
        # a result like the largest argument
        self._room(nbytes, keys)

    def _room(self, nbytes: int, used: list[tuple[Any, int]]) -> None:
        going = []
        for key, page in self.held.items():
            if self.resident + nbytes <= self.memory:
                break
            if key in used:
                continue
            going.append(key)
            self.resident -= page.nbytes
            if not page.filed:
                page.filed = True
                self.spilled += page.nbytes
                self.filed += page.nbytes
                self.most = max(self.most, self.filed)
        for key in going:
            self.gone[key] = self.held.pop(key)
