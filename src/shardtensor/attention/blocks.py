"""Attention of one block of queries to one block of keys, and merging such blocks.

Shapes: q (B, H, L, E), k (B, G, S, E), v (B, G, S, F), where H is a multiple of G; mask
broadcasts to (B, H, L, S); out (B, H, L, F); lse (B, H, L), the log-sum-exp of each row's scores,
-inf where the row sees no key. Gradients of a block need only the merged out and lse of all blocks:
P = exp(scores - lse), dP = g v^T, dS = P (dP - rowsum(g out)) (Dao 2022, arXiv 2205.14135, B.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from .. import _torch

# scores that plain matrix products hold at a time, in elements
CHUNK = 1 << 22


@dataclass(frozen=True)
class Rule:
    """What turns scores into weights. seed: of the dropout of one block, with probability drop."""

    scale: float
    triangle: bool = False
    drop: float = 0.0
    seed: int = 0


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over keys are kept."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a block, by a fused kernel where one takes it."""
    kernel = _fused(q, k, v, mask, rule)
    if kernel is None:
        return _plain_forward(q, k, v, mask, rule)
    bias = _bias(mask, q.dtype)
    out, lse = kernel.forward(q, k, v, bias, rule.triangle, rule.scale)
    if bias is not None:
        # torch 2.13's CPU kernel gives 0 as the log-sum-exp of a row that sees no key
        blind = bias.isneginf().all(-1)
        lse = torch.where(blind.view(*[1] * (3 - blind.ndim), *blind.shape), -inf, lse)
    return out, lse


def backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rule: Rule,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dmask) of a block, given out and lse over all keys, +inf for a blind row."""
    kernel = None if mask_grad else _fused(q, k, v, mask, rule)
    if kernel is None:
        return _plain_backward(g, q, k, v, mask, out, lse, rule, mask_grad)
    bias = _bias(mask, q.dtype)
    return *kernel.backward(g, q, k, v, bias, out, lse, rule.triangle, rule.scale), None


class Merge:
    """Out and lse over the keys of all blocks added so far; NaN-safe, in fp32 or fp64."""

    def __init__(self, q: Tensor, v: Tensor) -> None:
        self.like, self.shape = q, [*q.shape[:-1], v.shape[-1]]
        self.dtype = wide(q.dtype)
        self.found: tuple[Tensor, Tensor] | None = None

    def add(self, rows: tuple[int, int], out: Tensor, lse: Tensor) -> None:
        """Take in what the queries `rows` see in one more block."""
        if self.found is None and rows == (0, self.shape[2]) and _heads_beside(out):
            self.found = out.to(self.dtype), lse.to(self.dtype)
            return
        have_out, have_lse = (x[:, :, rows[0] : rows[1]] for x in self.result())
        both = torch.logaddexp(have_lse, lse.to(self.dtype))
        have_out.mul_(_weight(have_lse, both)).add_(out * _weight(lse, both))
        have_lse.copy_(both)

    def result(self) -> tuple[Tensor, Tensor]:
        """(out, lse); zeros and -inf where no key was seen."""
        if self.found is None:
            b, h, rows, width = self.shape
            # the layout that fused kernels give: heads beside each other in memory
            out = self.like.new_zeros([b, rows, h, width], dtype=self.dtype).transpose(1, 2)
            self.found = out, self.like.new_full([b, h, rows], -inf, dtype=self.dtype)
        return self.found


def _heads_beside(out: Tensor) -> bool:
    return out.transpose(1, 2).is_contiguous()


def _weight(lse: Tensor, total: Tensor) -> Tensor:
    """exp(lse - total), 0 where nothing was seen."""
    return torch.where(lse == -inf, 0.0, (lse - total).exp()).unsqueeze(-1)


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as numbers to add to the scores."""
    if mask is None:
        return None
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -inf)
    return mask.to(dtype)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule
) -> _torch.AttentionKernel | None:
    if rule.drop or q.shape[-1] != v.shape[-1] or (mask is not None and rule.triangle):
        return None
    return _torch.attention_kernel(q, k, v, mask, rule.triangle)


# plain products ----------------------------------------------------------------------------------


def _chunks(q: Tensor, k: Tensor) -> list[tuple[int, int]]:
    rows = max(1, CHUNK // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    return [(a, min(a + rows, q.shape[2])) for a in range(0, q.shape[2], rows)]


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(B, H, L, E) as (B, G, H/G * L, E): query heads that share a key head in one product."""
    return x.reshape(x.shape[0], groups, -1, x.shape[-1])


def _cut(mask: Tensor | None, a: int, b: int) -> Tensor | None:
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., a:b, :]


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, rule: Rule, first: int) -> Tensor:
    """The scores (B, H, L, S) of a chunk of queries that starts at row `first` of its block."""
    groups, keys = k.shape[1:3]
    s = (_grouped(q * rule.scale, groups) @ k.mT).view(*q.shape[:3], keys)
    if mask is not None:
        s = s.masked_fill_(~mask, -inf) if mask.dtype is torch.bool else s.add_(mask)
    if rule.triangle:
        row = torch.arange(first, first + q.shape[2], device=q.device)
        s = s.masked_fill_(torch.arange(keys, device=q.device) > row[:, None], -inf)
    return s


def _weights(s: Tensor, lse: Tensor) -> Tensor:
    """exp(s - lse), in place; lse is +inf for a blind row."""
    return s.sub_(lse.unsqueeze(-1)).exp_()


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
    outs, lses = [], []
    with torch.autocast(q.device.type, enabled=False):
        k, v = k.to(dtype), v.to(dtype)
        for a, b in _chunks(q, k):
            s = _scores(q[:, :, a:b].to(dtype), k, _cut(mask, a, b), rule, a)
            lse = s.logsumexp(-1)
            p = _weights(s, lse.masked_fill(lse == -inf, inf))
            keep = _kept(p, rule, generator)
            p = p if keep is None else p.mul_(keep)
            outs.append((_grouped(p, k.shape[1]) @ v).view(*p.shape[:3], v.shape[-1]))
            lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _plain_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rule: Rule,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
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
            p = _weights(_scores(rows, k, _cut(mask, a, b), rule, a), lse[:, :, a:b])
            keep = _kept(p, rule, generator)
            dp = (_grouped(gr, groups) @ v.mT).view(p.shape)
            dp = dp if keep is None else dp.mul_(keep)
            dp.sub_((gr * out[:, :, a:b].to(dtype)).sum(-1, keepdim=True))
            used = p if keep is None else p * keep
            dv += _grouped(used, groups).mT @ _grouped(gr, groups)
            ds = p.mul_(dp)
            if dmask is not None:
                part = _cut(dmask, a, b)
                assert part is not None
                part += ds.sum_to_size(part.shape)
            ds = _grouped(ds, groups)
            dq[:, :, a:b] = (ds @ k).view(rows.shape) * rule.scale
            dk += (ds.mT @ _grouped(rows, groups)) * rule.scale
    return dq, dk, dv, dmask
