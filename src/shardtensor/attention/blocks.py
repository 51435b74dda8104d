"""Attention of one block of queries to one block of keys, and merging such blocks.

Shapes: q (B, H, L, E), k (B, G, S, E), v (B, G, S, F), where H is a multiple of G; mask
broadcasts to (B, H, L, S); out (B, H, L, F); sums (2, B, H, L): for each row m and t such that its
sum of exp(scores) is t exp(m); m is -inf where the row sees no key. Two numbers, since their
log-sum-exp m + log t rounds t away where m is about the most negative number: in a row that a mask
of such numbers fills. Where no mask of numbers can, and no digits are lost (`coarse_rows`), or
where they are taken from a base (`counted`), sums are their log-sum-exp alone, (B, H, L);
`NOTHING` where the row sees no key.

Gradients of a block need only the merged out and sums of all blocks: P = exp(scores - m) / t,
dP = g v^T, dS = P (dP - rowsum(g out)) (Dao 2022, arXiv 2205.14135, B.4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, nan

import torch
from torch import Tensor

from .. import _torch
from .._torch import probe
from ..comm.constants import constant
from .counted import COARSE, HUGE, NOTHING, Top, counted, from_base
from .gradients import Given

# scores that plain matrix products hold at a time, in elements
CHUNK = 1 << 22


@dataclass(frozen=True)
class Rule:
    """What turns scores into weights. seed: of the dropout of one block, with probability drop.

    exact: backward is exact where the fused kernels' own, torch's on one device, is not: those of
    torch 2.13 take P from a log-sum-exp.
    """

    scale: float
    triangle: bool = False
    drop: float = 0.0
    seed: int = 0
    exact: bool = True


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over keys are kept."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    rule: Rule,
    top: Top | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, sums) of a block, by a fused kernel where one takes it.

    top: what an additive mask is for the keys of all blocks; None where this is the only one. Sums
    are then log-sum-exps from its base on where no digits are looked at (`is_based`).
    """
    kernel = _fused(q, k, v, mask, rule)
    if kernel is None:
        out, sums = _plain_forward(q, k, v, mask, rule)
        return out, from_base(top, sums) if top is not None and is_based(top, q) else sums
    block = _block(mask, q.dtype, rule)
    out, lse = kernel.forward(q, k, v, block)
    if not _looked_at(lse):
        if mask is None:
            return out, lse
        if mask.dtype is torch.bool:
            return _where_seen(mask, out, lse)
        return _of_numbers(q, k, block, out, lse, top)
    if mask is None and _usual(lse):
        return out, lse
    blind, hidden = _blind(q, lse, rule), None
    sums = torch.stack((lse, torch.ones_like(lse)))
    if block.bias is not None:
        most = _most(block.bias)
        # some kernels, torch 2.13's for CPUs, give 0 as the log-sum-exp of a row that sees no key
        sums[0].masked_fill_(most == -inf, -inf)
        blind = None if blind is None else blind & (most != -inf)
        # what another block outweighs by far needs no digits
        coarse = COARSE[lse.dtype]
        hidden = (most < -coarse) & (top.numbers >= -coarse) if top is not None else None
    rows = coarse_rows(sums[0], hidden, blind)
    if rows is not None:
        again = _plain_forward(*_part(rows, q, k, v, mask, rule))
        out = out.index_copy(2, rows, again[0].to(out.dtype))
        sums = sums.index_copy(3, rows, again[1])
    return out, sums


