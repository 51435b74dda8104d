"""What ranks that take turns in one memory move to files: the pager's rule on fake tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from ..paged import pager
from .ledger import Ledger, Move, Turn

# kinds of memory that every rank has of its own
_OWN = ("activations", "communication", "inputs", "gradients")
# events that are replayed at most: of fewer ranks in less memory, then
_EVENTS = 2**21


class Moved(NamedTuple):
    """Bytes moved to files, and in files at once, at most."""

    spilled: int
    most: int


def paged(ledger: Ledger, begin: int) -> tuple[Turn, ...]:
    """What a rank makes, reads and ends of its own from an event on, and where ranks meet.

    What was there before begins first.
    """

    def own(number: int) -> bool:
        return ledger.kinds[number] in _OWN

    held: dict[int, int] = {}
    turns = ledger.turns or []
    for turn in turns[:begin]:
        if isinstance(turn, Move) and own(turn.number):
            held[turn.number] = held.get(turn.number, 0) + turn.nbytes
    found: list[Turn] = [Move(n, nbytes) for n, nbytes in held.items() if nbytes]
    for turn in turns[begin:]:
        if turn is None:
            found.append(None)
        elif isinstance(turn, Move):
            found += [turn] if own(turn.number) else []
        else:
            read = tuple(n for n in turn if own(n))
            found += [read] if read else []
    return tuple(found)


def moved(turns: Sequence[Turn], ranks: int, memory: int) -> Moved:
    """Of so many ranks, each of which goes on to where all meet before the next one does.

    After that those go on first which stopped last, the very last after the one before it, as
    `paged.ranks` has it.
    """
    few = min(ranks, max(2, _EVENTS // max(1, len(turns))))
    files, order = _Files(memory * few // ranks), [*range(few)]
    segment: list[Move | tuple[int, ...]] = []
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


class _Page:
    __slots__ = ("filed", "nbytes")

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.filed = nbytes, False


class _Files:
    """Those used last stay in memory, as `paged.pager` has it."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        # in memory, the one used longest ago first; and those that are in files alone
        self.held: OrderedDict[tuple[int, int], _Page] = OrderedDict()
        self.gone: dict[tuple[int, int], _Page] = {}
        self.resident = self.filed = self.spilled = self.most = 0

    def see(self, rank: int, event: Move | tuple[int, ...]) -> None:
        if not isinstance(event, Move):
            self._read([(rank, n) for n in event])
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

    def _hold(self, key: tuple[int, int], page: _Page) -> None:
        self.held[key] = page
        self.resident += page.nbytes

    def _read(self, keys: list[tuple[int, int]]) -> None:
        largest = 0
        for key in keys:
            page = self.held.get(key)
            if page is not None:
                self.held.move_to_end(key)
            elif key in self.gone:
                page = self.gone.pop(key)
                self._room(page.nbytes, keys)
                self._hold(key, page)
            else:
                continue
            largest = max(largest, page.nbytes)
        # a result like the largest argument
        self._room(largest, keys)

    def _room(self, nbytes: int, used: list[tuple[int, int]]) -> None:
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
