"""Attention of one block of queries to one block of keys, and merging such blocks.

Shapes: q (B, H, L, E), k (B, G, S, E), v (B, G, S, F), where H is a multiple of G; mask
broadcasts to (B, H, L, S); out (B, H, L, F); sums (2, B, H, L): for each row m and t such that its
sum of exp(scores) is t exp(m); m is -inf where the row sees no key. Two numbers, since their
log-sum-exp m + log t rounds t away where m is about the most negative number: in a row that a mask
of such numbers fills. Where no mask can, and nobody looks (`_looked_at`), sums are their
log-sum-exp alone, (B, H, L).

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

# scores that plain matrix products hold at a time, in elements
CHUNK = 1 << 22
# log-sum-exps beyond this have lost digits of the sums that they stand for
COARSE = {torch.float32: 1 << 8, torch.float64: 1 << 20}


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
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule, dead: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, sums) of a block, by a fused kernel where one takes it.

    dead: the rows (B or 1, H or 1, L or 1) that an additive mask hides from the keys of all blocks.
    """
    kernel = _fused(q, k, v, mask, rule)
    if kernel is None:
        return _plain_forward(q, k, v, mask, rule)
    bias = _bias(mask, q.dtype)
    out, lse = kernel.forward(q, k, v, bias, rule.triangle, rule.scale)
    if bias is None and not _looked_at(lse):
        return out, lse
    hidden = None
    if bias is not None:
        most = bias.amax(-1)
        most = most.view(*[1] * (3 - most.ndim), *most.shape)
        # torch 2.13's CPU kernel gives 0 as the log-sum-exp of a row that sees no key
        lse = torch.where(most == -inf, -inf, lse)
        if not _looked_at(lse):
            # whatever a kernel gives there, it counts nothing
            out = out.masked_fill((most == -inf).unsqueeze(-1), 0.0)
        # what another block outweighs by far needs no digits
        hidden = (most < -COARSE[lse.dtype]) & ~dead if dead is not None else None
    sums = torch.stack((lse, torch.ones_like(lse)))
    rows = coarse_rows(lse, hidden)
    if rows is not None:
        again = _plain_forward(*_part(rows, q, k, v, mask, rule))
        out = out.index_copy(2, rows, again[0].to(out.dtype))
        sums = sums.index_copy(3, rows, again[1])
    return out, sums


def backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    sums: Tensor,
    rule: Rule,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dmask) of a block, given out and `settled` sums over all keys."""
    kernel = None if mask_grad else _fused(q, k, v, mask, rule)
    lse = sums[2]
    if kernel is None:
        if not rule.exact:
            sums = torch.stack((lse, torch.ones_like(lse), lse))
        return _plain_backward(g, q, k, v, mask, out, sums, rule, mask_grad)
    rows = coarse_rows(sums[0]) if rule.exact else None
    if rows is not None:
        lse = lse.index_fill(2, rows, inf)
    bias = _bias(mask, q.dtype)
    dq, dk, dv = kernel.backward(g, q, k, v, bias, out, lse, rule.triangle, rule.scale)
    if rows is not None:
        part, *kv, seen, alone = _part(rows, q, k, v, mask, rule)
        more = _plain_backward(
            g[:, :, rows], part, kv[0], kv[1], seen, out[:, :, rows], sums[..., rows], alone, False
        )
        dq = dq.to(more[0].dtype).index_copy(2, rows, more[0])
        dk, dv = dk + more[1], dv + more[2]
    return dq, dk, dv, None


def settled(sums: Tensor) -> Tensor:
    """sums for `backward`, with their log (3, B, H, L): a row without keys has weights of zero."""
    top = torch.nan_to_num(sums[0], nan=nan, posinf=inf, neginf=inf)
    # of what was seen it is 1 at least
    total = sums[1].clamp_min(1.0)
    return torch.stack((top, total, top + total.log()))


def dead_rows(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The rows of queries in `dtype` that an additive mask hides from all keys."""
    if mask is None or mask.dtype is torch.bool or not mask.shape[-1]:
        return None
    dead = mask.detach().amax(-1) < -COARSE[wide(dtype)]
    return dead.view(*[1] * (3 - dead.ndim), *dead.shape)


def _looked_at(lse: Tensor) -> bool:
    """Whether the digits of log-sum-exps are asked for."""
    return lse.device.type == "cpu" and not probe.is_fake(lse)


def coarse_rows(lse: Tensor, hidden: Tensor | None = None) -> Tensor | None:
    """Rows with a log-sum-exp that has lost digits, None without any.

    Not on CUDA, where the question would wait for the device: kernels there take no mask, and
    scores of such size have lost as many digits already. Nor of a plan's tensors: they have no
    values.
    """
    if not _looked_at(lse):
        return None
    size = lse.abs()
    found = (size > COARSE[lse.dtype]) & (size < inf)
    if not found.any():
        return None
    if hidden is not None:
        found &= ~hidden
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