def _where_seen(mask: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse where a row sees a key; elsewhere, whatever a kernel gives there, nothing."""
    sees = mask.any(-1)
    sees = sees.view(*[1] * (3 - sees.ndim), *sees.shape)
    nothing, zero = constant(NOTHING, lse.dtype, lse), constant(0.0, out.dtype, out)
    torch.where(sees, lse, nothing, out=lse)
    torch.where(sees.unsqueeze(-1), out, zero, out=out)
    return out, lse


def _of_numbers(
    q: Tensor, k: Tensor, block: _torch.Block, out: Tensor, lse: Tensor, top: Top | None
) -> tuple[Tensor, Tensor]:
    """out and sums of a block with a mask of numbers; top: None where it is the only block."""
    assert block.bias is not None
    most = _most(block.bias)
    # a row with a NaN sees it
    unseen = most == -inf
    out.masked_fill_(unseen.unsqueeze(-1), 0.0)
    if top is None:
        lse.masked_fill_(unseen, -inf)
        return out, torch.stack((lse, torch.ones_like(lse)))
    # a kernel may take numbers of such size for -inf, and gives 0 then
    return out, counted(q, k, block, top, lse, most < HUGE)


def _most(bias: Tensor) -> Tensor:
    """The largest number of each row (B or 1, H or 1, L or 1)."""
    most = bias.amax(-1)
    return most.view(*[1] * (3 - most.ndim), *most.shape)


def backward(
    given: Given, rule: Rule, mask_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dmask) of a block."""
    g, q, k, v, mask, out, sums = given
    kernel = _fused(q, k, v, mask, rule, mask_grad)
    lse = sums[2]
    if kernel is None:
        if not rule.exact:
            given = given._replace(sums=torch.stack((lse, torch.ones_like(lse), lse)))
        return _plain_backward(given, rule, mask_grad)
    rows = coarse_rows(sums[0]) if rule.exact else None
    if rows is not None:
        lse = lse.index_fill(2, rows, inf)
    block = _block(mask, q.dtype, rule)
    dq, dk, dv, dbias = kernel.backward(g, q, k, v, out, lse, block, mask_grad)
    if dbias is not None and mask is not None:
        dbias = dbias.to(wide(q.dtype)).sum_to_size(mask.shape)
    if rows is not None:
        some, k, v, mask, one = _part(rows, q, k, v, mask, rule)
        part = Given(g[:, :, rows], some, k, v, mask, out[:, :, rows], sums[..., rows])
        more = _plain_backward(part, one, False)
        dq = dq.to(more[0].dtype).index_copy(2, rows, more[0])
        dk, dv = dk + more[1], dv + more[2]
    return dq, dk, dv, dbias


def settled(sums: Tensor) -> Tensor:
    """sums for `backward`, with their log (3, B, H, L): a row without keys has weights of zero."""
    top = torch.nan_to_num(sums[0], nan=nan, posinf=inf, neginf=inf)
    total = sums[1].clamp_min(torch.finfo(sums.dtype).tiny)
    return torch.stack((top, total, top + total.log()))


def is_based(top: Top | None, q: Tensor) -> bool:
    """Whether sums of blocks are log-sum-exps from the base of their mask's rows on."""
    return top is not None and not _looked_at(q)


def is_counted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether several blocks with such a mask have log-sum-exps of a kernel, which are counted."""
    if mask is None or mask.dtype is torch.bool or _looked_at(q):
        return False
    # a rank without keys of its own computes with those of others
    k, v = (x if x.shape[2] else x.new_empty((*x.shape[:2], 1, x.shape[3])) for x in (k, v))
    return _torch.attention_kernel(q, k, v, mask, False) is not None


def _looked_at(lse: Tensor) -> bool:
    """Whether the digits of log-sum-exps are asked for."""
    return lse.device.type == "cpu" and not probe.is_fake(lse)


def _usual(lse: Tensor) -> bool:
    """Whether no log-sum-exp has lost digits or is 0: one kernel where all are on one side of 0."""
    if not lse.numel():
        return True
    least, most = lse.aminmax()
    low, high, coarse = least.item(), most.item(), COARSE[lse.dtype]
    return -coarse <= low and high <= coarse and (low > 0 or high < 0 or bool(lse.all()))


def _blind(q: Tensor, lse: Tensor, rule: Rule) -> Tensor | None:
    """Where a kernel for CPUs saw no score but NaN and -inf: its out and log-sum-exp are 0 there.

    None without any. Rows of NaN themselves stay zeros, where one device's kernel is this one.
    """
    if lse.all():
        return None
    return lse == 0 if rule.exact else (lse == 0) & q.isfinite().all(-1)


def coarse_rows(
    lse: Tensor, hidden: Tensor | None = None, blind: Tensor | None = None
) -> Tensor | None:
    """Rows with a log-sum-exp that has lost digits, or that are `blind`; None without any.

    Not on CUDA, where the question would wait for the device: scores of such size have lost as many
    digits already, and rows of a mask of such numbers are `counted`. Nor of a plan's tensors: they
    have no values.
    """
    if not _looked_at(lse) or not lse.numel():
        return None
    low, high = lse.aminmax()
    coarse = COARSE[lse.dtype]
    # one kernel where all are fine, as they are almost always
    if blind is None and -coarse <= low.item() and high.item() <= coarse:
        return None
    size = lse.abs()
    found = (size > coarse) & (size < inf)
    if hidden is not None:
        found &= ~hidden
    if blind is not None:
        found |= blind
    if not found.any():
        return None
    rows = found.flatten(0, 1).any(0).nonzero().squeeze(1)
    return rows if rows.numel() else None


def _part(
    rows: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Rule]:
    """Operands and rule for some of the rows of q."""
    if rule.triangle:
        mask = torch.arange(k.shape[2], device=q.device) <= rows[:, None]
    elif mask is not None and mask.shape[-2] > 1:
        mask = mask[..., rows, :]
    return q[:, :, rows], k, v, mask, replace(rule, triangle=False)


def _block(mask: Tensor | None, dtype: torch.dtype, rule: Rule) -> _torch.Block:
    """What a kernel gets: the mask as numbers to add to the scores."""
    if mask is not None and mask.dtype is torch.bool:
        mask = _added(mask, dtype)
    elif mask is not None and mask.dtype is not torch.float32:
        mask = mask.to(dtype)
    return _torch.Block(rule.scale, mask, rule.triangle, rule.drop, rule.seed)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers to add for a mask that says which keys are seen."""
    more = -mask.shape[-1] % 16 if mask.is_cuda else 0
    make = mask.new_zeros if more else mask.new_empty
    # rows that begin where kernels ask for it
    made = make((*mask.shape[:-1], mask.shape[-1] + more), dtype=dtype)[..., : mask.shape[-1]]
    zero, hidden = (constant(n, dtype, made) for n in (0.0, -inf))
    return torch.where(mask, zero, hidden, out=made)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule, mask_grad: bool = False
) -> _torch.AttentionKernel | None:
    if mask is not None and rule.triangle:
        return None
    found = _torch.attention_kernel(q, k, v, mask, rule.triangle, rule.drop, mask_grad)
    if not rule.drop or mask is None or mask.dtype is torch.bool:
        return found
    # backward must drop what forward has dropped, which does not know who wants a mask's gradient
    other = _torch.attention_kernel(q, k, v, mask, rule.triangle, rule.drop, not mask_grad)
    return found if found is other else None


