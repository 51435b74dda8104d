"""Neighbourhood attention on the sphere, as torch-harmonics has it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch

from ...later import when_loaded
from ...rules.empty import with_one
from ...rules.operands import dims_of, mesh_of
from ...rules.windows import fetch
from ...spec import Dim, Spec, axes_in
from ...tensor import ShardTensor, wrap
from ...tensor.redistribute import fit
from .bands import (
    Entries,
    Span,
    Tables,
    band_of,
    beside,
    bound,
    check_plain,
    latitudes,
    longitudes_again,
    ops_of,
    part_of_rows,
    rows_of,
    takes,
)


def _attention(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ShardTensor:
    """Neighbourhood attention of (batch, lat, lon, channels of all heads); heads come whole."""
    k, v, q, weights, col, roff, seg, seg_off, heads, lon_in, lat, lon = bound(
        "kw vw qw quad_weights col_idx row_off seg seg_off nh nlon_in nlat_out nlon_out",
        args,
        kwargs,
    )
    check_plain(weights, col, roff, seg, seg_off)
    mesh, lies = mesh_of(q, k, v), [dims_of(x) for x in (q, k, v)]
    batch = next((d[0] for d in lies if d[0].axes), lies[0][0])
    free = [[a for a in axes_in(d[1:3]) if a not in batch.axes] for d in lies]
    used = tuple(next((axes for axes in free if axes), ()))
    have = next((d[1] for d in lies[1:] if d[1].axes == used), lies[1][1])
    have = latitudes(have, used, mesh)
    to = lies[0][1] if lies[0][1].axes == used else beside(have, lat)
    inner = [(batch, to if i == 0 else have, d[2].whole, d[3].whole) for i, d in enumerate(lies)]
    spec = Spec(mesh, (*inner[0][:3], Dim(v.shape[3])))
    varying = axes_in(spec.dims)
    qx, kx, vx = fit(mesh, varying, (q, inner[0]), (k, inner[1]), (v, inner[2]))
    if not have.is_cut:
        y = function(kx, vx, qx, weights, col, roff, seg, seg_off, heads, lon_in, lat, lon)
        return _again(wrap(y, spec), lies[0], lon)
    # a table of few outputs has a row for each input: its entries say which outputs it is seen by
    spreads = lon_in % lon != 0
    width = lon if spreads else lon_in

    def entries() -> Entries:
        row, other = rows_of(roff), col // width
        out, into = (other, row) if spreads else (row, other)

        def part(span: Span) -> Tables:
            offsets, picked = part_of_rows(roff, other, spreads, span)
            arcs, some = part_of_rows(seg_off, seg[:, 0].long(), spreads, span)
            first = span.first if spreads else span.start
            moved = seg[some] - torch.tensor([first, 0, 0], dtype=seg.dtype, device=seg.device)
            return col[picked] - first * width, offsets, moved, arcs

        return Entries(out, into, part)

    me = spec.index[1]
    band = band_of((col, roff, seg, seg_off), (lat, lon, lon_in), entries, have, to, me)
    keys = Spec(mesh, inner[1])
    kx, vx = (with_one(fetch(x, 1, keys, band.reach), [1], 0.0) for x in (kx, vx))
    own, (_, _, start, stop) = to.sizes[me], band.span
    part = band.tables
    if not own:
        # a latitude that sees one point and is dropped: autograd records what others record
        qx, start, stop = with_one(qx, [1], 0.0), 0, 1
        part = (
            col[:1] * 0,
            roff.new_tensor([0, 1]),
            seg.new_tensor([[0, 0, 1]]),
            seg_off.new_tensor([0, 1]),
        )
    y = function(
        kx, vx, qx, weights[start:stop].contiguous(), *part, heads, lon_in, max(1, own), lon
    )
    return _again(wrap(y.narrow(1, 0, own), spec), lies[0], lon)


def _again(y: ShardTensor, query: Sequence[Dim], lon: int) -> ShardTensor:
    return longitudes_again(y, 1, query[1], query[2], lon)


def _permuted(order: tuple[int, ...], function: Any, args: Any, kwargs: Any) -> ShardTensor:
    (x,) = bound("x", args, kwargs)
    spec = x._spec
    dims = [spec.dims[i] for i in order]
    return wrap(function(x._local), Spec(spec.mesh, tuple(dims), spec.partial))


def _register(_: ModuleType) -> None:
    one = "_neighborhood_s2_attention_"
    if ops := ops_of("attention_kernels", one + "optimized", one + "torch"):
        takes(_attention, *ops)
    for name, order in (("permute_to_nhwc", (0, 2, 3, 1)), ("permute_to_nchw", (0, 3, 1, 2))):
        if ops := ops_of("attention_kernels", name):
            takes(partial(_permuted, order), *ops)


when_loaded("torch_harmonics.attention.attention", _register)
