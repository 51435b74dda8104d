"""Parts of modified scores: a few rows of a rank's queries and the keys that they see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor

from ..comm import groups
from ..comm.constants import constant
from . import blocks
from .blocks import CHUNK, Rule, wide
from .gradients import Given
from .mods import Recording
from .needs import Needs, Part, Way, way
from .schedule import Spans

Span = tuple[int, int]


@dataclass
class Job:
    """One call, alike on all ranks of the ring but for what lies where.

    batch, heads: (start, size) of this rank's. queries, keys: (start, size) at each place of the
    ring. score, mask: what modifies scores and hides them, of so many captured tensors each.
    """

    score: Recording | None
    mask: Recording | None
    needs: Needs
    scale: float
    batch: Span
    heads: Span
    queries: tuple[Span, ...]
    keys: tuple[Span, ...]
    group: str
    merged: str
    error: Exception | None = field(default=None)

    @property
    def me(self) -> int:
        return groups.rank(self.group)

    @property
    def way(self) -> Way:
        return way(self.needs, self.me, self.queries, self.keys)

    def parts(self, q: Tensor, held: Spans) -> list[Part]:
        """How this rank's queries meet keys that it holds."""
        if not q.numel():
            return []
        limit = CHUNK // (q.shape[0] * q.shape[1])
        return self.needs.parts(self.queries[self.me], held, max(1, limit))

    def split(self, captured: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The captured tensors of score and of mask."""
        n = len(self.score.captured) if self.score else 0
        return captured[:n], captured[n:]

    def indices(self, part: Part, held: Spans, device: torch.device) -> list[Tensor]:
        """The global b, h, q and k of a part's scores."""
        start, (a, b) = self.queries[self.me][0], part.rows
        ranges = [(self.batch[0], sum(self.batch)), (self.heads[0], sum(self.heads))]
        found = [torch.arange(*r, device=device) for r in (*ranges, (start + a, start + b))]
        spans = [torch.arange(s, s + n, device=device) for s, n in held]
        return [*found, taken(torch.cat(spans), part.keys, 0)]

    def tried(self, step: Callable[[], Any]) -> Any:
        """step(), unless one has failed; ranks that depend on this one go on meanwhile."""
        if self.error is None:
            try:
                return step()
            except IndexError as e:
                self.error = e
        return None


def taken(x: Tensor, spans: Spans, d: int) -> Tensor:
    """The rows of some spans [start, stop)."""
    if len(spans) == 1:
        return x.narrow(d, spans[0][0], spans[0][1] - spans[0][0])
    return torch.cat([x.narrow(d, a, b - a) for a, b in spans], d)


def added(x: Tensor, spans: Spans, part: Tensor) -> None:
    """Add to the rows of some spans [start, stop)."""
    at = 0
    for a, b in spans:
        x[:, :, a:b] += part[:, :, at : at + b - a]
        at += b - a


def among(spans: Spans, start: int) -> Spans:
    """Spans (start, size) of keys as [start, stop) among those that begin there."""
    return tuple((a - start, a + n - start) for a, n in spans)


def _hidden(job: Job, captured: Sequence[Tensor], at: list[Tensor]) -> Tensor | None:
    """Which scores of a part are seen; dims along which it is the same have size 1."""
    if job.mask is None:
        return None
    return _distinct(job.mask.run(job.split(captured)[1], *at))


def _distinct(mask: Tensor) -> Tensor:
    for d in range(mask.ndim):
        if mask.shape[d] > 1 and not mask.stride(d):
            mask = mask.narrow(d, 0, 1)
    return mask


def _modified(job: Job, captured: Sequence[Tensor], at: list[Tensor], s: Tensor) -> Tensor:
    """The scores after score_mod, -inf where they are hidden."""
    seen = _hidden(job, captured, at)
    if job.score is not None:
        s = job.score.run(job.split(captured)[0], s, *at)
    if seen is None:
        return s
    return torch.where(seen, s, constant(-inf, s.dtype, s))


def forward(
    job: Job, q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor], at: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """(out, sums) of a part."""
    if job.score is None:
        return blocks.forward(q, k, v, _hidden(job, captured, at), Rule(job.scale))
    dtype = wide(q.dtype)
    k, v = k.to(dtype), v.to(dtype)
    s = blocks.scores(q.to(dtype), k, None, Rule(job.scale), 0)
    modified = _modified(job, captured, at, s)
    if job.mask is None:
        # what the modification gives may be what it captures
        modified = modified.clone()
    return blocks.weighed(modified.to(dtype).contiguous(), v)


def backward(
    job: Job, given: Given, g_lse: Tensor | None, captured: Sequence[Tensor], at: list[Tensor]
) -> list[Tensor | None]:
    """Gradients of q, k, v and the captured tensors of a part; g_lse: that of log-sum-exps."""
    none: list[Tensor | None] = [None] * len(captured)
    if job.score is None and g_lse is None:
        seen = _hidden(job, captured, at)
        found = blocks.backward(given._replace(mask=seen), Rule(job.scale), False)
        return [*found[:3], *none]
    g, q, k, v, _, out, sums = given
    dtype, groups_ = wide(q.dtype), k.shape[1]
    q, k, v, g, out = (x.to(dtype) for x in (q, k, v, g, out))
    s = blocks.scores(q, k, None, Rule(job.scale), 0)
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in captured]
    with torch.enable_grad():
        s.requires_grad_()
        own = s.clone() if job.score is not None and job.score.writes else s
        modified = _modified(job, leaves, at, own).to(dtype)
    top, total = sums[0].unsqueeze(-1), sums[1].unsqueeze(-1)
    p = (modified.detach() - top).exp_().div_(total)
    dp = blocks.grouped(g, groups_) @ v.mT
    slope = dp.view(p.shape) - (g * out).sum(-1, keepdim=True)
    if g_lse is not None:
        slope += g_lse.unsqueeze(-1)
    dv = blocks.grouped(p, groups_).mT @ blocks.grouped(g, groups_)
    wanted = [s, *(x for x in leaves if x.requires_grad)]
    slopes: list[Tensor | None] = [None] * len(wanted)
    if modified.requires_grad:
        slopes = list(torch.autograd.grad(modified, wanted, p.mul_(slope), allow_unused=True))
    ds, rest = slopes[0], iter(slopes[1:])
    others = [next(rest) if x.requires_grad else None for x in leaves]
    if ds is None:
        empty: list[Tensor | None] = [None, None, dv]
        return [*empty, *others]
    seen = _hidden(job, captured, at)
    if seen is not None:
        # slopes of what is hidden may be infinite
        ds = ds.masked_fill(~seen, 0.0)
    ds = blocks.grouped(ds, groups_) * job.scale
    dq = (ds @ k).view(q.shape)
    return [dq, ds.mT @ blocks.grouped(q, groups_), dv, *others]


