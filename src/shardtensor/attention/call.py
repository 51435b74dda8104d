"""The integers of one call of ring attention: who holds what, and what a rank computes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache import cached
from ..comm import groups
from ..comm.define import Facts
from ..comm.exchanges import whole
from ..cuts import Cut, cut, pairs
from .blocks import Rule
from .schedule import Laid, laid, pieces
from .twice import Piece

Span = tuple[int, int]

INTEGERS = (
    "int[] q_starts, int[] q_sizes, int[] k_starts, int[] k_sizes, int mask_start, bool causal, "
    "bool exact, float scale, float drop, int seed, int[] order, int team, int together, str group"
)


class Seen(NamedTuple):
    """Local rows, local keys, the mask's columns and the rule of a piece that a rank computes."""

    rows: Span
    keys: Span
    columns: Span
    rule: Rule


@dataclass(frozen=True)
class Call(Facts):
    """As the dispatcher takes them; the same on every rank of the group.

    team: how many ranks of the group sit at one place of the ring, each in a ring of its own with
    the same spans. order: the group's ranks, place by place; none: as they are. together: so many
    places beside each other have one block of keys: each gets the others' before anything is
    computed, and passes all on. It divides them; 1 but for keys that are in order, a span each.
    """

    q_starts: tuple[int, ...]
    q_sizes: tuple[int, ...]
    k_starts: tuple[int, ...]
    k_sizes: tuple[int, ...]
    mask_start: int
    causal: bool
    exact: bool
    scale: float
    drop: float
    seed: int
    order: tuple[int, ...]
    team: int
    together: int
    group: str

    @classmethod
    def of(cls, *integers: Any) -> Call:
        """From the arguments of the op, or from itself."""
        if isinstance(integers[0], Call):
            return integers[0]
        given: list[Any] = [tuple(x) if isinstance(x, list) else x for x in integers]
        return cls(*given)

    def arguments(self) -> tuple[Any, ...]:
        """As the op takes them."""
        return tuple([getattr(self, f.name) for f in fields(self)])

    @cached_property
    def _seat(self) -> tuple[int, int]:
        """This rank's place, and which of the ranks there it is."""
        rank = groups.rank(self.group)
        return divmod(self.order.index(rank) if self.order else rank, self.team)

    @cached_property
    def me(self) -> int:
        """The place of this rank's block in its ring."""
        return self._seat[0] // self.together

    @cached_property
    def n(self) -> int:
        """Blocks of a ring."""
        return groups.size(self.group) // self.team // self.together

    def rank(self, block: int) -> int:
        """Who of the group has this rank's number among those of another block."""
        return self._rank(block % self.n * self.together + self._seat[0] % self.together)

    def owners(self, block: int) -> list[int]:
        """Who of the group, in this rank's ring, has a block's keys, itself left out."""
        first = block * self.together
        every = range(first, first + self.together)
        return [self._rank(place) for place in every if place != self._seat[0]]

    def owned(self, block: int) -> tuple[Cut, int]:
        """How many of a block's keys each of its places has; which of them is its own, or -1."""
        each = len(self.k_sizes) // self.n
        sizes = self.k_sizes[block * each : (block + 1) * each]
        if self.together == 1:
            sizes = (sum(sizes),)
        return cut(sizes), self._seat[0] % self.together if block == self.me else -1

    def _rank(self, place: int) -> int:
        at = place * self.team + self._seat[1]
        return self.order[at] if self.order else at

    @cached_property
    def laid(self) -> Laid:
        """The spans of each block, and where keys must go."""
        starts, sizes, m = self.k_starts, self.k_sizes, self.together
        if m > 1:
            sizes = tuple([sum(sizes[i : i + m]) for i in range(0, len(sizes), m)])
            starts = starts[::m]
        return laid(self.n, self.q_starts, self.q_sizes, starts, sizes, self.causal)

    @cached_property
    def rows(self) -> int:
        """The most queries that a rank has."""
        each = len(self.q_sizes) // (self.n * self.together)
        return max(sum(self.q_sizes[i : i + each]) for i in range(0, len(self.q_sizes), each))

    @cached_property
    def queries(self) -> tuple[Span, ...]:
        """The spans of this rank's queries."""
        each = len(self.q_starts) // (self.n * self.together)
        own = slice(self._seat[0] * each, (self._seat[0] + 1) * each)
        return tuple(zip(self.q_starts[own], self.q_sizes[own], strict=True))

    @cached_property
    def steps(self) -> int:
        """How often keys are passed on."""
        return self.laid.steps

    def held(self, block: int, step: int) -> int:
        """The block that ranks of a block may hold after `step` hops."""
        return (block - step) % self.n

    @cached_property
    def kept(self) -> dict[Any, Any]:
        """What was found of this call."""
        return {}

    def seen(self, q: Tensor, block: int) -> Sequence[Seen]:
        """What this rank's queries see of a block."""
        # ranks may have no queries for other reasons than tokens: an empty shard of the batch
        if not q.numel():
            return ()
        found: Sequence[Seen] | None = self.kept.get(block)
        if found is None:
            found = self.kept[block] = self._seen(block)
        return found

    def _seen(self, block: int) -> Sequence[Seen]:
        found = list[Seen]()
        row = 0
        for first, rows in self.queries:
            key = 0
            for start, keys in self.laid.keys[block]:
                for p in pieces(rows, keys, first - start if self.causal else None):
                    seed = self._seed(block, len(found))
                    rule = Rule(self.scale, p.triangle, self.drop, seed, self.exact)
                    columns = _moved(p.keys, start - self.mask_start)
                    found.append(Seen(_moved(p.rows, row), _moved(p.keys, key), columns, rule))
                key += keys
            row += rows
        return found

    def whole_pieces(self) -> list[Piece]:
        """What this rank's rows see of the keys of all places."""
        found, row = list[Piece](), 0
        for first, rows in self.queries:
            key = 0
            for start, keys in (span for block in self.laid.keys for span in block):
                for p in pieces(rows, keys, first - start if self.causal else None):
                    (a, b), (c, d) = p.rows, p.keys
                    found.append((row + a, b - a, key + c, d - c, p.triangle))
                key += keys
            row += rows
        return found

    def _seed(self, block: int, piece: int) -> int:
        most = 3 * (len(self.k_starts) // self.n) * (len(self.q_starts) // self.n)
        return (self.seed + most * block + piece) % 2**63

    def whole_mask(self, mask: Tensor | None) -> Tensor | None:
        """The mask's columns in the order of the keys of all places."""
        if mask is None or mask.shape[-1] == 1:
            return mask
        spans = (span for block in self.laid.keys for span in block)
        parts = [mask.narrow(-1, start - self.mask_start, keys) for start, keys in spans if keys]
        return torch.cat(parts, -1) if parts else mask[..., :0]

    def gathered(self) -> tuple[Cut, Any]:
        """Sizes of the keys of all ranks of the group; the windows that each asks for of them."""
        if self.team == 1 and not self.order:
            sizes = cut(self.laid.held if self.together == 1 else self.k_sizes)
            return sizes, whole(sizes)
        order = self.order or tuple(range(self.n * self.team))
        held = [0] * len(order)
        wanted: list[tuple[int, ...]] = [()] * len(order)
        for at, rank in enumerate(order):
            held[rank] = self.laid.held[at // self.team]
            wanted[rank] = order[at % self.team :: self.team]
        edges, ranks = cut(held).edges, [r for ring in wanted for r in ring]
        return cut(held), pairs(edges[:-1][ranks], edges[1:][ranks])

    @cached_property
    def shared(self) -> tuple[Cut, Any]:
        """Sizes of the keys of all ranks, which are in order; the window of each: its block."""
        sizes, m = cut(self.k_sizes), self.together
        ends = sizes.edges[::m]
        return sizes, pairs(ends[:-1].repeat(m), ends[1:].repeat(m))


def _moved(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by


@cached
def call_of(q_spans: tuple[Span, ...], k_spans: tuple[Span, ...], *rest: Any) -> Call:
    """Of the spans of all places; rest: the other fields of a call."""
    spans = (tuple(x) for spans in (q_spans, k_spans) for x in zip(*spans, strict=True))
    return Call(*spans, *rest)  # type: ignore[arg-type]
