"""Where the operands of attention are wanted, and between which ranks what travels."""

from __future__ import annotations

from itertools import product
from math import lcm
from typing import NamedTuple

import torch

from ..cache import cached
from ..errors import UnsupportedOpError
from ..spec import Dim, Spec

Known = Spec | torch.Size
Dims = tuple[Dim, ...]
NAME = "scaled_dot_product_attention"


class Plan(NamedTuple):
    """Where operands are wanted, and between which ranks keys travel or results are merged."""

    spec: Spec  # of the result
    wanted: tuple[Dims, Dims, Dims, Dims | None]
    keys: Dim
    varying: tuple[int, ...]
    ring: tuple[int, ...]
    merged: tuple[int, ...]
    shifted: bool  # this rank's queries need not be the first


def dims_of(x: Known) -> Dims:
    return x.dims if isinstance(x, Spec) else tuple(Dim(n) for n in x)


@cached
def plan(q: Known, k: Known, v: Known, mask: Known | None, grouped: bool) -> Plan:
    """Batch and heads keep their mesh axes; queries and keys get theirs of what is left."""
    known = [x for x in (q, k, v, mask) if x is not None]
    meshes = {x.mesh for x in known if isinstance(x, Spec)}
    if len(meshes) > 1:
        raise UnsupportedOpError(f"{NAME} of tensors on different meshes: {known}")
    (mesh,) = meshes
    operands = [dims_of(x) for x in known]
    used: set[int] = set()
    lead = max(len(dims) for dims in operands) - 2
    batch = [
        _batch_dim(operands, i - lead - 2, grouped and i == lead - 1, used) for i in range(lead)
    ]
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
        last = keys if merged and not ring else Dim(keys.size)
        wanted.append((*cut_alike(own[:-2], batch), *cut_alike(own[-2:], [queries, last])))
    return Plan(
        Spec(mesh, (*batch, queries, Dim(operands[2][-1].size))),
        tuple(wanted),  # type: ignore[arg-type]
        keys,
        tuple(sorted(used.union(queries.axes, keys.axes))),
        ring,
        merged,
        any(mesh.size(a) > 1 for a in queries.axes),
    )


def _batch_dim(operands: list[Dims], at: int, heads: bool, used: set[int]) -> Dim:
    """A leading dim of the result; takes the mesh axes of the first operand that shards it."""
    own = [dims[at] for dims in operands if len(dims) >= -at]
    size = 0 if any(d.size == 0 for d in own) else max(d.size for d in own)
    if any(d.size not in (1, size) and (not heads or size % d.size) for d in own):
        raise RuntimeError(f"{NAME}: leading dims {[d.size for d in own]} do not broadcast")
    # sizes of heads must suit every operand: whole groups that share a key head
    times = lcm(*(size // d.size for d in own if d.size > 1))
    for d in own:
        here = tuple(s * (size // d.size) for s in d.sizes) if d.size > 1 else d.sizes
        fits = d.size == size or (heads and d.size > 1)
        if d.axes and fits and used.isdisjoint(d.axes) and all(s % times == 0 for s in here):
            used.update(d.axes)
            return Dim(size, d.axes, here)
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
            found.append(Dim(d.size, w.axes, tuple(s * d.size // w.size for s in w.sizes)))
    return tuple(found)


def _tokens(own: Dim, others: list[Dims], used: set[int]) -> Dim:
    """Queries or keys, sharded as the first operand that shards them by free axes."""
    for d in (own, *(dims[-2] for dims in others)):
        if d.axes and d.size == own.size and used.isdisjoint(d.axes):
            return d
    return Dim(own.size)


@cached
def spans(p: Plan) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """(start, size) of the queries and of the keys of every rank of this rank's ring."""
    mesh = p.spec.mesh
    both = Spec(mesh, (p.spec.dims[-2],)), Spec(mesh, (p.keys,))
    place = list(p.spec.coordinate)
    found: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for ring in product(*(range(mesh.size(a)) for a in p.ring)):
        for axis, i in zip(p.ring, ring, strict=True):
            place[axis] = i
        for spec, into in zip(both, found, strict=True):
            (dim,), (i,) = spec.dims, spec.index_at(place)
            into.append((dim.offsets[i], dim.sizes[i]) if dim.axes else (0, dim.size))
    return tuple(found[0]), tuple(found[1])