# plain products ----------------------------------------------------------------------------------


def _chunks(q: Tensor, k: Tensor) -> list[tuple[int, int]]:
    rows = max(1, CHUNK // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    return [(a, min(a + rows, q.shape[2])) for a in range(0, q.shape[2], rows)]


def grouped(x: Tensor, groups: int) -> Tensor:
    """(B, H, L, E) as (B, G, H/G * L, E): query heads that share a key head in one product."""
    return x.reshape(x.shape[0], groups, -1, x.shape[-1])


def _cut(mask: Tensor | None, a: int, b: int) -> Tensor | None:
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., a:b, :]


def scores(q: Tensor, k: Tensor, mask: Tensor | None, rule: Rule, first: int) -> Tensor:
    """The scores (B, H, L, S) of a chunk of queries that starts at row `first` of its block."""
    groups, keys = k.shape[1:3]
    s = (grouped(q * rule.scale, groups) @ k.mT).view(*q.shape[:3], keys)
    if mask is not None:
        s = s.masked_fill_(~mask, -inf) if mask.dtype is torch.bool else s.add_(mask)
    if rule.triangle:
        row = torch.arange(first, first + q.shape[2], device=q.device)
        s = s.masked_fill_(torch.arange(keys, device=q.device) > row[:, None], -inf)
    return s


