"""Where the operands of attention are wanted, and between which ranks what travels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import lcm, prod
from typing import Any, NamedTuple

import numpy as np

from ... import _torch, comm
from ...cache import cached
from ...cuts import Kept
from ...errors import UnsupportedOpError
from ...spec import Dim, Spec, axes_in, whole_dims
from .. import labels
from ..labels import Known

Dims = tuple[Dim, ...]
NAME = "scaled_dot_product_attention"
# the query's batch stays where it is
_FIRST = (0, 1, 2, 3)


# found once for operands that lie so, and by itself whatever follows from it
@dataclass(frozen=True, eq=False)
class Plan:
    """Where operands are wanted, and between which ranks keys travel or results are merged."""

    operands: tuple[Known, Known, Known, Known | None]
    grouped: bool
    spec: Spec  # of the result
    wanted: tuple[Dims, Dims, Dims, Dims | None]
    keys: Dim
    varying: tuple[int, ...]
    ring: tuple[int, ...]
    merged: tuple[int, ...]
    shifted: bool  # this rank's queries need not be the first

    @cached_property
    def groups(self) -> tuple[str, str]:
        """Of the ranks of this rank's ring, and of those whose results are merged."""
        return comm.group(self.spec.mesh, self.ring), comm.group(self.spec.mesh, self.merged)

    @cached_property
    def machines(self) -> tuple[str, int]:
        """The kind of device of the mesh, and of how many ranks."""
        return self.spec.mesh.device_type, self.spec.mesh.size()

    @cached_property
    def width(self) -> int:
        """Of a query's heads."""
        return dims_of(self.operands[0])[-1].size

    @cached_property
    def lies(self) -> bool:
        """Whether local queries, keys and values are what kernels take, as they are."""
        every = self.operands[:3]
        if any(not isinstance(x, Spec) or x.partial for x in every):
            return False
        dims = [dims_of(x) for x in every]
        return (
            all(d == w and len(d) == 4 for d, w in zip(dims, self.wanted, strict=False))
            and all(axes_in(d) == self.varying for d in dims)
            and len({d[0] for d in dims}) == len({d[1] for d in dims[1:]}) == 1
            and (self.grouped or dims[0][1] == dims[1][1])
        )

    @cached_property
    def flash(self) -> bool:
        """Whether one device takes torch's fused kernel for CPUs, of which some gradients differ.

        Where it may, without dropout or a learned mask.
        """
        q, k, v, *mask = ([d.size for d in dims_of(x)] for x in self.operands if x is not None)
        with _torch.outside_modes():
            return _torch.takes_flash_on_cpus(q, k, v, mask[0] if mask else None, self.grouped)


def dims_of(x: Known) -> Dims:
    return x.dims if isinstance(x, Spec) else whole_dims(x)


def check_shapes(q: Known, k: Known, v: Known, mask: Known | None) -> None:
    """Raise for what torch refuses."""
    every = [[d.size for d in dims_of(x)] for x in (q, k, v)]
    if min(map(len, every)) < 2:
        raise RuntimeError(f"{NAME}: query, key and value must be at least 2-D")
    if every[0][-1] != every[1][-1] or every[1][-2] != every[2][-2]:
        shapes = ", ".join(str(tuple(x)) for x in every)
        raise RuntimeError(f"{NAME}: shapes {shapes} do not fit")
    if mask is not None:
        shape = tuple([d.size for d in dims_of(mask)])
        if len(shape) < 2:
            raise RuntimeError(f"{NAME}: a mask of shape {shape}; it has 2 dims or more")
        if len(shape) > max(map(len, every)):
            raise UnsupportedOpError(f"{NAME}: a mask with more dims than query; reshape it first")


@cached
def plan(q: Known, k: Known, v: Known, mask: Known | None, grouped: bool) -> Plan:
    """Batch and heads keep their mesh axes; queries and keys get theirs of what is left."""
    check_shapes(q, k, v, mask)
    known = [x for x in (q, k, v, mask) if x is not None]
    operands = [dims_of(x) for x in known]
    lead = max(len(dims) for dims in operands) - 2
    shared = lead - 1 if grouped else lead
    terms = [labels.broadcast(max(0, len(x) - 2 - lead + shared), shared) for x in operands]
    outer = [_outer(x, len(t)) for x, t in zip(known, terms, strict=True)]
    together = labels.plan_of((*terms, labels.broadcast(shared, shared)), None, _FIRST, *outer)
    mesh, batch, used = together.mesh, list(together.out.dims), set(together.varying)
    if grouped:
        batch.append(_heads([dims[-3] for dims in operands if len(dims) > 2], used))
    queries = _tokens(operands[0][-2], operands[3:], used)
    keys = _tokens(operands[1][-2], [operands[2]], used)
    apart = [a for a in keys.axes if mesh.size(a) > 1]
    ring = tuple(a for a in apart if a in queries.axes)
    merged = tuple(a for a in apart if a not in ring)
    tokens = [queries, keys, keys]
    wanted: list[Dims | None] = []
    for own, at in zip(operands[:3], tokens, strict=True):
        first = cut_alike(own[:-2], batch)
        wanted.append((*first, at, Dim(own[-1].size)))
    if mask is None:
        wanted.append(None)
    else:
        own = operands[3]
        shape = [d.size for d in (*batch, queries, keys)]
        if any(d.size not in (1, n) for d, n in zip(own[::-1], shape[::-1], strict=False)):
            raise RuntimeError(f"{NAME}: a mask of {[d.size for d in own]} for scores of {shape}")
        last = keys if merged and not ring else keys.whole
        wanted.append((*cut_alike(own[:-2], batch), *cut_alike(own[-2:], [queries, last])))
    return Plan(
        (q, k, v, mask),
        grouped,
        Spec(mesh, (*batch, queries, Dim(operands[2][-1].size))),
        tuple(wanted),  # type: ignore[arg-type]
        keys,
        tuple(sorted(used.union(queries.axes, keys.axes))),
        ring,
        merged,
        any(mesh.size(a) > 1 for a in queries.axes),
    )


