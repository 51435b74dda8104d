"""The kernels of torch-harmonics 0.9 in plain torch, under its names, where the package is not.

They read tables as its C++ does: a row of the offsets is of the filter and the latitude that its
first entry names.
"""

import torch
from torch import Tensor

TABLES = "Tensor roff_idx, Tensor ker_idx, Tensor row_idx, Tensor col_idx, Tensor vals"
SIZES = "int kernel_size, int nlat_out, int nlon_out"
LIBRARY = []


def contraction(x, roff, ker, row, col, vals, filters, lat, lon):
    """(B, C, H, W) to (B, C, K, lat, lon): entries turn with the output's longitude."""
    assert int(roff[-1]) == len(col) and x.shape[-1] % lon == 0
    counts, first = roff.diff(), roff[:-1]
    group = (ker[first] * lat + row[first]).repeat_interleave(counts)
    step = x.shape[-1] // lon
    columns = []
    for w in range(lon):
        seen = x.roll(-w * step, -1).flatten(-2)[..., col] * vals
        sums = x.new_zeros(*x.shape[:2], filters * lat)
        columns.append(sums.index_add(2, group, seen))
    return torch.stack(columns, -1).view(*x.shape[:2], filters, lat, lon)


def adjoint(x, roff, ker, row, col, vals, filters, lat, lon):
    """(B, C, K, H, W) to (B, C, lat, lon): of the contraction from (lat, lon) to (H, W)."""
    there = x.new_zeros(*x.shape[:2], lat, lon)
    rest = roff, ker, row, col, vals, filters, *x.shape[3:]
    return torch.func.vjp(lambda y: contraction(y, *rest), there)[1](x)[0]


def attention(k, v, q, weights, col, roff, seg, seg_off, heads, lon_in, lat, lon):
    """(B, H, W, heads * C): softmax over the entries that see a point, weighted by quadrature."""
    rows = torch.arange(len(roff) - 1).repeat_interleave(roff.diff())
    arcs = torch.arange(len(seg_off) - 1).repeat_interleave(seg_off.diff().long())
    spreads = lon_in % lon != 0
    width = lon if spreads else lon_in
    # the arcs say the same as the columns
    held = [
        (r, h * width + (w + j) % width)
        for r, (h, w, n) in zip(arcs.tolist(), seg.tolist(), strict=True)
        for j in range(n)
    ]
    assert sorted(held) == sorted(zip(rows.tolist(), col.tolist(), strict=True))
    split = lambda x: x.unflatten(-1, (heads, -1)).movedim(3, 1)  # noqa: E731
    k, v, q = split(k), split(v), split(q)
    seen = torch.zeros(lat, lon, k.shape[2], lon_in, dtype=torch.bool)
    for r, c in zip(rows.tolist(), col.tolist(), strict=True):
        h, w = divmod(c, width)
        for turn in range(lon_in if spreads else lon):
            if spreads:
                seen[h, (w + turn * (lon // lon_in)) % lon, r, turn] = True
            else:
                seen[r, turn, h, (w + turn * (lon_in // lon)) % lon_in] = True
    mask = torch.where(seen, weights.log()[:, None], -torch.inf).flatten(2).flatten(0, 1)
    flat = [x.flatten(2, 3) for x in (q, k, v)]
    score = flat[0] @ flat[1].mT + mask
    y = score.softmax(-1) @ flat[2]
    return y.unflatten(2, (lat, lon)).movedim(1, 3).flatten(3)


def _custom(name, fn, operands):
    """An op that is differentiated by its operands, as the package's own are."""

    def setup(ctx, inputs, output):
        ctx.inputs = inputs

    def backward(ctx, g):
        own, rest = ctx.inputs[:operands], ctx.inputs[operands:]
        with torch.enable_grad():
            own = [x.detach().requires_grad_() for x in own]
            grads = torch.autograd.grad(fn(*own, *rest), own, g)
        return (*grads, *[None] * len(rest))

    op = torch.library.custom_op(
        name, lambda *args: fn(*args).contiguous(), mutates_args=(), schema=SCHEMAS[fn]
    )
    torch.library.register_autograd(name, backward, setup_context=setup)
    return op


SCHEMAS = {
    contraction: f"(Tensor inp, {TABLES}, {SIZES}) -> Tensor",
    adjoint: f"(Tensor inp, {TABLES}, {SIZES}) -> Tensor",
    attention: "(Tensor kw, Tensor vw, Tensor qw, Tensor quad_weights, Tensor col_idx, Tensor row_off, "
    "Tensor seg, Tensor seg_off, int nh, int nlon_in, int nlat_out, int nlon_out) -> Tensor",
}  # fmt: skip


def define():
    """Once; the library's own, if it has been imported."""
    if LIBRARY or hasattr(torch.ops.disco_kernels, "forward"):
        return
    library = torch.library.Library("disco_kernels", "FRAGMENT")
    LIBRARY.append(library)
    for name, fn in (("forward", contraction), ("backward", adjoint)):
        library.define(f"{name}(Tensor inp, {TABLES}, {SIZES}) -> Tensor")
        library.impl(name, fn, "CPU")
    packed = "Tensor inp, Tensor pack_idx, Tensor pack_val, Tensor pack_offset"
    library.define(f"forward_kpacked({packed}, {SIZES}) -> Tensor")
    library.impl("forward_kpacked", of_packed, "CPU")
    library.define(f"_disco_s2_fused_conv_optimized(Tensor inp, Tensor weight, {TABLES}, "
                   "Tensor split_roff_idx, Tensor split_nnz_off, Tensor split_ker_idx, Tensor split_row_idx, "
                   f"Tensor split_col_idx, Tensor split_vals, {SIZES}, int groups, int groupsize) -> Tensor")  # fmt: skip
    library.impl("_disco_s2_fused_conv_optimized", fused, "CompositeImplicitAutograd")
    _custom("disco_kernels::_disco_s2_contraction_optimized", contraction, 1)
    _custom("disco_kernels::_disco_s2_transpose_contraction_optimized", adjoint, 1)
    _custom("attention_kernels::_neighborhood_s2_attention_optimized", attention, 3)


def of_packed(x, at, vals, offsets, filters, lat, lon):
    """A contraction whose entries have all filters' values."""
    rows = torch.arange(lat).repeat_interleave(offsets.diff())
    col = at[:, 0] * x.shape[-1] + at[:, 1]
    parts = []
    for k in range(filters):
        ker = torch.zeros_like(rows)
        some = torch.cat([offsets[:1], offsets[1:]]).unique()
        parts.append(contraction(x, some, ker, rows, col, vals[:, k].contiguous(), 1, lat, lon))
    return torch.cat(parts, 2)


def fused(x: Tensor, weight, roff, ker, row, col, vals, *rest):
    filters, lat, lon, groups, size = rest[6:]
    wide = contraction(x, roff, ker, row, col, vals, filters, lat, lon)
    wide = wide.unflatten(1, (groups, size))
    return torch.einsum("bgckxy,gock->bgoxy", wide, weight).flatten(1, 2)