def _powers(s: Tensor, top: Tensor) -> Tensor:
    """exp(s - top), in place."""
    return s.sub_(top.unsqueeze(-1)).exp_()


def _kept(p: Tensor, rule: Rule, generator: torch.Generator | None) -> Tensor | None:
    """Dropout's factors for the weights p: 0 or 1 / (1 - drop)."""
    if generator is None:
        return None
    drawn = torch.rand(p.shape, generator=generator, device=p.device, dtype=torch.float32)
    return (drawn >= rule.drop).to(p.dtype) * (1 / (1 - rule.drop) if rule.drop < 1 else 0.0)


def _generator(q: Tensor, rule: Rule) -> torch.Generator | None:
    return torch.Generator(q.device).manual_seed(rule.seed) if rule.drop else None


def _plain_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor]:
    dtype = wide(q.dtype)
    generator = _generator(q, rule)
    outs, sums = [], []
    with torch.autocast(q.device.type, enabled=False):
        k, v = k.to(dtype), v.to(dtype)
        for a, b in _chunks(q, k):
            s = scores(q[:, :, a:b].to(dtype), k, _cut(mask, a, b), rule, a)
            found = weighed(s, v, lambda p: _kept(p, rule, generator))
            outs.append(found[0])
            sums.append(found[1])
    return torch.cat(outs, 2), torch.cat(sums, 3)


def weighed(
    s: Tensor, v: Tensor, factors: Callable[[Tensor], Tensor | None] = lambda p: None
) -> tuple[Tensor, Tensor]:
    """(out, sums) of scores, which are written over; factors: of the weights, as of dropout."""
    top = s.amax(-1) if s.shape[-1] else s.new_full(s.shape[:-1], -inf)
    p = _powers(s, top.masked_fill(top == -inf, inf))
    total = p.sum(-1)
    keep = factors(p)
    p = p if keep is None else p.mul_(keep)
    found = (grouped(p, v.shape[1]) @ v).view(*p.shape[:3], v.shape[-1])
    return found.div_(total.masked_fill(total == 0, 1.0).unsqueeze(-1)), torch.stack((top, total))


def _plain_backward(
    given: Given, rule: Rule, mask_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dmask) of a block by products, in chunks of queries."""
    g, q, k, v, mask, out, sums = given
    dtype = wide(q.dtype)
    generator = _generator(q, rule)
    groups = k.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        k, v = k.to(dtype), v.to(dtype)
        dq, dk, dv = torch.empty_like(q, dtype=dtype), torch.zeros_like(k), torch.zeros_like(v)
        dmask = torch.zeros_like(mask, dtype=dtype) if mask_grad and mask is not None else None
        for a, b in _chunks(q, k):
            rows = q[:, :, a:b].to(dtype)
            gr = g[:, :, a:b].to(dtype)
            top, total = sums[:2, ..., a:b]
            p = _powers(scores(rows, k, _cut(mask, a, b), rule, a), top).div_(total.unsqueeze(-1))
            keep = _kept(p, rule, generator)
            dp = (grouped(gr, groups) @ v.mT).view(p.shape)
            dp = dp if keep is None else dp.mul_(keep)
            dp.sub_((gr * out[:, :, a:b].to(dtype)).sum(-1, keepdim=True))
            used = p if keep is None else p * keep
            dv += grouped(used, groups).mT @ grouped(gr, groups)
            ds = p.mul_(dp)
            if dmask is not None:
                part = _cut(dmask, a, b)
                assert part is not None
                part += ds.sum_to_size(part.shape)
            ds = grouped(ds, groups)
            dq[:, :, a:b] = (ds @ k).view(rows.shape) * rule.scale
            dk += (ds.mT @ grouped(rows, groups)) * rule.scale
    return dq, dk, dv, dmask
