"""Sorting along a sharded dim.

Where another dim can be sharded instead, one all-to-all brings each row to one rank and another
brings it back. A vector is sorted by samples (Shi, Schaeffer: Parallel sorting by regular sampling,
1992): every rank sorts its part, samples of all parts cut the values into ranges, one uneven
all-to-all sends each range to a rank. Equal values keep their order, on any number of ranks.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.return_types import sort as Sorted
from torch.return_types import topk as Top

from .. import _torch, comm
from ..comm import wire
from ..fallback import fall_back
from ..redistribute import aside, reduced, replicate, to_dims
from ..registry import rule
from ..spec import Dim, Spec
from ..tensor import ShardTensor, wrap
from .shape import _index

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def keys(x: Tensor, descending: bool) -> Tensor:
    """int64 numbers that ascend as torch sorts x: NaN above all, zeros alike."""
    if x.is_floating_point():
        # adding zero makes -0.0 a 0.0
        bits = (x.detach() + 0.0).view(_BITS[x.element_size()])
        most = torch.iinfo(bits.dtype).max
        found = torch.where(bits < 0, bits ^ most, bits).to(torch.int64)
        found = torch.where(x.isnan(), torch.iinfo(torch.int64).max, found)
    else:
        found = x.to(torch.int64)
    return ~found if descending else found


def _sorted_places(key: Tensor, sizes: tuple[int, ...], group: str) -> Tensor:
    """Global places of a sharded vector's elements in ascending order, cut in the same sizes."""
    n, me = len(sizes), comm.rank(group)
    start = list(accumulate(sizes, initial=0))[me]
    key, order = torch.sort(key, stable=True)
    place = order + start
    # n samples of each part; a pair of key and place is like no other
    at = torch.linspace(0, max(0, sizes[me] - 1), n).long()
    mine = torch.stack([key[at], place[at]]) if sizes[me] else key.new_zeros(2, 0)
    shapes = [(2, n if s else 0) for s in sizes]
    sample = torch.cat(wire.all_gather(mine, shapes, group), 1)
    _, by_place = torch.sort(sample[1], stable=True)
    sample = sample[:, by_place]
    sample = sample[:, torch.sort(sample[0], stable=True)[1]]
    picked = [(i * sample.shape[1]) // n for i in range(1, n)]
    cuts = [0, *(_below(key, place, *sample[:, i].tolist()) for i in picked), sizes[me]]
    counts = [b - a for a, b in pairwise(cuts)]
    table = wire.all_gather(torch.tensor(counts, device=key.device), [(n,)] * n, group)
    arriving = [int(row[me]) for row in table]
    both = torch.stack([key, place], 1)
    parts = wire.exchange(
        [[p] for p in both.split(counts)], [[[c, 2]] for c in arriving], both, group, "sort"
    )
    # parts come in the order of ranks, so that equal keys are in the order of their places
    range_ = torch.cat([p[0] for p in parts])
    range_ = range_[torch.sort(range_[:, 0], stable=True)[1]]
    have = [sum(int(row[r]) for row in table) for r in range(n)]
    windows = list(pairwise(accumulate(sizes, initial=0)))
    return comm.window(range_[:, 1].contiguous(), 0, have, windows, group)


def _below(key: Tensor, place: Tensor, k: int, p: int) -> int:
    """How many of a part's sorted (key, place) come before (k, p)."""
    first = int(torch.searchsorted(key, k))
    last = int(torch.searchsorted(key, k, right=True))
    return first + int(torch.searchsorted(place[first:last].contiguous(), p))


def _vector(x: ShardTensor, descending: bool) -> tuple[ShardTensor, ShardTensor]:
    dim = x._spec.dims[0]
    name = comm.group(x._spec.mesh, dim.axes)
    place = _sorted_places(keys(x._local, descending), dim.sizes, name)
    return wrap(comm.take(x._local, place, dim.sizes, name), x._spec), wrap(place, x._spec)


def ordered(x: ShardTensor, d: int, descending: bool) -> tuple[ShardTensor, ShardTensor] | None:
    """Sorted values and places along d, sharded as x is; None where that takes a gather."""
    dim = x._spec.dims[d] if x.ndim else Dim(1)
    y = x if len(dim.sizes) < 2 else aside(x, [d])
    if y is not None:
        if x.ndim == 0:
            found: Any = torch.sort(y._local)
        else:
            found = torch.sort(y._local, stable=True, dim=d, descending=descending)
        back = [to_dims(wrap(f, y._spec), x._spec.dims) for f in found]
        return back[0], back[1]
    if _torch.is_tracing() or x.numel() != dim.size or x.is_complex():
        return None
    flat = Spec(x._spec.mesh, (dim,))
    vector = wrap(x._local.reshape(-1), flat)
    values, places = _vector(vector, descending)
    shape = x._local.shape
    return wrap(values._local.view(shape), x._spec), wrap(places._local.view(shape), x._spec)


@rule("sort")
def sort(input: ShardTensor, *args: Any, **kwargs: Any) -> Any:
    """sort(input, dim, descending) and sort(input, *, stable, dim, descending)."""
    dim = kwargs.get("dim", args[0] if args else -1)
    descending = kwargs.get("descending", args[1] if len(args) > 1 else False)
    x = reduced(input)
    found = ordered(x, _index(dim, max(1, x.ndim)), bool(descending))
    if found is None:
        return fall_back(torch.sort, (x, dim, descending), {})
    return Sorted(found)


@rule("argsort")
def argsort(
    input: ShardTensor, dim: int = -1, descending: bool = False, *, stable: bool = False
) -> ShardTensor:
    return sort(input, dim=dim, descending=descending)[1]


@rule("msort")
def msort(input: ShardTensor) -> ShardTensor:
    return sort(input, dim=0)[0]


@rule("topk")
def topk(
    input: ShardTensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> Any:
    """Each shard's own k, of which all ranks' are brought together."""
    x = reduced(input)
    d = _index(dim, max(1, x.ndim))
    cut = x._spec.dims[d] if x.ndim else Dim(1)
    if len(cut.sizes) > 1 and 0 <= k <= cut.size:
        sizes = tuple(min(k, s) for s in cut.sizes)
        dims = list(x._spec.dims)
        dims[d] = Dim(sum(sizes), cut.axes, sizes)
        spec = x._spec.with_dims(dims)
        values, indices = x._local.topk(sizes[x._spec.index[d]], d, largest)
        indices = indices + x._spec.offset[d]
        own = wrap(values, spec), wrap(indices, spec)
        moved = [aside(c, [d]) for c in own]
        few, where = (replicate(c) if m is None else m for c, m in zip(own, moved, strict=True))
    else:
        few, where = x, None
    values, rows = few._local.topk(k, d if x.ndim else 0, largest, sorted)
    indices = rows if where is None else where._local.gather(d, rows)
    dims = [Dim(k) if i == d else n for i, n in enumerate(few._spec.dims)]
    spec = few._spec.with_dims(dims)
    return Top((wrap(values, spec), wrap(indices, spec)))
