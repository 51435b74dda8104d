"""The hard list: how the operands of an op may lie on meshes of 1 to 4 ranks and of 2 x 2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

import torch
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate, Shard

from shardtensor import testing as T

MESHES = ((1,), (2,), (3,), (4,), (2, 2))
Layout = tuple[tuple[int, ...], list[T.On | None]]


def cuts(size: int) -> list[tuple[int, ...]]:
    """Shard sizes of a dim; besides those of `testing.cuts` neighbours that are narrower than a halo."""
    return [*T.cuts(size), *([(2, 1, 1, size - 4)] if size >= 6 else [])]


def _line(x: Tensor, dims: Sequence[int], ranks: int) -> list[T.On]:
    """All cuts of the first dim; one of every other dim, even or not; addends."""
    found = [T.shard(d, c) for d in dims[:1] for c in cuts(x.shape[d]) if len(c) == ranks]
    for d in dims[1:]:
        n = x.shape[d]
        found += [T.shard(d)] if ranks == 2 else []
        found += [T.shard(d, (n - n // 3, 0, n // 3))] if ranks == 3 else []
    return found + ([T.On([Partial()])] if ranks == 2 and _sums(x) else [])


def _square(x: Tensor, dims: Sequence[int]) -> list[T.On]:
    """Two dims, one dim twice, one beside Replicate and beside Partial."""
    found = []
    for d, e in zip(dims, [*dims[1:], *dims[:1]], strict=True):
        n, m, third = x.shape[d], x.shape[e], x.shape[d] // 3
        if d != e:
            found.append(
                T.On([Shard(d), Shard(e)], {d: (n - n // 4, n // 4), e: (m // 3, m - m // 3)})
            )
        found.append(T.On([Shard(d), Shard(d)], {d: (third, 0, n - 2 * third, third)}))
    for d in dims[:1]:
        found.append(T.On([Replicate(), Shard(d)]))
        found += [T.On([Shard(d), Partial()])] if _sums(x) else []
    return found


def _sums(x: Tensor) -> bool:
    return x.dtype not in (torch.bool, torch.uint8)


def of(x: Tensor, dims: Sequence[int], mesh: tuple[int, ...]) -> list[T.On]:
    """The layouts of one tensor, cut along some of `dims` (the first: in every way)."""
    return _square(x, dims) if len(mesh) == 2 else _line(x, dims, mesh[0])


def layouts(operands: Sequence[Tensor], dims: Sequence[Sequence[int]]) -> Iterator[Layout]:
    """Each operand sharded while the others are plain, all of them alike, and each in another way.

    The first operand and what is alike take every layout, the rest every second one.
    """
    for mesh in MESHES:
        each = [of(x, d, mesh) if d else [] for x, d in zip(operands, dims, strict=True)]
        for i, found in enumerate(each):
            for on in found[:: 2 if i else 1]:
                yield mesh, [on if i == j else None for j in range(len(each))]
        if sum(map(bool, each)) < 2:
            continue
        for row in zip_longest(*each):
            yield mesh, list(row)
        whole = T.replicated(len(mesh))
        turned = [o[i:] + o[:i] + [whole] if o else [] for i, o in enumerate(each)]
        for row in [*zip_longest(*turned)][::2]:
            yield mesh, list(row)


def plain(i: int) -> Callable[[Layout], bool]:
    """Whether a layout has operand i plain."""
    return lambda on: on[1][i] is None


def two_dims(on: Layout) -> bool:
    """Whether a layout shards two dims of one operand."""
    places = [p for p in on[1] if p is not None]
    return any(len({p.dim for p in o.placements if isinstance(p, Shard)}) > 1 for o in places)


def partial(on: Layout) -> bool:
    """Whether ranks hold addends of an operand."""
    return any(p.is_partial() for o in on[1] if o is not None for p in o.placements)


def kind(on: Layout) -> tuple[object, ...]:
    """The mesh, and of each operand whether it is cut along one dim, two or one twice, and how evenly."""
    return on[0], *map(_kind, on[1])


def _kind(on: T.On | None) -> tuple[object, ...]:
    if on is None:
        return ()
    dims = [p.dim for p in on.placements if isinstance(p, Shard)]
    sizes = [n for d in {*dims} for n in (on.sizes or {}).get(d, ())]
    evenness = min(sizes) if sizes and min(sizes) < 2 else len({*sizes}) > 1
    return len(dims), len({*dims}), evenness, any(p.is_partial() for p in on.placements)


def cut(on: Layout) -> set[tuple[int, int]]:
    """The dims that are cut, as (operand, dim)."""
    every = [(i, p) for i, o in enumerate(on[1]) if o is not None for p in o.placements]
    return {(i, p.dim) for i, p in every if isinstance(p, Shard)}


def of_each_kind(every: Sequence[Layout], known: Sequence[Layout], turn: int) -> list[Layout]:
    """Of each kind that `known` lacks one layout, another one for each turn, and what cuts each dim."""
    kinds: dict[object, list[Layout]] = {}
    for on in every:
        kinds.setdefault(kind(on), []).append(on)
    for on in known:
        kinds.pop(kind(on), None)
    found = [same[(turn + n) % len(same)] for n, same in enumerate(kinds.values())]
    met = {at for on in [*known, *found] for at in cut(on)}
    for on in every:
        if not cut(on) <= met:
            found.append(on)
            met |= cut(on)
    return [on for on in every if any(on is x for x in found)]
