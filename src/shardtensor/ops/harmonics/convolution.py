"""Discrete-continuous convolutions on the sphere and their adjoints (Ocampo et al., 2209.13603)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...later import when_loaded
from ...rules.empty import with_one
from ...rules.windows import fetch
from ...spec import Dim, axes_in
from ...tensor import ShardTensor, wrap
from ...tensor.redistribute import to_dims
from .bands import (
    Entries,
    Span,
    Tables,
    among,
    band_of,
    beside,
    bound,
    check_plain,
    latitudes,
    longitudes_again,
    offsets_of,
    ops_of,
    part_of_rows,
    rows_of,
    takes,
)


def _convolved(
    x: ShardTensor,
    shape: tuple[int, ...],
    tables: Tables,
    entries: Callable[[], Entries],
    call: Callable[..., Tensor],
) -> ShardTensor:
    """call(circles, output latitudes, part of the tables, or nothing) on the rank's own latitudes.

    x: (batch, channels, ..., lat, lon); shape: of the result, likewise.
    """
    lat, dims = x.ndim - 2, x._spec.dims
    used = axes_in(dims[-2:])
    have = latitudes(dims[lat], used, x._spec.mesh)
    between = [d.whole for d in dims[2:lat]]
    x = to_dims(x, (*dims[:2], *between, have, dims[-1].whole))
    spec, me = x._spec, x._spec.index[lat]
    to = beside(have, shape[-2])
    out = spec.with_dims((*dims[:2], *map(Dim, shape[2:-2]), to, Dim(shape[-1])))
    if not have.is_cut:
        y = call(x._local, to.size)
    else:
        key = len(shape), *shape[-2:], x.shape[-1]
        band = band_of(tables, key, entries, have, to, me)
        rows = with_one(fetch(x._local, lat, spec, band.reach), [lat], 0.0)
        own = to.sizes[me]
        # without latitudes a rank computes one and drops it: autograd records what others record
        y = call(rows, max(1, own), *band.tables).narrow(len(shape) - 2, 0, own)
    return longitudes_again(wrap(y, out), len(shape) - 2, dims[lat], dims[-1], shape[-1])


def _values(vals: Tensor, picked: Tensor) -> Tensor:
    """Those of a part's entries; of no entries one that counts nothing, which kernels ask for."""
    return vals[picked] if len(picked) else vals.new_zeros(1, *vals.shape[1:])


