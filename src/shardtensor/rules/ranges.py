"""Regular ranges of the rows of each dim, which may wrap around: what slices and shifts leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Rows first, first + step, ... of a dim, `number` of them, modulo its size."""

    first: int
    number: int
    step: int = 1

    @property
    def stop(self) -> int:
        """Behind the last one, if it does not wrap."""
        return self.first + (self.number - 1) * self.step + 1 if self.number else self.first

    def numbers(self, n: int) -> tuple[int, ...]:
        """All of them, of a dim of size n."""
        return tuple([(self.first + i * self.step) % n for i in range(self.number)])

    def taken(self, other: Rows) -> Rows:
        """Rows of these rows."""
        return Rows(self.first + other.first * self.step, other.number, self.step * other.step)

    def moved(self, shift: int, n: int) -> Rows:
        return self._replace(first=(self.first + shift) % n) if n else self

    def meets(self, other: Rows, n: int) -> bool:
        """Whether some row is in both."""
        return not set(self.numbers(n)).isdisjoint(other.numbers(n))

    def runs(self, n: int) -> Iterator[tuple[Rows, Rows]]:
        """Parts that do not wrap: (of the dim, of these rows); the step must be 1."""
        ahead = min(self.number, n - self.first)
        yield Rows(self.first, ahead), Rows(0, ahead)
        if ahead < self.number:
            yield Rows(0, self.number - ahead), Rows(ahead, self.number - ahead)


Box = tuple[Rows, ...]


def every(shape: Sequence[int]) -> Box:
    """All rows of all dims."""
    return tuple([Rows(0, n) for n in shape])


def box_of(index: Any, shape: Sequence[int]) -> Box | None:
    """The rows that an index of slices names; None for any other index, and for no rows."""
    entries = index if isinstance(index, tuple) else (index,)
    if any(type(e) is not slice and e is not Ellipsis for e in entries):
        return None
    dots = [i for i, e in enumerate(entries) if e is Ellipsis]
    if len(dots) > 1 or len(entries) - len(dots) > len(shape):
        return None
    at = dots[0] if dots else len(entries)
    spelled = [*entries[:at], *[slice(None)] * (len(shape) - len(entries) + len(dots))]
    spelled += entries[at + len(dots) :]
    found = []
    for e, n in zip(spelled, shape, strict=True):
        if any(type(v) not in (int, type(None)) for v in (e.start, e.stop, e.step)):
            return None
        if e.step is not None and e.step < 1:
            return None
        first, stop, step = e.indices(n)
        number = max(0, -(-(stop - first) // step))
        if not number:
            return None
        found.append(Rows(first, number, step))
    return tuple(found)


def picked(x: Tensor, d: int, rows: Rows, n: int) -> Tensor:
    """Rows of a whole dim of size n of a local tensor."""
    if rows.stop <= n:
        if rows == (0, n, 1):
            return x
        return x[(slice(None),) * d + (slice(rows.first, rows.stop, rows.step),)]
    if rows.step == 1:
        return torch.cat([x.narrow(d, a.first, a.number) for a, _ in rows.runs(n)], d)
    return x.index_select(d, numbers_on(x.device, rows.numbers(n)))


def numbers_on(device: torch.device, numbers: Sequence[int]) -> Tensor:
    """Numbers as a tensor, made on the device: runs of them follow each other."""
    starts = [i for i, k in enumerate(numbers) if not i or k != numbers[i - 1] + 1]
    ends = [*starts[1:], len(numbers)]
    runs = [
        torch.arange(numbers[a], numbers[a] + b - a, device=device)
        for a, b in zip(starts, ends, strict=True)
    ]
    return torch.cat(runs) if len(runs) > 1 else runs[0]