def _outer(x: Known, n: int) -> Known:
    """How the first n dims of an operand lie."""
    return x.with_dims(x.dims[:n]) if isinstance(x, Spec) else x[:n]


def _heads(own: list[Dim], used: set[int]) -> Dim:
    """The heads of the result, in whole groups that share a key head: labels have one size.

    They take the mesh axes of the first operand that shards them.
    """
    size = 0 if any(d.size == 0 for d in own) else max(d.size for d in own)
    if any(d.size not in (1, size) and size % d.size for d in own):
        raise RuntimeError(f"{NAME}: heads {[d.size for d in own]} do not broadcast")
    times = lcm(*(size // d.size for d in own if d.size > 1))
    for d in own:
        here = d.scaled(size, d.size) if d.size > 1 else d
        fits = d.axes and here.size == size and used.isdisjoint(d.axes)
        if fits and all(s % times == 0 for s in here.sizes):
            used.update(d.axes)
            return here
    return Dim(size)


def cut_alike(own: Dims, wanted: list[Dim] | Dims) -> Dims:
    """An operand's dims cut as those of the result: fewer heads in proportion, size 1 whole."""
    found = []
    for d, w in zip(own, wanted[len(wanted) - len(own) :], strict=True):
        if d.size == w.size:
            found.append(w)
        elif d.size == 1:
            found.append(Dim(1))
        else:
            found.append(w.scaled(d.size, w.size))
    return tuple(found)


def _tokens(own: Dim, others: list[Dims], used: set[int]) -> Dim:
    """Queries or keys, sharded as the first operand that shards them by free axes.

    By hand, since one mesh axis may shard both, a ring, where labels have an axis each.
    """
    for d in (own, *(dims[-2] for dims in others)):
        if d.axes and d.size == own.size and used.isdisjoint(d.axes):
            return d
    return own.whole


@cached
def spans(p: Plan) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """(start, size) of the queries and of the keys of every rank of this rank's ring."""
    mesh = p.spec.mesh
    place: list[Any] = list(p.spec.coordinate)
    # the coordinates of all ranks of the ring, in its order
    for axis, i in zip(p.ring, np.indices([mesh.size(a) for a in p.ring]), strict=True):
        place[axis] = i.ravel()
    found = []
    for dim in (p.spec.dims[-2], p.keys):
        (i,) = Spec(mesh, (dim,)).index_at(place)
        i = np.broadcast_to(i, prod(mesh.size(a) for a in p.ring))
        edges = dim.edges if dim.axes else np.array([0, dim.size])
        found.append(Kept(zip(edges[i].tolist(), (edges[i + 1] - edges[i]).tolist(), strict=True)))
    return found[0], found[1]


class Deal(NamedTuple):
    """Heads for tokens, shared out among the ranks of the tokens' last mesh axis.

    spec: of the operand then. alone, together: from where and to where it goes with its tokens as
    the first dim, by itself or as one of three along a new dim before the last two.
    """

    spec: Spec
    alone: tuple[Spec, Spec]
    together: tuple[Spec, Spec]


@cached
def dealt(x: Spec, axis: int) -> Deal:
    """How an operand (..., heads, tokens, width) goes whose tokens have this axis last."""
    *lead, heads, tokens, width = x.dims
    n = x.mesh.size(axis)
    sizes = tuple([sum(tokens.sizes[i : i + n]) for i in range(0, len(tokens.sizes), n)])
    outer = Dim(tokens.size, tokens.axes[:-1], sizes) if tokens.axes[:-1] else tokens.whole
    share = Dim.chunked(heads.size, (axis,), x.mesh)
    spec = x.with_dims((*lead, share, outer, width))
    alone, together = [
        tuple(
            [Spec(x.mesh, (t, *lead, *new, h, width)) for t, h in ((tokens, heads), (outer, share))]
        )
        for new in ((), (Dim(3),))
    ]
    return Deal(spec, alone, together)  # type: ignore[arg-type]


@cached
def heads_last(x: Spec) -> Spec:
    """The spec of (..., tokens, heads, width)."""
    *lead, heads, tokens, width = x.dims
    return x.with_dims((*lead, tokens, heads, width))
