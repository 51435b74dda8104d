"""Neighbourhood attention on a shard and strips of others' keys and values, without a copy of it.

Tiles take their keys of pieces: of the shard as it lies and of the strips beside it, which travel
along each dim in turn, later ones with the corners. Kept for backward are the operands and strips;
the strips' gradients go back, and are added to the rims.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._torch import Function
from ...attention.blocks import wide
from ...attention.pieces import Pieced, Pieces, boxes, narrowed, rows_of, taken
from ...attention.tiles import Call, add_gradients, attended, by_autograd
from ...comm.exchanges import Exchange
from ...spec import Spec
from ..overlap import Route, pays, route, start
from ..windows import Reach, fetch

Reaches = tuple[tuple[int, Reach], ...]


class Side(NamedTuple):
    """What lies beside the shard along one dim: the plan, its exchange, the rows that are sent."""

    d: int
    plan: Exchange
    way: Route
    sent: list[tuple[int, int]]
    travels: bool

    def exchanged(self, way: Route, low: Pieced, parts: Sequence[Tensor]) -> list[Tensor]:
        """What comes for parts of (keys, values) that are shaped as low in the other dims."""
        if not self.travels:
            return []
        like = parts[0] if parts else _any(low)
        return start(way, like.new_empty(1).expand(2, *low.shape), parts)()

    def joined(self, low: Pieced, strips: Sequence[Tensor], me: int) -> Pieced:
        """The rows of this rank's window, in pieces."""
        came = iter(strips)
        parts = [
            narrowed(low, self.d, p.start, p.length) if p.source == me else next(came)
            for p in self.plan.pieces
        ] or [narrowed(low, self.d, 0, 0)]
        return parts[0] if len(parts) == 1 else Pieces(self.d, parts)


def _any(x: Pieced) -> Tensor:
    return x if isinstance(x, Tensor) else _any(x.parts[0])


def sides_of(spec: Spec, reaches: Reaches) -> tuple[Side, ...] | None:
    """The sides of this rank's shard; None where shards are small, or each reads a whole dim."""
    if not reaches or not pays(spec):
        return None
    found = []
    for d, reach in reaches:
        plan, way, sent = route(spec, d, reach)
        if plan.whole:
            return None
        # beside the batch keys and values lie in one message
        found.append(Side(d, plan, way._replace(dim=d + 1), sent, not reach.inside))
    return tuple(found)


def attend_strips(
    q: Tensor, k: Tensor, v: Tensor, spec: Spec, reaches: Reaches, sides: tuple[Side, ...],
    call: Call,
) -> Tensor:  # fmt: skip
    """The result for the queries of this rank's shard, by its keys and values and others'."""
    found: Tensor = _Strips.apply(q, k, v, spec, reaches, sides, call)
    return found


class _Strips(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, spec: Spec, reaches: Reaches,
        sides: tuple[Side, ...], call: Call,
    ) -> Tensor:  # fmt: skip
        ctx.materialize_grads = False
        low: list[Pieced] = [k, v]
        strips: list[Tensor] = []
        for side in sides:
            given = [
                torch.stack([taken(x, rows_of(x, side.d, a, b)) for x in low]) for a, b in side.sent
            ]
            came = side.exchanged(side.way, low[0], given)
            strips += came
            me = spec.index[side.d]
            low = [side.joined(x, [s[i] for s in came], me) for i, x in enumerate(low)]
        out, lse = attended(q, *low, *call)
        ctx.save_for_backward(q, k, v, out, lse, *strips)
        ctx.facts = spec, reaches, sides, call
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        if g is None:
            return (None,) * 7
        q, k, v, out, lse, *strips = ctx.saved_tensors
        spec, reaches, sides, call = ctx.facts
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            found = iter(_again(g, (q, k, v), needs, spec, reaches, call))
            return *(next(found) if need else None for need in needs), None, None, None, None
        grown = [torch.zeros_like(s, dtype=wide(s.dtype)) for s in strips]
        whole: list[Any] = [torch.zeros_like(x, dtype=wide(x.dtype)) for x in (k, v)]
        low, grads, levels = [k, v], list(whole), []
        at = 0
        for side in sides:
            n = sum(len(of) for _, of in side.way.gets) if side.travels else 0
            me, own = spec.index[side.d], slice(at, at + n)
            levels.append((side, grads, own))
            low = [side.joined(x, [s[i] for s in strips[own]], me) for i, x in enumerate(low)]
            grads = [side.joined(x, [s[i] for s in grown[own]], me) for i, x in enumerate(grads)]
            at += n
        dq = add_gradients(g, q, low[0], low[1], out, lse, grads[0], grads[1], call)
        for side, into, own in reversed(levels) if needs[1] or needs[2] else ():
            outward = [s.to(k.dtype) for s in grown[own]]
            backs = side.exchanged(side.way.back(), into[0], outward)
            for (a, b), back in zip(side.sent, backs, strict=True) if side.travels else ():
                for x, part in zip(into, back, strict=True):
                    for view, where in boxes(x, rows_of(x, side.d, a, b)):
                        view.add_(part[where])
        return dq, *(x.to(k.dtype) for x in whole), None, None, None, None


def _again(
    g: Tensor, operands: tuple[Tensor, ...], needs: Sequence[bool], spec: Spec, reaches: Reaches,
    call: Call,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients, differentiable any number of times: of copies with all rows."""
    # nodes of their own: one operand may be the other, or be made from it
    q, k, v = (x.view_as(x) for x in operands)
    wanted = [x for x, need in zip((q, k, v), needs, strict=True) if need]
    rows = torch.stack([k, v])
    for d, reach in reaches:
        rows = fetch(rows, d, spec, reach, lead=1)
    y = by_autograd(q, rows[0], rows[1], call)
    return torch.autograd.grad(y, wanted, g, create_graph=True)