def _by_kernel(adjoint: bool, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The C++ and CUDA kernels: tables are (offsets of rows, filter, row, column) and values."""
    x, roff, ker, row, col, vals, filters, lat, lon = bound(
        "inp roff_idx ker_idx row_idx col_idx vals kernel_size nlat_out nlon_out", args, kwargs
    )
    check_plain(roff, ker, row, col, vals)
    width = lon if adjoint else x.shape[-1]

    def entries() -> Entries:
        other = col // width
        out, into = (other, row) if adjoint else (row, other)

        def part(span: Span) -> Tables:
            picked = among(out, span.first, span.last)
            if not len(picked):
                return roff.new_tensor([0, 1]), *[roff.new_zeros(1)] * 3, picked
            first, start = span.first, span.start
            r = row[picked] - (start if adjoint else first)
            c = col[picked] - width * (first if adjoint else start)
            k = ker[picked]
            counts = torch.unique_consecutive(k * (len(row) + 1) + r, return_counts=True)[1]
            return offsets_of(counts), k, r, c, picked

        return Entries(out, into, part)

    def call(circles: Tensor, latitudes: int, *part: Tensor) -> Tensor:
        if not part:
            return function(circles, roff, ker, row, col, vals, filters, latitudes, lon)
        return function(circles, *part[:4], _values(vals, part[4]), filters, latitudes, lon)

    shape = (*x.shape[:2], *(() if adjoint else (filters,)), lat, lon)
    return _convolved(x, shape, (roff, ker, row, col), entries, call)


def _packed(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ShardTensor:
    """The kernel for tensor cores: all filters of an entry lie together, by output latitudes."""
    x, at, vals, offsets, filters, lat, lon = bound(
        "inp pack_idx pack_val pack_offset kernel_size nlat_out nlon_out", args, kwargs
    )
    check_plain(at, vals, offsets)

    def entries() -> Entries:
        def part(span: Span) -> Tables:
            own, picked = part_of_rows(offsets, at[:, 0], False, span)
            if not len(picked):
                ones = [1] * max(1, span.last - span.first)
                return at.new_zeros(1, 2), offsets.new_tensor([0, *ones]), picked
            return at[picked] - torch.tensor([span.start, 0], device=at.device), own, picked

        return Entries(rows_of(offsets), at[:, 0], part)

    def call(circles: Tensor, latitudes: int, *part: Tensor) -> Tensor:
        if not part:
            return function(circles, at, vals, offsets, filters, latitudes, lon)
        values = _values(vals, part[2])
        return function(circles, part[0], values, part[1], filters, latitudes, lon)

    return _convolved(x, (*x.shape[:2], filters, lat, lon), (at, offsets), entries, call)


def _fused(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A convolution that keeps nothing of its filters' width for backward: run again there."""
    x, weight, *tables, _, _, _, _, _, _, filters, lat, lon, groups, size = bound(
        "inp weight roff_idx ker_idx row_idx col_idx vals split_roff_idx split_nnz_off "
        "split_ker_idx split_row_idx split_col_idx split_vals kernel_size nlat_out nlon_out "
        "groups groupsize",
        args,
        kwargs,
    )
    (contract,) = ops_of("disco_kernels", "_disco_s2_contraction_optimized")
    device = x.device.type
    if device == "cuda" and torch.is_autocast_enabled(device):
        x, weight = (t.to(torch.get_autocast_dtype(device)) for t in (x, weight))

    def both(x: Tensor, weight: Tensor) -> Tensor:
        wide = contract(x, *tables, filters, lat, lon)
        wide = wide.reshape(x.shape[0], groups, size, filters, lat, lon)
        y = torch.einsum("bgckxy,gock->bgoxy", wide, weight.to(x.dtype))
        return y.reshape(x.shape[0], groups * weight.shape[1], lat, lon)

    with torch.autocast(device, enabled=False):
        y: Tensor = checkpoint(both, x, weight, use_reentrant=False, preserve_rng_state=False)
        return y


def _by_torch(adjoint: bool, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The package's loop in plain torch: its table is a sparse tensor (filter, out, into)."""
    x, psi, lon = bound("x psi nlon_out", args, kwargs)
    check_plain(psi)
    filters, lat, _ = psi.shape
    width = lon if adjoint else x.shape[-1]
    at = psi._indices()

    def entries() -> Entries:
        def part(span: Span) -> Tables:
            picked = among(at[1], span.first, span.last)
            shift = torch.tensor([[0], [span.first], [span.start * width]], device=at.device)
            return at[:, picked] - shift, picked

        return Entries(at[1], at[2] // width, part)

    def call(circles: Tensor, latitudes: int, *part: Tensor) -> Tensor:
        own = psi
        if part:
            size = (filters, latitudes, circles.shape[-2] * width)
            own = torch.sparse_coo_tensor(part[0], psi._values()[part[1]], size, is_coalesced=True)
        return function.__wrapped__(circles, own, lon)

    shape = (*x.shape[:2], *(() if adjoint else (filters,)), lat, lon)
    return _convolved(x, shape, (at,), entries, call)


def _register(_: ModuleType) -> None:
    one = "_disco_s2_contraction_optimized"
    adjoint = "_disco_s2_transpose_contraction_optimized"
    for turned, names in ((False, ("forward", one)), (True, ("backward", adjoint))):
        if ops := ops_of("disco_kernels", *names):
            takes(partial(_by_kernel, turned), *ops)
    if ops := ops_of("disco_kernels", "forward_kpacked"):
        takes(_packed, *ops)
    if ops := ops_of("disco_kernels", "_disco_s2_fused_conv_optimized"):
        takes(_fused, *ops)


when_loaded("torch_harmonics.disco.convolution", _register)
_DISCO = "torch_harmonics.disco.kernels_torch.disco_torch."
takes(partial(_by_torch, False), _DISCO + "_disco_s2_contraction_torch")
takes(partial(_by_torch, True), _DISCO + "_disco_s2_transpose_contraction_torch")
