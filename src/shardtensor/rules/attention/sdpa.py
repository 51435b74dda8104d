"""Scaled dot-product attention over batch, heads, queries and keys, however they are sharded.

- A batch or head dim that is sharded stays so, and an operand that has it is cut alike.
- Mesh axes that shard keys and queries: a ring, in which keys travel and queries stay; or an
  all-to-all of tokens for heads; or both (see `shardtensor.attention.strategy`).
- Mesh axes that shard keys alone: each rank attends to its keys, then the results are merged.
- Mesh axes that shard queries alone: keys whole on each of them.
- The embedding is made whole.

`multi_head_attention_forward` and the modules above it run as they are written: they come down to
`linear`, views and this.
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ... import _torch
from ..._torch import probe
from ...attention import Way, attend, attend_balanced, attend_in_teams, chosen, rates, strategy
from ...cache import cached
from ...dispatch.fallback import gathered
from ...registry import rule
from ...spec import Dim, Spec
from ...tensor import ShardTensor, wrap
from ...tensor.convert import convert
from ...tensor.random import generator_for, matching
from ...tensor.redistribute import fit, like, reduced, to_dims
from ..empty import stock
from ..labels import Known, known
from .plan import (
    NAME,
    Plan,
    check_shapes,
    dealt,
    dims_of,
    heads_last,
    plan,
    spans,
)
from .way import RING, dealt_along, way


@rule(NAME)
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> ShardTensor:
    """Local where keys are whole; else around a ring, merged, or by heads."""
    query, key, value = reduced(query), reduced(key), reduced(value)
    attn_mask = reduced(attn_mask)
    on_cpu = query.device.type == "cpu"
    dtype = _check(query, key, value, attn_mask)
    if dropout_p and not 0 <= dropout_p <= 1:
        raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {dropout_p}")
    flash = torch.backends.cuda.flash_sdp_enabled() and not dropout_p
    flash = flash and (attn_mask is None or not attn_mask.requires_grad)
    masked = None if attn_mask is None else known(attn_mask)
    if enable_gqa:
        facts = known(query), known(key), known(value)
        check_shapes(*facts, masked)
        if not heads_fit(*facts):
            key, value = (repeated(x, query.shape[-3] // x.shape[-3]) for x in (key, value))
    p = plan(known(query), known(key), known(value), masked, enable_gqa)
    exact = not (on_cpu and flash and p.flash)
    if masked is not None and is_causal:
        if _refusal():
            raise RuntimeError(_refusal())
        if exact and on_cpu:
            raise RuntimeError(f"{NAME}: Explicit attn_mask should not be set when is_causal=True")
    options = {"scale": scale, "enable_gqa": enable_gqa}
    if dropout_p and matching():
        call = (query, key, value, attn_mask, dropout_p, is_causal)
        whole = gathered(F.scaled_dot_product_attention, call, options)
        return to_dims(whole, p.spec.dims)
    goes = RING
    if p.ring:
        items = dtype.itemsize, 1 if attn_mask is None else attn_mask.dtype.itemsize
        device, ranks = p.machines
        limits = rates(device, items[0], ranks)
        goes = way(p, bool(dropout_p), is_causal, items, chosen(), limits)
    if goes.kind == "all_to_all":
        axis = dealt_along(p)
        assert axis is not None
        return _by_heads(p, (query, key, value), axis, {"is_causal": is_causal, **options})
    for_q, for_k, for_v, for_mask = p.wanted
    rows, for_mask = _rows_of_mask(p, goes, masked)
    if p.lies and attn_mask is None:
        # as `fit` does, at a fraction of its cost
        q, k, v, mask = query._local, key._local, value._local, None  # type: ignore[attr-defined]
    else:
        q, k, v, mask = fit(
            p.spec.mesh, p.varying,
            (query, for_q), (key, for_k), (value, for_v), (attn_mask, for_mask),
        )  # fmt: skip
    shape = p.spec.local_shape
    if not (p.ring or p.merged or (is_causal and p.shifted) or dropout_p):

        def local(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
            )

        out = local(q, k, v, mask) if shape.numel() else stock(local, shape, q, k, v, mask)
        return wrap(out, p.spec)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    scale = max(1, p.width) ** -0.5 if scale is None else scale
    return _in_blocks(p, goes, (q, k, v, mask), rows, is_causal, scale, exact, dropout_p)


def _rows_of_mask(p: Plan, goes: Way, mask: Known | None) -> tuple[str, tuple[Dim, ...] | None]:
    """Which rows of a mask a rank of a team has, and in which dims it is wanted."""
    rows, wanted = "own", p.wanted[3]
    if wanted is None or mask is None:
        return rows, wanted
    if (mask.shape if isinstance(mask, Spec) else mask)[-2] == 1:
        rows = "one"
    elif goes.kind == "usp" and not isinstance(mask, Spec):
        # a mask that every rank has needs no exchange within a team
        rows = "whole"
    if goes.kind == "usp" and rows != "own":
        wanted = (*wanted[:-2], wanted[-2].whole, wanted[-1])
    return rows, wanted


def _in_blocks(
    p: Plan,
    goes: Way,
    operands: tuple[Tensor, Tensor, Tensor, Tensor | None],
    rows: str,
    causal: bool,
    scale: float,
    exact: bool,
    drop: float,
) -> ShardTensor:
    """Block by block around the ring that `goes` says, merged; rows: those of a mask in a team."""
    shape, (q, k, v, mask) = p.spec.local_shape, operands
    lead = shape[:-2]
    if not p.lies:
        q, k, v = heads_apart(q, k, v, lead)
    (ring, merged), (q_spans, k_spans) = p.groups, spans(p)
    if goes.kind == "zigzag":
        sizes = p.keys.sizes
        out = attend_balanced(
            q, k, v, sizes=sizes, scale=scale, exact=exact, group=ring, alone=merged
        )
        return wrap(out.reshape(shape), p.spec)
    apart = None if mask is None else _mask_apart(autocast(mask), lead)
    common: dict[str, Any] = dict(
        q_spans=q_spans, k_spans=k_spans, causal=causal, scale=scale, exact=exact,
        drop=drop, seed=_seed(p, q.device) if drop else 0, group=ring, merged=merged,
    )  # fmt: skip
    if goes.kind == "usp":
        out = attend_in_teams(q, k, v, apart, team=goes.team, rows=rows, **common)
    else:
        start = 0 if p.ring or not p.merged else k_spans[0][0]
        together = goes.team if goes.kind == "gather" else 1
        out = attend(q, k, v, apart, mask_start=start, together=together, **common)
    return wrap(out if p.lies else out.reshape(shape), p.spec)


# all-to-all --------------------------------------------------------------------------------------


def _by_heads(
    p: Plan, operands: tuple[Tensor, ...], axis: int, options: dict[str, Any]
) -> ShardTensor:
    """Tokens of all ranks along the axis and heads of this one, then back."""
    given = [like(x, Spec(p.spec.mesh, w)) for x, w in zip(operands, p.wanted[:3], strict=True)]
    deals = [dealt(x._spec, axis) for x in given]
    # tokens first: what comes from the ranks is then in order
    first = [autocast(x._local).movedim(-2, 0) for x in given]
    if len({x._spec for x in given}) == 1:
        # one message instead of three
        moved = convert(_stacked(first), *deals[0].together).unbind(-3)
    else:
        moved = tuple(convert(x, *deal.alone) for x, deal in zip(first, deals, strict=True))
    shares = [wrap(x.movedim(0, -2), deal.spec) for x, deal in zip(moved, deals, strict=True)]
    # heads now have the axis; tokens may have others still
    with strategy("auto"):
        out = scaled_dot_product_attention(*shares, **options)  # type: ignore[arg-type]
    # heads beside each other in memory, as kernels give them
    old, new = heads_last(out._spec), heads_last(p.spec)
    return wrap(convert(out._local.transpose(-3, -2), old, new).transpose(-3, -2), p.spec)


def _stacked(xs: list[Tensor]) -> Tensor:
    """The tensors along a new dim before the last two: a view if they are parts of one that has it.

    So lie queries, keys and values that one linear layer gives; autograd does not follow the view.
    """
    x = xs[0]
    first, step = x.storage_offset(), xs[1].storage_offset() - x.storage_offset()
    followed = torch.is_grad_enabled() and any(y.requires_grad for y in xs)
    # what is negated as it is read may lie beside what is not
    other = any(type(y) not in probe.LIES or y.is_neg() for y in xs)
    if step < 0 or followed or other or _torch.transforming() or _torch.is_tracing():
        return torch.stack(xs, -3)
    # by name, not address: what a pager put away has none
    memory, strides = x.untyped_storage()._cdata, x.stride()
    for i, y in enumerate(xs):
        lies = y.stride(), y.storage_offset()
        if lies != (strides, first + i * step) or y.untyped_storage()._cdata != memory:
            return torch.stack(xs, -3)
    shape = (*x.shape[:-2], len(xs), *x.shape[-2:])
    return x.as_strided(shape, (*strides[:-2], step, *strides[-2:]))


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> torch.dtype:
    """The dtype to compute in; raises for dtypes that torch refuses."""
    dtype = _dtype(q)
    if not (_dtype(k) is dtype is _dtype(v) and dtype.is_floating_point):
        raise RuntimeError(f"{NAME}: query, key and value must be of one floating-point dtype")
    if mask is not None:
        if mask.dtype is not torch.bool and not mask.is_floating_point():
            raise RuntimeError(f"{NAME}: a mask of {mask.dtype}; use bool or a floating dtype")
        if mask.dtype not in (torch.bool, torch.float32) and _dtype(mask) != dtype:
            raise RuntimeError(
                f"{NAME}: a mask of {mask.dtype} for a query of {q.dtype}; use bool, float32 or "
                "the dtype of the query"
            )
    return dtype


@cache
def _refusal() -> str:
    """What this torch says to a mask with is_causal where its fused kernel takes both.

    "" up to torch 2.13, which adds them up there.
    """
    with _torch.outside_modes(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        x = torch.zeros(1, 1, 2, 8, device="cpu")
        try:
            F.scaled_dot_product_attention(x, x, x, x.new_zeros(2, 2), is_causal=True)
        except RuntimeError as e:
            return str(e)
    return ""


def _dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast would compute with x."""
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device) and dtype.is_floating_point:
        return dtype if dtype is torch.float64 else torch.get_autocast_dtype(device)
    return dtype


