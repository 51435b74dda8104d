"""Ring attention: every rank keeps its queries while keys and values travel round the ring.

Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers" (arXiv 2310.01889). Each rank
attends to one block of keys and values at a time and merges by the log-sum-exp of the scores (Dao et
al., FlashAttention, arXiv 2205.14135, section 3.1), in single precision at least. The backward sends
keys and values round again, with their gradients, and recomputes the scores from the merged
log-sum-exp: no scores are kept. Forward: n - 1 messages of the local keys and values. Backward:
n - 1 of those with their gradients, and one with the gradients alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _torch
from .comm import groups, wire
from .comm.ops import _define

Ints = Sequence[int]
# query rows whose scores exist at a time where torch has no kernel that gives the log-sum-exp
_ROWS = 1024


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _shape(x: Tensor, rows: int) -> list[int]:
    return [*x.shape[:-2], rows, x.shape[-1]]


def _pass_on(tensors: Sequence[Tensor], rows: int, group: str) -> list[Tensor]:
    """Send tensors (..., S, E) to the next rank; those of the rank before have `rows` rows."""
    n, me = groups.size(group), groups.rank(group)
    sends: list[list[Tensor]] = [[] for _ in range(n)]
    shapes: list[list[list[int]]] = [[] for _ in range(n)]
    sends[(me + 1) % n] = list(tensors)
    shapes[(me - 1) % n] = [_shape(t, rows) for t in tensors]
    return wire.exchange(sends, shapes, tensors[0], group, "ring")[(me - 1) % n]


def _mask(
    mask: Tensor | None, q: Tensor, start: int, causal: bool, first: int, rows: int
) -> tuple[Tensor | None, bool]:
    """(additive mask (..., L, rows) of queries from `start` on and keys from `first` on, if any

    score stands at all)."""
    queries = q.shape[-2]
    if causal and first > start + queries - 1:
        return None, False
    found = None
    if mask is not None:
        found = mask if mask.shape[-1] == 1 else mask.narrow(-1, first, rows)
        if found.dtype is torch.bool:
            found = torch.zeros_like(found, dtype=q.dtype).masked_fill_(~found, float("-inf"))
    if causal and first + rows - 1 > start:
        i = torch.arange(start, start + queries, device=q.device)[:, None]
        later = torch.arange(first, first + rows, device=q.device) > i
        found = q.new_zeros(queries, rows) if found is None else found
        found = found.masked_fill(later, float("-inf"))
    return found, True


def _block(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(attention of q over one block, log-sum-exp of its scores); -inf where all is masked."""
    if _torch.has_cpu_flash(q, v):
        out, lse = _torch.cpu_flash(q, k, v, mask, scale)
        if mask is not None:
            none = torch.isneginf(mask).all(-1).expand(lse.shape)
            lse = lse.masked_fill(none, float("-inf"))
        return out, lse
    outs, sums = [], []
    for rows, part in _chunks(q, mask):
        scores = _scores(rows, k, part, scale)
        lse = scores.logsumexp(-1)
        p = (scores - lse.masked_fill(torch.isneginf(lse), 0)[..., None]).exp()
        outs.append(p.to(v.dtype) @ v)
        sums.append(lse)
    return torch.cat(outs, -2), torch.cat(sums, -1)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = (q @ k.mT).to(_wide(q.dtype)) * scale
    return scores if mask is None else scores + mask


