"""Sorting along a sharded dim, and the largest of it.

Where another dim can take the shards, `aside` brings the sorted one together. Else the ranks sort
in parallel: each its own rows, then the exact places at which to cut every rank's sorted rows so
that each piece of the result has the size of a shard (`cuts`: a few small all-reduces), two
all-to-alls, and a sort of what came. Ties keep their order in the whole tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ... import _torch, comm
from ...comm.route import Route, fetch, integers, turned
from ...comm.rows import exchange_rows
from ...dispatch.fallback import fall_back
from ...registry import rule
from ...spec import Dim, Spec
from ...tensor import ShardTensor, wrap
from ...tensor.recut import aside
from ...tensor.redistribute import reduced, to_dims
from ..reduce import over
from ..views.slices import sliced

_BITS = {
    torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}  # fmt: skip
_INTEGERS = {torch.bool: torch.int8, torch.uint8: torch.int16} | {
    t: t for t in (torch.int8, torch.int16, torch.int32, torch.int64)
}
_DIGIT = 8
# up to so many elements, one all-gather takes less time than the messages that count
FEW = 1 << 13


def has_keys(dtype: torch.dtype) -> bool:
    """Whether `keys` takes numbers of this dtype."""
    return dtype in _BITS or dtype in _INTEGERS


def keys(x: Tensor, descending: bool = False) -> Tensor:
    """Integers in the order that torch sorts x: NaN above all else, both zeros alike."""
    x = x.detach()
    if x.dtype in _BITS:
        # adding zero makes -0.0 positive; negative numbers have their bits in reverse order
        found = (x + 0.0).view(_BITS[x.dtype])
        info = torch.iinfo(found.dtype)
        found ^= (found >> info.bits - 1).bitwise_and_(info.max)
        found.masked_fill_(x.isnan(), info.max)
    else:
        found = x.to(_INTEGERS[x.dtype], copy=True)
    return found.bitwise_not_() if descending else found


def cuts(found: Tensor, first: Tensor, group: str) -> Tensor:
    """How many of each rank's sorted keys are among the first ones of all ranks'.

    found: (lanes, n) integers, each rank's own, ascending in each lane. first: (lanes, m), how many
    of all are asked for, the same on all ranks. Gives (ranks, lanes, m), the same on all ranks;
    equal keys count in the order of the ranks. One all-reduce of 256 counts for every byte of a
    key, which is found from its highest byte on, and one small all-gather.
    """
    bits = torch.iinfo(found.dtype).bits
    key = torch.zeros_like(first)
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        half = 1 << (_DIGIT - 1) if shift == bits - _DIGIT else 0
        digits = torch.arange(-half, (1 << _DIGIT) - half, device=found.device)
        edges = key[..., None] + (digits << shift)  # (lanes, m, 256)
        below = _position(found, edges.flatten(1), False).view(edges.shape)
        below = comm.reduce(below, group)
        at = (below <= first[..., None]).sum(-1, keepdim=True) - 1
        key = edges.gather(-1, at).squeeze(-1)
    less, most = _position(found, key, False), _position(found, key, True)
    every = comm.gather(torch.stack((less, most))[None], 0, [1] * comm.size(group), group)
    less, ties = every[:, 0], every[:, 1] - every[:, 0]
    wanted = first - less.sum(0) - (ties.cumsum(0) - ties)
    return less + torch.minimum(wanted.clamp(min=0), ties)


def _position(found: Tensor, at: Tensor, right: bool) -> Tensor:
    return torch.searchsorted(found, at.to(found.dtype), right=right)


def cut_at(input: Tensor, dim: int) -> tuple[ShardTensor, int | None]:
    """(input without addends, the dim if it lies in several shards and has elements)."""
    assert isinstance(input, ShardTensor)
    x = reduced(input)
    for d in over(dim, x.ndim):
        if x._spec.dims[d].is_cut:
            if x.numel():
                return x, d
            # made whole, which sends nothing
            x = to_dims(x, x._spec.whole_in([d]).dims)
    return x, None


def beside(x: ShardTensor, d: int) -> ShardTensor | None:
    """x with the cut dim d whole, where that is the cheapest; None: use `cuts`."""
    most = max((n.size for i, n in enumerate(x._spec.dims) if i != d and not n.axes), default=1)
    # a dim of fewer rows than ranks would leave some without work
    if most >= len(x._spec.dims[d].sizes) or not has_keys(x.dtype) or _torch.is_tracing():
        return aside(x, [d])
    if x.numel() > FEW:
        return None
    return to_dims(x, x._spec.whole_in([d]).dims)


def lanes(local: Tensor, d: int) -> Tensor:
    """(lanes, rows of dim d): the other dims, in order, as one."""
    moved = local.movedim(d, -1)
    return moved.reshape(prod(moved.shape[:-1]), moved.shape[-1])


# sort --------------------------------------------------------------------------------------------


def _order(x: ShardTensor, d: int, descending: bool) -> tuple[Tensor, Tensor]:
    """(lanes, rows): this rank's part of x sorted along d, and of the indices that sort it.

    Memory of a few shards; two all-to-alls, of the elements and of their indices.
    """
    dim, me = x._spec.dims[d], x._spec.index[d]
    group = comm.along(x._spec, d)
    flat = lanes(x._local, d)
    own, places = keys(flat, descending).sort(stable=True)
    count, device = own.shape[0], own.device
    if not count:
        return flat, places
    inner = torch.tensor(dim.offsets[1:-1], device=device).expand(count, -1)
    inside = cuts(own, inner, group)
    del own
    ends = torch.tensor(dim.sizes, device=device)[:, None, None].expand(-1, count, 1)
    # (from, lane, to): how many rows each rank sends to each other
    moves = torch.cat([inside, ends], -1).diff(dim=-1, prepend=torch.zeros_like(ends))
    if comm.spreads(group, "elements are taken to go to all ranks evenly"):
        even = torch.tensor(comm.spread(dim.sizes, dim.sizes), device=device)
        moves = even[:, None].expand(-1, count, -1)
    sent = moves.sum(1).tolist()
    # what is kept for backward, too
    short = integers(count * dim.size)
    places, rows = places.to(short), flat.shape[1]
    if count > 1:
        # to one rank after the other, lane by lane
        places += rows * torch.arange(count, dtype=short, device=device)[:, None]
        places = places.flatten()[turned(moves[me], short, places.numel())]
    places = places.flatten()
    gives, gets = sent[me], [row[me] for row in sent]

    def by_lane(came: Tensor) -> Tensor:
        if count > 1:
            came = came[turned(moves[..., me], short, sum(gets))]
        return came.view(count, -1)

    way = Route(places, (*gives,), (*gets,), None, max(dim.sizes), group)
    found = by_lane(fetch(flat.flatten(), way))
    del way
    # equal ones came in the order of the ranks
    found, order = found.sort(descending=descending, stable=True)
    # after the elements: until they are sorted they are in memory twice
    numbers = places.remainder(rows) if count > 1 else places.clone()
    del places
    numbers = exchange_rows(numbers.add_(dim.offsets[me]), gives, gets, group, "sort")
    numbers = by_lane(numbers).gather(1, order)
    if _torch.differentiated(found):
        return found, numbers.long()
    return found, order.copy_(numbers)


def _sorted(fn: Any, input: Tensor, dim: int, descending: bool, stable: bool | None) -> Any:
    """(values, indices), or for argsort only the latter, sharded as the input is."""
    options = {"dim": dim, "descending": descending, "stable": bool(stable)}
    x, d = cut_at(input, dim)
    if d is None:
        return _wrapped(fn(x._local, **options), x._spec)
    y = beside(x, d)
    if y is not None:
        spec, found = y._spec, fn(y._local, **options)
        parts = [found] if isinstance(found, Tensor) else [*found]
        del y, found
        return tuple(_home(parts, spec, x._spec.dims))
    if _torch.is_tracing() or not has_keys(x.dtype):
        every = fall_back(fn, (x,), options)
        return (every,) if isinstance(every, Tensor) else tuple(every)
    shape = x._spec.local_shape
    shape = torch.Size([*shape[:d], *shape[d + 1 :], shape[d]])
    ordered = _order(x.detach() if fn is torch.argsort else x, d, descending)
    given = ordered[1:] if fn is torch.argsort else ordered
    return tuple(wrap(p.view(shape).movedim(-1, d), x._spec) for p in given)


def _home(found: list[Tensor], spec: Spec, dims: Sequence[Dim]) -> Iterator[ShardTensor]:
    """What a sort gave, sharded as `dims` say; each is released once it has moved.

    The last are indices, which travel in as few bytes as hold them.
    """
    short = prod(spec.shape) > FEW and max(spec.shape) <= torch.iinfo(torch.int32).max
    while found:
        local = found.pop(0)
        if found or not short:
            yield to_dims(wrap(local, spec), dims)
        else:
            local = local.int()
            moved = to_dims(wrap(local, spec), dims)
            yield wrap(moved._local.long(), moved._spec)


def _wrapped(found: Any, spec: Spec) -> Any:
    found = (found,) if isinstance(found, Tensor) else found
    return tuple(wrap(f, spec) for f in found)


@rule("sort")
def sort(
    input: Tensor, dim: int = -1, descending: bool = False, stable: bool | None = False
) -> Any:
    return torch.return_types.sort(_sorted(torch.sort, input, dim, descending, stable))


@rule("argsort")
def argsort(
    input: Tensor, dim: int = -1, descending: bool = False, stable: bool | None = False
) -> Tensor:
    if input.dtype.is_complex:
        return sort(input, dim, descending, stable)[1]
    return _sorted(torch.argsort, input.detach(), dim, descending, stable)[0]


@rule("msort")
def msort(input: Tensor) -> Tensor:
    return sort(input, 0)[0]


# topk --------------------------------------------------------------------------------------------


@rule("topk")
def topk(input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """The best of the best k of each rank, alike on all; for large k a part of the sorted dim."""
    x, d = cut_at(input, dim)
    rows = x._spec.dims[d] if d is not None else Dim(0)
    have = tuple(min(k, n) for n in rows.sizes)
    if d is not None and not 0 <= k <= rows.size:
        raise RuntimeError("selected index k out of range")
    if d is not None and 2 * sum(have) > rows.size:
        y = beside(x, d)
        if y is not None:
            x, d = y, None
        elif has_keys(x.dtype) and not _torch.is_tracing():
            values, indices = _sorted(torch.sort, x, d, largest, True)
            return torch.return_types.topk((sliced(values, d, 0, k), sliced(indices, d, 0, k)))
    spec = x._spec.replace(dict.fromkeys(over(dim, x.ndim), Dim(k)))
    if d is None:
        found = torch.topk(x._local, k, dim, largest, sorted)
        return torch.return_types.topk(_wrapped(found, spec))
    best, places = torch.topk(x._local, have[x._spec.index[d]], d, largest, sorted)
    group = comm.along(x._spec, d)
    best = comm.gather(best, d, have, group)
    places = comm.gather(places + x._spec.offset[d], d, have, group)
    best, at = torch.topk(best, k, d, largest, sorted)
    return torch.return_types.topk((wrap(best, spec), wrap(places.gather(d, at), spec)))
