"""flex_attention over keys that lie on several ranks: scores are modified where they are computed.

The ranks of a ring each have a span of queries and one of keys. At step t a rank attends to what it
needs of the keys of the rank t places before, while those of the next step arrive; results are
merged by their log-sum-exps as in `ring`. Only tiles that the mask lets a rank's queries see travel
or are computed (`needs`), straight from the rank that has them.

Backward recomputes the scores of a part, modifies them again under autograd, and leads
dS = P (dP - rowsum(g out) + dlse) back through the modification to scores and captured tensors.
Keys travel once more, and what is found for them goes straight home beside those of the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..comm import wire
from ..errors import UnsupportedOpError
from .blocks import settled, wide
from .gradients import Given
from .merge import Merge
from .modified import Job, added, among, backward, forward, taken
from .needs import Part
from .ring import over_ranks
from .schedule import Spans

# travel ------------------------------------------------------------------------------------------


def _send(
    job: Job, t: int, k: Tensor, v: Tensor, home: int = 0, found: Sequence[Tensor] = ()
) -> Callable[[], tuple[list[Tensor], list[Tensor]]]:
    """Start what travels for step t, and what was found in step `home` for another's keys.

    What it returns gives (the keys of step t, what another found for this rank's).
    """
    n, me, go = len(job.queries), job.me, job.way
    sends, arrivals = dict[int, list[Tensor]](), dict[int, list[list[int]]]()
    if t and go.sent[t]:
        sends[(me + t) % n] = _picked(job, t, k, v)
    before = (me - t) % n
    if t and go.got[t]:
        arrivals[before] = [_like(x, go.got[t]) for x in (k, v)]
    if home and go.got[home]:
        owner = (me - home) % n
        sends[owner] = [*sends.get(owner, ()), *found]
    finder = (me + home) % n
    if home and go.sent[home]:
        own = [_like(x, go.sent[home]) for x in (k, v)]
        arrivals[finder] = [*arrivals.get(finder, ()), *own]
    wait = wire.start_exchange(sends, arrivals, k, job.group, "ring")

    def arrived() -> tuple[list[Tensor], list[Tensor]]:
        came = wait()
        keys = came[before][:2] if t and go.got[t] else [x[:, :, :0] for x in (k, v)]
        return keys, came[finder][-2:] if home and go.sent[home] else []

    return arrived


def _picked(job: Job, t: int, k: Tensor, v: Tensor) -> list[Tensor]:
    """What step t takes of this rank's keys and values."""
    spans = among(job.way.sent[t], job.keys[job.me][0])
    return [taken(x, spans, 2) if spans else x[:, :, :0] for x in (k, v)]


def _like(x: Tensor, spans: Spans) -> list[int]:
    return [*x.shape[:2], sum(n for _, n in spans), x.shape[3]]


# all parts ---------------------------------------------------------------------------------------


def _rows(x: Tensor, part: Part) -> Tensor:
    return x[:, :, part.rows[0] : part.rows[1]]


def _forward(
    job: Job, q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """(out, sums) of this rank's queries over all keys."""
    go, total = job.way, Merge(q, v)
    held, spans = _picked(job, 0, k, v), go.sent[0]
    for i in range(len(go.steps) + 1):
        after = go.steps[i] if i < len(go.steps) else 0
        arriving = _send(job, after, k, v) if after else None
        for part in job.parts(q, spans):
            at = job.indices(part, spans, q.device)
            keys, values = (taken(x, part.keys, 2) for x in held)
            rows = _rows(q, part)
            found = job.tried(lambda r=rows, x=keys, y=values, at=at: forward(  # type: ignore[misc]
                job, r, x, y, captured, at
            ))  # fmt: skip
            if found is not None:
                total.add(part.rows, *found)
        if arriving:
            held, spans = arriving()[0], go.got[after]
    return over_ranks(*total.result(), job.merged)


def _backward(
    job: Job, given: Given, g_lse: Tensor | None, captured: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of q, k, v and of captured tensors, of this rank's queries for all keys."""
    g, q, k, v, _, out, sums = given
    go, dtype = job.way, wide(q.dtype)
    dq = torch.zeros_like(q, dtype=dtype)
    home = [torch.zeros_like(x, dtype=dtype) for x in (k, v)]
    others = [torch.zeros_like(x) if x.requires_grad else None for x in captured]
    held, spans = _picked(job, 0, k, v), go.sent[0]
    before, grads = 0, list[Tensor]()
    for i, t in enumerate((0, *go.steps)):
        after = go.steps[i] if i < len(go.steps) else 0
        # what the step before has found goes home while this one computes
        arriving = _send(job, after, k, v, before, grads) if after or before else None
        own = [torch.zeros_like(x, dtype=dtype) for x in held]
        for part in job.parts(q, spans):
            at = job.indices(part, spans, q.device)
            keys, values = (taken(x, part.keys, 2) for x in held)
            r = slice(*part.rows)
            rows = Given(
                _rows(g, part), _rows(q, part), keys, values, None, _rows(out, part), sums[..., r]
            )
            found = backward(job, rows, None if g_lse is None else g_lse[:, :, r], captured, at)
            if found[0] is not None:
                _rows(dq, part).add_(found[0])
            for into, x in zip(own, found[1:3], strict=True):
                if x is not None:
                    added(into, part.keys, x)
            for whole, x in zip(others, found[3:], strict=True):
                if whole is not None and x is not None:
                    whole += x
        if arriving:
            held, came = arriving()
            _home(job, home, before, came)
            spans = go.got[after] if after else ()
        if t:
            before, grads = t, [x.to(k.dtype) for x in own]
        else:
            _home(job, home, 0, own)
    if before:
        _home(job, home, before, _send(job, 0, k, v, before, grads)()[1])
    return [dq.to(q.dtype), home[0].to(k.dtype), home[1].to(v.dtype), *others]


def _home(job: Job, home: Sequence[Tensor], t: int, came: Sequence[Tensor]) -> None:
    """Add what was found for the keys that this rank sent in step t."""
    spans = among(job.way.sent[t], job.keys[job.me][0])
    for x, part in zip(home, came, strict=False):
        added(x, spans, part)


# autograd ----------------------------------------------------------------------------------------


class _Flex(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: Job, q: Tensor, k: Tensor, v: Tensor, *captured: Tensor) -> Any:
        with torch.autocast(q.device.type, enabled=False):
            out, sums = _forward(job, q, k, v, captured)
        out, top = out.to(q.dtype), sums[0]
        ctx.job = job
        ctx.save_for_backward(q, k, v, out, sums, *captured)
        ctx.materialize_grads = False
        ctx.mark_non_differentiable(top)
        return out, top + sums[1].log(), top

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_lse: Tensor | None, _: Any) -> Any:
        q, k, v, out, sums, *captured = ctx.saved_tensors
        if g is None and g_lse is None:
            return (None,) * (4 + len(captured))
        if g is None:
            g = torch.zeros_like(out)
        again = torch.is_grad_enabled()
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            given = Given(g, q, k, v, None, out, settled(sums))
            found = _backward(ctx.job, given, g_lse, captured)
        if again:
            asked = [i for i, x in enumerate(found) if x is not None]
            some = [found[i] for i in asked]
            for i, x in zip(asked, _Once.apply(len(some), *some, q, k, v, g), strict=True):
                found[i] = x
        return None, *found


class _Once(torch.autograd.Function):
    """Gradients that have none themselves, which is said where one is asked for."""

    @staticmethod
    def forward(ctx: Any, n: int, *xs: Tensor) -> Any:
        ctx.materialize_grads = False
        return tuple(x.view_as(x) for x in xs[:n])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        raise UnsupportedOpError(
            "the second derivative of flex_attention, which torch has not either: use "
            "F.scaled_dot_product_attention with a mask"
        )


def attend(
    job: Job, q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, log-sum-exps, maxima) of modified scores over the keys of all ranks of a job's ring.

    q (B, H, L, E), k (B, G, S, E), v (B, G, S, F): this rank's blocks. captured: what the
    recordings have in place of their captured tensors, those of the score first.
    """
    out, lse, top = _Flex.apply(job, q, k, v, *captured)
    return out, lse, top