def _chunks(q: Tensor, mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    for i in range(0, q.shape[-2], _ROWS):
        part = mask
        if mask is not None and mask.ndim > 1 and mask.shape[-2] > 1:
            part = mask[..., i : i + _ROWS, :]
        yield q[..., i : i + _ROWS, :], part


def _block_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One block's share of the gradients, from the merged output and log-sum-exp."""
    if _torch.has_cpu_flash(q, v):
        return _torch.cpu_flash_backward(g, q, k, v, mask, out, lse, scale)
    delta = (g.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    dq, dk, dv, at = [], torch.zeros_like(k), torch.zeros_like(v), 0
    for rows, part in _chunks(q, mask):
        here = slice(at, at + rows.shape[-2])
        at = here.stop
        p = (_scores(rows, k, part, scale) - lse[..., here, None]).exp()
        go = g[..., here, :]
        dv += p.to(g.dtype).mT @ go
        ds = p * ((go @ v.mT).to(p.dtype) - delta[..., here, None]) * scale
        ds = ds.to(q.dtype)
        dq.append(ds @ k)
        dk += ds.mT @ rows
    return torch.cat(dq, -2), dk, dv


def _firsts(sizes: Ints) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _ring(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sizes: Ints, start: int, causal: bool,
    scale: float, group: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, me, firsts = len(sizes), groups.rank(group), _firsts(sizes)
    wide = _wide(q.dtype)
    total = q.new_zeros([*q.shape[:-1], v.shape[-1]], dtype=wide)
    lse = q.new_full(q.shape[:-1], float("-inf"), dtype=wide)
    for step in range(n):
        block = (me - step) % n
        if sizes[block] and q.numel():
            here, any_left = _mask(mask, q, start, causal, firsts[block], sizes[block])
            if any_left:
                out, more = _block(q, k, v, here, scale)
                both = torch.logaddexp(lse, more)
                safe = both.masked_fill(torch.isneginf(both), 0)
                total *= (lse - safe).exp()[..., None]
                total += out * (more - safe).exp()[..., None]
                lse = both
        if step < n - 1:
            k, v = _pass_on([k, v], sizes[(block - 1) % n], group)
    return total.to(q.dtype), lse


def _ring_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor,
    sizes: Ints, start: int, causal: bool, scale: float, group: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n, me, firsts = len(sizes), groups.rank(group), _firsts(sizes)
    wide = _wide(q.dtype)
    # a row that attends to nothing has no scores: exp(-inf - finite) is zero
    lse = lse.masked_fill(torch.isneginf(lse), 0)
    dq = torch.zeros_like(q, dtype=wide)
    dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    g = g.contiguous()
    for step in range(n):
        block = (me - step) % n
        if sizes[block] and q.numel():
            here, any_left = _mask(mask, q, start, causal, firsts[block], sizes[block])
            if any_left:
                parts = _block_backward(g, q, k, v, here, out, lse, scale)
                dq += parts[0]
                dk += parts[1]
                dv += parts[2]
        if n == 1:
            break
        rows = sizes[(block - 1) % n]
        if step < n - 1:
            k, v = _pass_on([k, v], rows, group)
        # after the last block the gradients go home
        dk, dv = _pass_on([dk, dv], rows, group)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sizes: Ints, start: int, causal: bool,
    scale: float, group: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = q.new_empty([*q.shape[:-1], v.shape[-1]])
    return out, q.new_empty(q.shape[:-1], dtype=_wide(q.dtype))


def _fake_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, mask, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, mask, *output)


def _adjoint(ctx: Any, g: Tensor, g_lse: Tensor | None) -> tuple[Any, ...]:
    grads = ring_backward_op(g, *ctx.saved_tensors, *ctx.rest)
    return *grads, *[None] * (1 + len(ctx.rest))


def _no_second(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise NotImplementedError(
        "the second derivative of ring attention, as of torch's flash attention, is not there; "
        "redistribute the keys and values to Replicate, or write softmax(q @ k.mT) @ v"
    )


_REST = "int[] sizes, int start, bool causal, float scale, str group"
ring_op: Any = _define(
    f"ring_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, {_REST}) -> (Tensor, Tensor)",
    _ring,
    _fake,
    _setup,
    _adjoint,
)
ring_backward_op: Any = _define(
    "ring_attention_backward(Tensor g, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, "
    f"Tensor lse, {_REST}) -> (Tensor, Tensor, Tensor)",
    _ring_backward,
    _fake_backward,
    lambda ctx, inputs, output: None,
    _no_second,
)


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sizes: Ints, start: int, causal: bool,
    scale: float, group: str,
) -> Tensor:  # fmt: skip
    """softmax(scale q k^T + mask) v for local q (B, H, L, E) and all ranks' k (B, H, S, E), v.

    sizes: of the shards of S. start: the global number of the first local query. mask: boolean or
    additive, broadcastable to (B, H, L, all of S); no gradient. causal: query i sees keys 0..i.
    """
    found: Tensor = ring_op(q, k, v, mask, sizes, start, causal, scale, group)[0]
    return found