class Merge:
    """Out and sums over the keys of all blocks added so far; NaN-safe, in fp32 or fp64."""

    def __init__(self, q: Tensor, v: Tensor) -> None:
        self.like, self.shape = q, [*q.shape[:-1], v.shape[-1]]
        self.dtype = wide(q.dtype)
        self.found: tuple[Tensor, Tensor] | None = None

    def add(self, rows: tuple[int, int], out: Tensor, sums: Tensor, *, last: bool = False) -> None:
        """Take in what the queries `rows` see in one more block; last: no other is to come."""
        if self.found is None and rows == (0, self.shape[2]) and _heads_beside(out):
            self.found = out.to(self.dtype), sums.to(self.dtype)
            return
        if self.found is None:
            self.found = self._nothing(lone=sums.ndim == 3)
        all_out, every = self.found
        have_out, have = all_out[:, :, rows[0] : rows[1]], every[..., rows[0] : rows[1]]
        if have.ndim == sums.ndim == 3:
            # few kernels that each read what they get in its own dtype
            weight = torch.sub(sums, have).sigmoid_().unsqueeze(-1)
            if last and have.shape == every.shape:
                self.found = self._ended(all_out, every, out, sums, weight)
                return
            torch.logaddexp(have, sums, out=have)
            if out.dtype == self.dtype:
                have_out.lerp_(out, weight)
            else:
                have_out.addcmul_(weight, out - have_out)
            return
        if every.ndim == 3:
            self.found = all_out, _paired(every)
            have = self.found[1][..., rows[0] : rows[1]]
        sums = _paired(sums).to(self.dtype)
        top = torch.maximum(have[0], sums[0])
        parts = [relative(s, top) for s in (have, sums)]
        total = parts[0] + parts[1]
        safe = total.masked_fill(total == 0, 1.0)
        a, b = ((part / safe).unsqueeze(-1) for part in parts)
        have_out.mul_(a).add_(out * b)
        have[0].copy_(top)
        have[1].copy_(total)

    def _ended(
        self, have_out: Tensor, have: Tensor, out: Tensor, sums: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The last merge: out in the dtype of the queries, sums as two numbers."""
        both = have.new_ones((2, *have.shape))
        torch.logaddexp(have, sums, out=both[0])
        if out.dtype == self.dtype:
            return have_out.lerp_(out, weight), both
        return torch.addcmul(have_out, weight, out - have_out, out=torch.empty_like(out)), both

    def result(self) -> tuple[Tensor, Tensor]:
        """(out, sums); zeros and -inf where no key was seen. In fp32 or fp64 but after a last."""
        out, sums = self._nothing(lone=False) if self.found is None else self.found
        return out, _paired(sums)

    def _nothing(self, *, lone: bool) -> tuple[Tensor, Tensor]:
        b, h, rows, width = self.shape
        # the layout that fused kernels give: heads beside each other in memory
        out = self.like.new_zeros([b, rows, h, width], dtype=self.dtype).transpose(1, 2)
        if lone:
            return out, self.like.new_full([b, h, rows], -inf, dtype=self.dtype)
        sums = self.like.new_zeros([2, b, h, rows], dtype=self.dtype)
        sums[0].fill_(-inf)
        return out, sums


def log_of(sums: Tensor) -> Tensor:
    """The log-sum-exps (B, H, L)."""
    return sums if sums.ndim == 3 else sums[0] + sums[1].log()


def _paired(sums: Tensor) -> Tensor:
    """sums as two numbers."""
    if sums.ndim == 4:
        return sums
    both = sums.new_ones((2, *sums.shape))
    both[0].copy_(sums)
    return both


def relative(sums: Tensor, top: Tensor) -> Tensor:
    """The sums of exp(scores - top), 0 where nothing was seen."""
    return torch.where(sums[0] == -inf, 0.0, sums[1] * (sums[0] - top).exp())


def _heads_beside(out: Tensor) -> bool:
    return out.transpose(1, 2).is_contiguous()


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as numbers to add to the scores."""
    if mask is None:
        return None
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -inf)
    return mask if mask.dtype is torch.float32 else mask.to(dtype)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule
) -> _torch.AttentionKernel | None:
    if rule.drop or (mask is not None and rule.triangle):
        return None
    return _torch.attention_kernel(q, k, v, mask, rule.triangle)


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
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    sums: Tensor,
    rule: Rule,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dmask) of a block by products, in chunks of queries."""
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