def tiles(
    mask: Recording,
    captured: Sequence[Tensor],
    shape: tuple[int, int, int, int],
    tile: tuple[int, int],
    device: torch.device,
) -> Needs:
    """What a mask lets queries see of keys, for any of the batches and heads; waits for the device.

    shape: batches, heads, queries and keys. The mask is asked for each score once.
    """
    b, h, rows, keys = shape
    rows_at, found = torch.arange(rows, device=device), list[Tensor]()
    step = tile[0] * max(1, CHUNK // max(1, b * h * keys * tile[0]))
    lead = [torch.arange(n, device=device) for n in (b, h)]
    columns = torch.arange(keys, device=device)
    for a in range(0, rows, step):
        some = _distinct(mask.run(captured, *lead, rows_at[a : a + step], columns))
        seen = some.flatten(0, 1).any(0).expand(len(rows_at[a : a + step]), keys)
        ahead = (-seen.shape[1] % tile[1], -seen.shape[0] % tile[0])
        seen = torch.nn.functional.pad(seen, (0, ahead[0], 0, ahead[1]))
        found.append(seen.unflatten(1, (-1, tile[1])).unflatten(0, (-1, tile[0])).any(3).any(1))
    whole = torch.cat(found) if found else torch.zeros(0, 0, dtype=torch.bool)
    return Needs(*tile, whole.cpu().numpy())
