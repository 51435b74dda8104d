"""Neighbourhood attention over batch, spatial dims and heads, however they are sharded.

A sharded batch, spatial or head dim stays so; the embedding is made whole. A rank fetches the rows
of keys and values that the windows of its queries cover: windows at the global border are shifted
inward, so these rows are found from the first and the last of its queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...attention.neighborhood import (
    NAME,
    Bools,
    Ints,
    Line,
    Place,
    compute,
    installed,
    neighborhood_attention,
    windows,
)
from ...attention.tiles import call_of
from ...cache import cached
from ...errors import UnsupportedOpError
from ...registry import rule
from ...spec import Dim, Spec
from ...tensor import ShardTensor, wrap
from ...tensor.redistribute import fit
from ..operands import dims_of, mesh_of
from ..windows import Reach, fetch, reach_of
from .neighborhood_strips import attend_strips, sides_of

Dims = tuple[Dim, ...]


class Plan(NamedTuple):
    """Where operands are wanted, and what this rank fetches.

    reaches: (dim, keys that each rank needs) of every dim in which a rank needs rows of another, or
    not all of its own.
    """

    spec: Spec  # of the result
    wanted: tuple[Dims, Dims, Dims]
    reaches: tuple[tuple[int, Reach], ...]
    places: tuple[Place, ...]


@rule(neighborhood_attention)
def sharded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    *,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    scale: float | None = None,
) -> ShardTensor:
    lines = windows(query, key, value, kernel_size, stride, dilation, is_causal)
    return run(query, key, value, lines, scale, installed(query, value))


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lines: tuple[Line, ...],
    scale: float | None,
    natten: Callable[..., Tensor] | None,
) -> ShardTensor:
    """The result for operands of which at least one is a ShardTensor."""
    mesh = mesh_of(query, key, value)
    # operands on other meshes are refused by fit
    p = plan(Spec(mesh, dims_of(query)), dims_of(key), dims_of(value), lines)
    for_q, for_k, for_v = p.wanted
    q, k, v = fit(mesh, p.spec.varying, (query, for_q), (key, for_k), (value, for_v))
    sides = sides_of(p.spec, p.reaches) if natten is None and key.shape == value.shape else None
    if sides is not None:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        call = call_of(lines, [at[:2] for at in p.places], scale)
        return wrap(attend_strips(q, k, v, p.spec, p.reaches, sides, call), p.spec)
    if p.reaches and key.shape == value.shape:
        k, v = _fetch(torch.stack([k, v]), p, 1).unbind(0)
    elif p.reaches:
        k, v = _fetch(k, p), _fetch(v, p)
    return wrap(compute(q, k, v, lines, p.places, scale, natten), p.spec)


def _fetch(x: Tensor, p: Plan, lead: int = 0) -> Tensor:
    """x with the rows that this rank needs; `lead` dims come before the batch."""
    for d, reach in p.reaches:
        x = fetch(x, d, p.spec, reach, lead=lead)
    return x


@cached
def plan(query: Spec, key: Dims, value: Dims, lines: tuple[Line, ...]) -> Plan:
    """Each dim takes the mesh axes of the first operand that shards it by free ones."""
    q, used = query.dims, set[int]()
    lead = tuple(_chosen(dims, used) for dims in zip(q[:-2], key[:-2], value[:-2], strict=True))
    heads = _heads(q[-2], key[-2], value[-2], used)
    wanted = [(*lead, h, Dim(own[-1].size)) for own, h in zip((q, key, value), heads, strict=True)]
    spec = query.with_dims((*wanted[0][:-1], Dim(value[-1].size)))
    reaches, places = [], []
    for d, line in enumerate(lines, 1):
        dim = lead[d]
        own = dim.spans
        rows = tuple(line.rows(a, b) if a < b else (a, a) for a, b in own)
        if any(r != o for r, o in zip(rows, own, strict=True) if o[0] < o[1]):
            reaches.append((d, reach_of(dim, dim.offsets, rows)))
        else:
            rows = own
        (a, b), (start, stop) = own[spec.index[d]], rows[spec.index[d]]
        places.append(Place(a, start, b - a, stop - start))
    return Plan(spec, (wanted[0], wanted[1], wanted[2]), tuple(reaches), tuple(places))


def _chosen(dims: tuple[Dim, ...], used: set[int]) -> Dim:
    for d in dims:
        if d.axes and used.isdisjoint(d.axes):
            used.update(d.axes)
            return d
    return dims[0].whole


def _heads(q: Dim, k: Dim, v: Dim, used: set[int]) -> tuple[Dim, Dim, Dim]:
    """The heads of the operands cut alike, so that key heads lie beside the queries they serve."""
    if q.size == k.size:
        return (_chosen((q, k, v), used),) * 3
    times = q.size // k.size
    own = _chosen((q,), used)
    if any(n % times for n in own.sizes):
        raise UnsupportedOpError(
            f"{NAME}: {k.size} key heads for {q.size} query heads that are cut into {own.sizes}; "
            f"cut them into multiples of {times}, or redistribute so that heads are whole"
        )
    few = Dim(k.size, own.axes, tuple(n // times for n in own.sizes))
    return own, few, few