def autocast(x: Tensor) -> Tensor:
    """x as autocast would cast it."""
    return x.to(_dtype(x))


# heads -------------------------------------------------------------------------------------------


@cached
def heads_fit(q: Known, k: Known, v: Known) -> bool:
    """Whether every shard of the heads holds whole groups of query heads that share a key head."""
    heads = [dims_of(x)[-3] for x in (q, k, v)]
    if heads[1].size != heads[2].size or heads[0].size % max(1, heads[1].size):
        return False
    times = heads[0].size // max(1, heads[1].size)
    return heads[1].size == 1 or all(s % times == 0 for s in heads[0].sizes)


def repeated(x: Tensor, times: int) -> Tensor:
    """x with each head `times` times."""
    if times == 1:
        return x
    return x.unsqueeze(-3).expand(*x.shape[:-2], times, *x.shape[-2:]).flatten(-4, -3)


def heads_apart(q: Tensor, k: Tensor, v: Tensor, lead: torch.Size) -> list[Tensor]:
    """Local q, k, v of any leading dims as (B, H, L, E), (B, G, S, E), (B, G, S, F)."""
    outer, heads = lead[:-1], prod(lead[-1:])
    shared = {x.shape[-3] if x.ndim > 2 else 1 for x in (k, v)}
    groups = shared.pop() if len(shared) == 1 else heads
    found = []
    for x, n in ((q, heads), (k, groups), (v, groups)):
        full = [*outer, n] if lead else []
        found.append(x.expand(*full, *x.shape[-2:]).reshape(prod(outer), n, *x.shape[-2:]))
    return found


def _mask_apart(mask: Tensor, lead: torch.Size) -> Tensor:
    """A local mask as (B or 1, H or 1, L or 1, S or 1)."""
    mask = mask[(None,) * (max(2, len(lead)) + 2 - mask.ndim)]
    if mask.shape[:-3].numel() > 1:
        mask = mask.expand(*lead[:-1], *mask.shape[-3:])
    return mask.flatten(0, -4)


def _seed(p: Plan, device: torch.device) -> int:
    """A seed for this rank's scores; the same on ranks that hold the same."""
    scores = Spec(p.spec.mesh, (*p.spec.dims, Dim(p.keys.size, p.merged)))
    return generator_for(scores, device).initial_seed()
