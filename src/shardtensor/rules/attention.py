"""Scaled dot-product attention.

- Batch and heads may be sharded; queries may be, against whole keys and values: torch's own kernel.
- Keys and values sharded: a ring over their ranks, queries cut by the same mesh axes.
- A few whole queries against sharded keys (a class token): scores stay where the keys are, and the
  softmax and the sum over values are small all-reduces.
- A mask that needs a gradient, or dropout: keys and values are gathered.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import comm
from ..errors import UnsupportedOpError
from ..redistribute import fit, reduced
from ..registry import rule
from ..ring import ring_attention
from ..spec import Dim, Spec, nested_chunk_sizes
from ..tensor import ShardTensor, wrap

# below this many whole queries the scores against the local keys are small enough to keep
_FEW_QUERIES = 64


def _dims(x: Tensor) -> tuple[Dim, ...]:
    if isinstance(x, ShardTensor):
        return x._spec.dims
    return tuple(Dim(n) for n in x.shape)


def _autocast(x: Tensor) -> Tensor:
    kind = x.device.type
    if x.dtype is torch.float32 and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


@rule("scaled_dot_product_attention")
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if is_causal and attn_mask is not None:
        raise RuntimeError("scaled_dot_product_attention: is_causal needs attn_mask to be None")
    q, k, v = (
        _autocast(reduced(x) if isinstance(x, ShardTensor) else x) for x in (query, key, value)
    )
    if enable_gqa and q.shape[-3] != k.shape[-3]:
        times = q.shape[-3] // k.shape[-3]
        k, v = (x.repeat_interleave(times, -3) for x in (k, v))
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = (x if x.shape[:-2] == lead else x.expand(*lead, *x.shape[-2:]) for x in (q, k, v))
    mesh = next(x for x in (q, k, v, attn_mask) if isinstance(x, ShardTensor))._spec.mesh
    dims = _lead_dims(lead, (q, k, v))
    used = {a for d in dims for a in d.axes}
    rows, keys = _dims(q)[-2], _dims(k)[-2]
    if not keys.axes:
        keys = Dim(keys.size, *_dims(v)[-2][1:])
    rows = rows if used.isdisjoint(rows.axes) else Dim(rows.size)
    keys = keys if used.isdisjoint(keys.axes) else Dim(keys.size)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    needs_all = dropout_p > 0 or (attn_mask is not None and attn_mask.requires_grad)
    if keys.axes and needs_all:
        keys = Dim(keys.size)
    if keys.axes and not rows.axes and rows.size <= _FEW_QUERIES and not is_causal:
        return _few(q, k, v, attn_mask, scale)
    if keys.axes and rows.axes != keys.axes:
        rows, keys = _same_axes(mesh, rows, keys)
    plan = (Spec(mesh, (*dims, rows, Dim(q.shape[-1]))), dims, rows, keys)
    return _local_or_ring(plan, q, k, v, attn_mask, dropout_p, is_causal, scale)


def _four_dims(x: Tensor) -> Tensor:
    """(B, H, L, E), whatever dims lead."""
    return x.flatten(0, -4) if x.ndim > 4 else x[(None,) * (4 - x.ndim)]


def _lead_dims(lead: tuple[int, ...], tensors: tuple[Tensor, ...]) -> tuple[Dim, ...]:
    dims = [Dim(n) for n in lead]
    used: set[int] = set()
    for x in tensors:
        for i, d in enumerate(_dims(x)[:-2]):
            if d.axes and not dims[i].axes and used.isdisjoint(d.axes):
                dims[i] = d
                used.update(d.axes)
    return tuple(dims)


def _same_axes(mesh: Any, rows: Dim, keys: Dim) -> tuple[Dim, Dim]:
    """Queries and keys cut by the same mesh axes: those of the queries, if they have any."""
    axes = rows.axes or keys.axes
    parts = [mesh.size(a) for a in axes]
    if not rows.axes:
        rows = Dim(rows.size, axes, nested_chunk_sizes(rows.size, parts))
    else:
        keys = Dim(keys.size, axes, nested_chunk_sizes(keys.size, parts))
    return rows, keys


def _few(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = q @ k.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else (
            scores + mask
        )  # fmt: skip
    weights = scores.softmax(-1)
    if mask is not None:
        # torch gives zero, not NaN, to a query that may attend to nothing
        weights = torch.where(scores.amax(-1, keepdim=True) == float("-inf"), 0, weights)
    return weights @ v


def _local_or_ring(
    plan: tuple[Spec, tuple[Dim, ...], Dim, Dim], q: Tensor, k: Tensor, v: Tensor,
    mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float,
) -> ShardTensor:  # fmt: skip
    spec, dims, rows, keys = plan
    mesh = spec.mesh
    wanted = None
    if mask is not None:
        every = (*dims, rows, Dim(keys.size))
        own = every[len(every) - mask.ndim :]
        wanted = [d if d.size == n else Dim(n) for d, n in zip(own, mask.shape, strict=True)]
    local = fit(
        mesh, spec.varying,
        (q, (*dims, rows, Dim(q.shape[-1]))),
        (k, (*dims, keys, Dim(k.shape[-1]))),
        (v, (*dims, keys, Dim(v.shape[-1]))),
        (mask, wanted),
    )  # fmt: skip
    lq, lk, lv, lm = local
    assert lq is not None and lk is not None and lv is not None
    out = spec.with_dims((*dims, rows, Dim(v.shape[-1])))
    start = out.offset[-2]
    if keys.axes:
        if lm is not None and lm.ndim > 2 and q.ndim > 4:
            lm = lm.expand(*lq.shape[:-1], lm.shape[-1]).flatten(0, -4)
        flat = [_four_dims(x) for x in (lq, lk, lv)]
        name = comm.group(mesh, keys.axes)
        got = ring_attention(*flat, lm, keys.sizes, start, is_causal, scale, name)
        return wrap(got.reshape(out.local_shape), out)
    if dropout_p and spec.varying:
        raise UnsupportedOpError(
            f"scaled_dot_product_attention with dropout on {spec}: set dropout_p to 0"
        )
    if is_causal and rows.axes:
        i = torch.arange(start, start + lq.shape[-2], device=lq.device)[:, None]
        lm, is_causal = i >= torch.arange(keys.size, device=lq.device), False
    if 0 in lq.shape:
        # torch's kernels want rows; an empty product keeps the graph that other ranks have
        scores = lq @ lk.mT
        scores = scores + lm if lm is not None and lm.requires_grad else scores
        return wrap(scores @ lv, out)
    got = F.scaled_dot_product_attention(lq, lk, lv, lm, dropout_p, is_causal, scale=scale)
    return wrap(got, out)
