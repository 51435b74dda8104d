"""Which latitudes of a sphere each rank's outputs see, and their part of a table of entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ... import _torch
from ...dispatch.rule import rule
from ...errors import UnsupportedOpError
from ...rules.routes import kept
from ...rules.windows import Reach, reach_of
from ...spec import Dim
from ...tensor import ShardTensor
from ...tensor.redistribute import to_dims

Tables = tuple[Tensor, ...]


class Span(NamedTuple):
    """The output latitudes of a rank [first, last), and the input latitudes that they see."""

    first: int
    last: int
    start: int
    stop: int


class Band(NamedTuple):
    """What every rank's output latitudes see, what this rank's do, and their part of the tables."""

    reach: Reach
    span: Span
    tables: Tables


class Entries(NamedTuple):
    """Of each entry of the tables the output and the input latitude; part makes those of a span."""

    out: Tensor
    into: Tensor
    part: Callable[[Span], Tables]


def band_of(
    tables: Tables, key: Any, entries: Callable[[], Entries], have: Dim, to: Dim, me: int
) -> Band:
    """Found once in O(entries), kept while the tables live; nothing is sent."""
    if _torch.is_tracing():
        raise UnsupportedOpError(
            "a layer of torch-harmonics inside of a graph: which latitudes ranks send depends on "
            "its table of entries, which a trace does not know; call it outside of what is compiled"
        )

    def find() -> Band:
        table = entries()
        reach = _seen(table, have, to)
        span = Span(*to.spans[me], *reach.windows[me])
        return Band(reach, span, table.part(span))

    return kept(tables, (band_of, key, have, to, me), find)


def _seen(table: Entries, have: Dim, to: Dim) -> Reach:
    """The input latitudes of every rank: from the first to the last that its outputs see."""
    low = torch.full((to.size,), have.size, device=table.out.device)
    high = torch.zeros_like(low)
    low.scatter_reduce_(0, table.out, table.into, "amin")
    high.scatter_reduce_(0, table.out, table.into + 1, "amax")
    lows, highs = low.tolist(), high.tolist()
    windows = []
    for (a, b), own in zip(to.spans, have.offsets, strict=False):
        start, stop = (min(lows[a:b]), max(highs[a:b])) if a < b else (own, own)
        windows.append((start, stop) if start < stop else (own, own))
    return reach_of(have, to.offsets, windows)


def among(x: Tensor, first: int, last: int) -> Tensor:
    """Where x is in [first, last)."""
    return ((x >= first) & (x < last)).nonzero()[:, 0]


def offsets_of(counts: Tensor) -> Tensor:
    """Where rows with so many entries begin, and the end."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def latitudes(own: Dim, used: tuple[int, ...], mesh: DeviceMesh) -> Dim:
    """Latitudes cut by these axes: as they lie where they are cut so."""
    return own if own.axes == used else Dim.chunked(own.size, used, mesh)


def beside(have: Dim, size: int) -> Dim:
    """So many output latitudes, cut where those of the input are."""
    if size == have.size or not have.axes:
        return have if size == have.size else Dim(size)
    return have.cut_at([o * size // max(1, have.size) for o in have.offsets])


def longitudes_again(y: ShardTensor, lat: int, own: Dim, lon: Dim, size: int) -> ShardTensor:
    """y with latitudes and longitudes cut by the axes by which the operand's are."""
    if not lon.axes:
        return y
    dims = list(y._spec.dims)
    dims[lat] = beside(own, dims[lat].size)
    dims[lat + 1] = Dim.chunked(size, lon.axes, y._spec.mesh)
    return to_dims(y, dims)


def check_plain(*tables: Tensor) -> None:
    if any(isinstance(t, ShardTensor) for t in tables):
        raise UnsupportedOpError(
            "a layer of torch-harmonics whose table of entries is a ShardTensor: leave its buffers "
            "plain, every rank takes its part of them"
        )


def bound(names: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments in the order of their names."""
    every = names.split()
    given = dict(zip(every, args, strict=False)) | kwargs
    return [given[name] for name in every]


def rows_of(offsets: Tensor) -> Tensor:
    """The row of each entry."""
    rows = torch.arange(len(offsets) - 1, device=offsets.device)
    return rows.repeat_interleave(offsets.diff().long())


def part_of_rows(
    offsets: Tensor, other: Tensor, spreads: bool, span: Span
) -> tuple[Tensor, Tensor]:
    """Offsets of the rows that a span has of a table, and which entries they hold."""
    row = rows_of(offsets)
    picked = among(other if spreads else row, span.first, span.last)
    first, last = (span.start, span.stop) if spreads else span[:2]
    counts = torch.bincount(row[picked] - first, minlength=last - first)
    return offsets_of(counts).to(offsets.dtype), picked


def takes(run: Callable[..., Any], *keys: Any) -> None:
    """run(function, args, kwargs) is the rule for these ops."""

    def asked(function: Any, args: Any, kwargs: Any) -> Any:
        return run(function, args, kwargs)

    asked.takes_function = True  # type: ignore[attr-defined]
    rule(*keys)(asked)


def ops_of(library: str, *names: str) -> list[Any]:
    """The ops of these names that the library has."""
    return [op for n in names if (op := getattr(getattr(torch.ops, library), n, None))]
