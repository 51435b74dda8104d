"""What was read, compared by identity in C: no Python runs for what is as it was."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from operator import attrgetter, is_, methodcaller
from typing import Any

from .attributes import MISSING

_values = methodcaller("values")
_filled = attrgetter("cell_contents")


class Identity:
    """slots: {(id of the owner, name): (mapping, name, value)}; the others as they are noted."""

    def __init__(
        self,
        slots: dict[tuple[int, str], tuple[Any, str, Any]],
        dicts: Iterable[Any],
        lists: Iterable[Any],
        cells: Iterable[Any],
        kinds: Iterable[Any],
    ) -> None:
        # most of what code may read from a class is not there: all of it is asked at once
        absent: dict[int, tuple[Any, set[str]]] = {}
        found: dict[type, list[tuple[Any, str, Any]]] = {dict: [], types.MappingProxyType: []}
        for (owner, _), (mapping, name, had) in slots.items():
            if isinstance(mapping, types.MappingProxyType) and had is MISSING:
                absent.setdefault(owner, (mapping, set()))[1].add(name)
            elif isinstance(mapping, dict | types.MappingProxyType):
                found[dict if isinstance(mapping, dict) else type(mapping)].append(
                    (mapping, name, had)
                )
        self.classes = [mapping for mapping, _ in absent.values()]
        self.absent = [names for _, names in absent.values()]
        self.fast: list[Any] = [
            (kind.get, *map(list, zip(*some, strict=True)))  # type: ignore[attr-defined]
            for kind, some in found.items()
            if some
        ]
        tables = [*dicts]
        self.tables, self.empty = [d for d in tables if d], [d for d in tables if not d]
        self.rows = [x for x in lists if isinstance(x, list | deque)]
        self.cells = [*cells]
        self.kinds = [*kinds]
        self.take()

    def take(self) -> None:
        """Take what is there now as that which is compared with."""
        self.full = [c for c in self.cells if content_of(c) is not MISSING]
        self.unset = [c for c in self.cells if content_of(c) is MISSING]
        self.sizes = [len(x) for x in (*self.tables, *self.rows)]
        self.held = [*self._held()]
        self.types = [*map(type, self.kinds)]
        for get, mappings, names, values in self.fast:
            values[:] = map(get, mappings, names, repeat(MISSING))

    def _held(self) -> Iterator[Any]:
        return chain(
            chain.from_iterable(self.tables),
            chain.from_iterable(map(_values, self.tables)),
            chain.from_iterable(self.rows),
            map(_filled, self.full),
        )

    def same(self) -> bool:
        """Whether all is what it was; False also where it is equal only."""
        try:
            return (
                all(map(set.isdisjoint, self.absent, self.classes))
                and all(
                    all(map(is_, map(get, mappings, names, repeat(MISSING)), values))
                    for get, mappings, names, values in self.fast
                )
                and not any(self.empty)
                and [*map(len, self.tables), *map(len, self.rows)] == self.sizes
                and all(map(is_, self._held(), self.held))
                and all(map(is_, map(type, self.kinds), self.types))
                and all(content_of(c) is MISSING for c in self.unset)
            )
        except ValueError:
            # a cell that is empty now
            return False


def content_of(cell: Any) -> Any:
    """What a cell of a closure holds; MISSING if it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING
