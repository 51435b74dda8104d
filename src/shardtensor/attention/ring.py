"""Ring attention as a dispatcher op: keys and values travel, queries stay (arXiv 2310.01889).

The ranks of a group sit around a ring; or `team` of them at each place, who form rings of their own
side by side, as Ulysses x ring does (arXiv 2405.07719). Place i has the queries [q_starts[i],
+ q_sizes[i]) and, before the first step, the keys [k_starts[i], + k_sizes[i]) of the ring; or
several such spans, as many at each place. At each step every rank attends to the block that it has
while the next one arrives. Ranks of `merged` hold other keys for the same queries: their results
are merged at the end by two all-reduces.

Backward recomputes the scores block by block from the merged sums. What a rank finds for the keys
of another goes straight home, beside the keys of the next step and in their dtype: the fused
kernels give it in that. Home adds it up in fp32 or fp64. Measured on 2 to 16 ranks in bf16, against
float64: 3.4 to 4.9 thousandths of the gradient's root mean square, one device's kernel 3.8 to 4.4,
the sum in fp32 around the ring the same bits as this; a sum in bf16 around the ring 3.5 to 6.1.
Memory is that of some blocks, whatever the number of ranks: in backward, beside the gradients,
eleven of one rank's queries, or of those of a turn where heads take turns. These are keys and
values held and arriving, gradients leaving and arriving, and the kernel's three. A backward that is
itself recorded (create_graph=True) holds all keys instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..comm import groups, wire
from ..comm.define import define, run
from ..errors import UnsupportedOpError
from .around import Held, Shapes, in_turns, own_part, shared, start
from .blocks import backward, forward, is_based, is_counted, settled, wide
from .call import INTEGERS, Call, Seen, Span, call_of
from .counted import refused, top_of
from .gradients import Given, OfQueries, add, beside, lies, sums_of
from .merge import Merge, relative
from .twice import attend_plainly


def _cut(rows: Span, *xs: Tensor) -> Sequence[Tensor]:
    """These rows of tensors that have as many."""
    a, b = rows
    return xs if rows == (0, xs[0].shape[2]) else [x[:, :, a:b] for x in xs]


def _part(mask: Tensor | None, seen: Seen) -> Tensor | None:
    """What a piece meets of the mask."""
    if mask is None:
        return None
    if mask.shape[-1] > 1:
        mask = mask.narrow(-1, seen.columns[0], seen.columns[1] - seen.columns[0])
    return mask if mask.shape[-2] == 1 else _cut_rows(mask, seen.rows)


def _cut_rows(mask: Tensor, rows: Span) -> Tensor:
    return mask[..., rows[0] : rows[1], :]


def _heads(x: Tensor, part: Span) -> Tensor:
    return x if part == (0, x.shape[1]) else x[:, part[0] : part[1]]


def _heads_of_mask(mask: Tensor | None, part: Span) -> Tensor | None:
    several = mask is not None and mask.ndim > 2 and mask.shape[-3] > 1
    return mask[..., part[0] : part[1], :, :] if several and mask is not None else mask


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    """(out, sums) of this rank's queries over all keys, which come around."""
    call, merged = Call.of(*rest[:-1]), rest[-1]
    turns, alone = in_turns(call, q, k, False), groups.size(merged) == 1
    if len(turns) == 1:
        out, sums = _turn(call, q, k, v, mask, alone)
    else:
        out, sums = _fake(q, k, v, mask)
        out = out if alone else out.to(wide(q.dtype))
        for heads, keys in turns:
            found = _turn(
                call, _heads(q, heads), _heads(k, keys), _heads(v, keys),
                _heads_of_mask(mask, heads), alone,
            )  # fmt: skip
            _heads(out, heads).copy_(found[0])
            sums[:, :, heads[0] : heads[1]].copy_(found[1])
            del found
    out, sums = over_ranks(out, sums, merged)
    return out.to(q.dtype), sums


def _turn(
    call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, alone: bool
) -> tuple[Tensor, Tensor]:
    """(out, sums) of some heads; alone: whether no other rank has keys for these queries."""
    steps = call.steps
    k, v = shared(call, k, v)
    top = None if _single(call, q, alone) else top_of(mask)
    total = Merge(q, v, top if is_based(top, q) else None)
    like, held = Shapes.of(k, v), Held.of(k, v, steps)
    for step in range(steps + 1):
        arriving, _ = start(call, step, held, [], like)
        every = call.seen(q, call.held(call.me, step))
        for i, seen in enumerate(every):
            (queries,), (keys, values) = _cut(seen.rows, q), _cut(seen.keys, held.keys, held.values)
            found = forward(
                queries, keys, values, _part(mask, seen), seen.rule,
                top.cut(seen.rows) if top else None,
            )  # fmt: skip
            total.add(seen.rows, *found, last=alone and step == steps and i == len(every) - 1)
            del found, keys, values
        held = arriving()
        # what was sent goes
        del arriving
    return total.result()


def _single(call: Call, q: Tensor, alone: bool) -> bool:
    """Whether this rank computes one block, which no other is merged with."""
    return alone and not call.steps and len(call.seen(q, call.me)) == 1


def over_ranks(out: Tensor, sums: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Merge what ranks found for the same queries and different keys."""
    if groups.size(group) == 1:
        return out, sums
    (top,) = wire.all_reduce([sums[0]], "max", group)
    weight = relative(sums, top)
    summed, total = wire.all_reduce([(out * weight.unsqueeze(-1)), weight], "sum", group)
    safe = total.masked_fill(total == 0, 1.0)
    # the layout that fused kernels give: heads beside each other in memory
    merged = (summed / safe.unsqueeze(-1)).transpose(1, 2).contiguous().transpose(1, 2)
    return merged, torch.stack((top, total))


def _attention_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    sums: Tensor,
    mask_grad: bool,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dmask): keys go around once more, what is found for them goes home."""
    call = Call.of(*rest)
    sums = settled(sums)
    if q.device.type != "cpu":
        # once, as kernels ask for it
        g = g.contiguous()
    given = Given(g, q, k, v, mask, out, sums)
    turns = in_turns(call, q, k, mask_grad)
    if len(turns) == 1:
        return _turn_back(call, given, mask_grad)
    dq, home = beside(q, q.dtype), sums_of([k, v], k.dtype)
    for heads, keys in turns:
        into = [x.narrow(-3, keys[0], keys[1] - keys[0]) for x in home]
        _turn_back(call, _some_heads(given, heads, keys), False, _heads(dq, heads), into)
    dk, dv = home[0] if len(home) == 1 else home
    return dq, dk, dv, q.new_empty([0])


def _some_heads(x: Given, heads: Span, keys: Span) -> Given:
    """What the gradients of some heads of queries, and of the keys that they share, are made of."""
    return Given(
        _heads(x.g, heads), _heads(x.q, heads), _heads(x.k, keys), _heads(x.v, keys),
        _heads_of_mask(x.mask, heads), _heads(x.out, heads), x.sums[:, :, heads[0] : heads[1]],
    )  # fmt: skip


def _turn_back(
    call: Call,
    given: Given,
    mask_grad: bool,
    into_q: Tensor | None = None,
    into: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Those of some heads, also in `into_q` and `into`, whose dtype may be that of the sums."""
    _, q, k, v, mask, *_ = given
    steps, dtype = call.steps, wide(q.dtype)
    k, v = shared(call, k, v)
    inside = into_q is not None and into_q.dtype is dtype
    dq = OfQueries(q, dtype, into_q.zero_() if into_q is not None and inside else None)
    dmask = q.new_zeros(mask.shape, dtype=dtype) if mask_grad and mask is not None else None
    like, held = Shapes.of(k, v), Held.of(k, v, steps)
    home, grads = list[Tensor](), list[Tensor]()
    for step in range(steps + 1):
        arriving, returning = start(call, step, held, grads, like)
        own = _step_back(given, call.seen(q, call.held(call.me, step)), held, dq, dmask)
        if step:
            add(home, returning())
        else:
            home = own_part(call, own)
            if inside or call.together > 1 or not all(lies(x, dtype) for x in home):
                home = sums_of(home, dtype, into if inside else ())
        if step or call.together > 1:
            grads = [x.to(k.dtype) for x in own]
        del own
        held = arriving()
        # what was sent goes
        del arriving, returning
    if grads:
        add(home, start(call, steps + 1, held, grads, like)[1]())
    if into_q is not None and not inside:
        add([into_q.zero_(), *(x.zero_() for x in into)], [dq.result(), *home])
    dk, dv = home[0] if len(home) == 1 else home
    return (
        dq.result().to(q.dtype),
        dk.to(k.dtype),
        dv.to(v.dtype),
        q.new_empty([0]) if dmask is None or mask is None else dmask.to(mask.dtype),
    )


def _step_back(
    given: Given, every: Sequence[Seen], held: Held, dq: OfQueries, dmask: Tensor | None
) -> list[Tensor]:
    """The gradients of a step's keys and values; those of queries and mask are added up."""
    dtype, rows = dq.dtype, given.q.shape[2]
    # what queries find for all keys at once is not added up
    alone = len(every) == 1 and every[0].keys == (0, held.keys.shape[2])
    own = [] if alone else [beside(x, dtype).zero_() for x in (held.keys, held.values)]
    for seen in every:
        dy, queries, y = _cut(seen.rows, given.g, given.q, given.out)
        keys, values = _cut(seen.keys, held.keys, held.values)
        sums, (a, b) = given.sums, seen.rows
        sums = sums if (a, b) == (0, rows) else sums[..., a:b]
        block = Given(dy, queries, keys, values, _part(given.mask, seen), y, sums)
        found = backward(block, seen.rule, dmask is not None)
        dq.add(seen.rows, found[0])
        if alone:
            own = [found[1], found[2]]
        else:
            add(_cut(seen.keys, *own), found[1:3])
        part = _part(dmask, seen)
        if part is not None and found[3] is not None:
            part.add_(found[3])
        del found, block, keys, values
    return own


# the ops -----------------------------------------------------------------------------------------


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any) -> Any:
    b, h, rows, _ = q.shape
    out = q.new_empty([b, rows, h, v.shape[-1]]).transpose(1, 2)
    return out, q.new_empty([2, b, h, rows], dtype=wide(q.dtype))


def _fake_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    sums: Tensor,
    mask_grad: bool,
    *rest: Any,
) -> Any:
    dmask = mask.new_empty(mask.shape) if mask_grad and mask is not None else q.new_empty([0])
    return beside(q, q.dtype), beside(k, k.dtype), beside(v, v.dtype), dmask


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.rest, ctx.merged = inputs[4:-1], inputs[-1]


def _adjoint(ctx: Any, g: Tensor, _: Any) -> tuple[Any, ...]:
    mask_grad = ctx.needs_input_grad[3]
    call = Call.of(*ctx.rest)
    rest = [None] * (len(ctx.rest) + 1)
    if torch.is_grad_enabled() and not _torch.is_tracing() and not call.drop:
        return *_recorded(ctx, g, call), *rest
    *grads, dmask = run(backward_op, g, *ctx.saved_tensors, mask_grad, *ctx.rest)
    return *grads, dmask if mask_grad else None, *rest


def _recorded(ctx: Any, g: Tensor, call: Call) -> list[Tensor | None]:
    """Gradients that have gradients themselves."""
    # nodes of their own: one operand may be the other, or be made from it
    given = [None if x is None else x.view_as(x) for x in ctx.saved_tensors[:4]]
    q, k, v, mask = given
    assert q is not None and k is not None and v is not None
    sizes, wanted = call.gathered()
    out = attend_plainly(
        q, k, v, call.whole_mask(mask), sizes=sizes, wanted=wanted, pieces=call.whole_pieces(),
        scale=call.scale, group=call.group, merged=ctx.merged,
    )  # fmt: skip
    needs = ctx.needs_input_grad[:4]
    asked = [x for x, need in zip(given, needs, strict=True) if need and x is not None]
    found = iter(torch.autograd.grad(out, asked, g, create_graph=True, materialize_grads=True))
    return [next(found) if need else None for need in needs]


def _no_second(ctx: Any, *grads: Any) -> Any:
    raise UnsupportedOpError(
        "the second derivative of attention over sharded keys, compiled or with dropout; leave it "
        "out of st.compile, take dropout_p=0, or redistribute the keys to Replicate, under "
        "sdpa_kernel(SDPBackend.MATH)"
    )


def _under(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor | None]:
    """As the op, in products that torch.func and forward mode see through."""
    *integers, merged = rest
    call = Call.of(*integers)
    if call.drop:
        raise UnsupportedOpError(
            "torch.func or forward mode through attention over sharded keys with dropout: take "
            "dropout_p=0"
        )
    sizes, wanted = call.gathered()
    out = attend_plainly(
        q, k, v, call.whole_mask(mask), sizes=sizes, wanted=wanted, pieces=call.whole_pieces(),
        scale=call.scale, group=call.group, merged=merged,
    )  # fmt: skip
    return out, None


attention_op = define(
    f"attention(Tensor q, Tensor k, Tensor v, Tensor? mask, {INTEGERS}, str merged)"
    " -> (Tensor, Tensor)",
    _attention,
    _fake,
    _setup,
    _adjoint,
    _under,
)
backward_op: Any = define(
    "attention_backward(Tensor g, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, "
    f"Tensor sums, bool mask_grad, {INTEGERS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _attention_backward,
    _fake_backward,
    lambda ctx, inputs, output: None,
    _no_second,
    _no_second,
)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    q_spans: tuple[Span, ...],
    k_spans: tuple[Span, ...],
    mask_start: int = 0,
    causal: bool,
    scale: float,
    exact: bool = True,
    drop: float = 0.0,
    seed: int = 0,
    order: tuple[int, ...] = (),
    team: int = 1,
    together: int = 1,
    group: str,
    merged: str,
) -> Tensor:
    """softmax(scale q k^T + mask) v over the keys of all ranks; twice without
    dropout.

    q (B, H, L, E), k (B, G, S, E), v (B, G, S, F): this rank's blocks. mask: whole along the keys
    from mask_start on, broadcasting to (B, H, L, keys). q_spans, k_spans: (start, size) of the
    queries and keys at each place of the ring, one or several for each, listed place by place.
    order, team, together: who sits there and has what, as of `call.Call`. Over `merged` ranks hold
    other keys for the same queries; the result is then the same on all of them. exact: as of
    `blocks.Rule`. Sends each block once to each rank that needs it.
    """
    # of which seeds are drawn anew is not kept
    make = call_of.__wrapped__ if drop else call_of  # type: ignore[attr-defined]
    call = make(
        q_spans, k_spans, mask_start, causal, exact, scale, drop, seed, order, team, together, group
    )
    out, sums = run(attention_op, q, k, v, mask, call, merged)
    # torch.func's products weigh all keys at once
    if sums is None or _single(call, q, groups.size(merged) == 1):
        return out
    # out of the op: gradients of rows that nothing reads are zeros
    return refused(out, sums) if is_counted(q, k, v, mask) else out
