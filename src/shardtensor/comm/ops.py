"""The collectives: dispatcher ops, each with its adjoint, for any sizes and dtypes.

| op            | forward                                | adjoint                          |
|---------------|----------------------------------------|----------------------------------|
| vary          | Replicate or plain meets sharded: identity | reduce                       |
| reduce        | Partial to Replicate: all-reduce       | vary                             |
| gather        | Shard to Replicate: uneven all-gather  | split                            |
| split         | Replicate to Shard: own slice          | gather                           |
| window        | Shard to global ranges, may overlap    | window_add                       |
| window_add    | pieces back to their owners, added     | window                           |
| swap          | Shard(i) to Shard(j): all-to-all       | swap back                        |
| ring          | pass blocks `shift` ranks on           | ring by -shift                   |
| take          | rows by global index                   | put                              |
| put           | rows added at global indices           | take                             |
| addend        | Replicate to Partial: on the first rank | alike                           |
| alike         | cotangents of addends to Replicate     | addend                           |

Reduce-scatter (Partial to Shard) is `window_add` with every rank's range the whole dim; its
adjoint is then the all-gather that the design asks for. Cotangents: that of a shard is the shard of
the cotangent; that of a replicated value is whole and the same on each rank; that of an addend is
the whole cotangent. The collectives run over `group`, a name from `groups.group`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from .. import _torch
from . import groups, wire
from .exchanges import FILL, exchange

_library = Library("shardtensor", "DEF")
Ints = Sequence[int]
# what each op runs; a plan runs it on fake tensors, where the dispatcher would take the fake kernel
KERNELS: dict[Any, Callable] = {}


def define(
    schema: str, kernel: Callable, fake: Callable, setup: Callable, adjoint: Callable
) -> Any:
    """A dispatcher op with a fake kernel and an adjoint (setup(ctx, inputs, output), adjoint)."""
    name = schema.split("(")[0]
    _library.define(schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"shardtensor::{name}", fake, lib=_library)
    torch.library.register_autograd(
        f"shardtensor::{name}", adjoint, setup_context=setup, lib=_library
    )
    op = getattr(torch.ops.shardtensor, name).default
    KERNELS[op] = kernel
    return op


def _keep_arguments(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.rest = inputs[1:]


def _resized(shape: Ints, dim: int, n: int) -> list[int]:
    found = list(shape)
    found[dim] = n
    return found


def _empty(x: Tensor, shape: Ints) -> Tensor:
    """An empty tensor in the memory format of x."""
    if not x.is_contiguous():
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return x.new_empty(shape).contiguous(memory_format=torch.channels_last)
        if x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return x.new_empty(shape).contiguous(memory_format=torch.channels_last_3d)
    return x.new_empty(shape)


# vary and reduce ---------------------------------------------------------------------------------


class Vary(torch.autograd.Function):
    """`vary` without the dispatcher, for use outside of tracing: views, a third of the cost."""

    @staticmethod
    def forward(ctx: Any, group: str, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, *reduce_op(grads, "sum", ctx.group)


def _vary(xs: Sequence[Tensor], group: str) -> list[Tensor]:
    # a dispatcher op may not return its argument
    return [x.clone() for x in xs]


def _reduce(xs: Sequence[Tensor], op: str, group: str) -> list[Tensor]:
    found = wire.all_reduce(xs, op, group)
    # results of a dispatcher op may not share the buffer that they travelled in, nor be views, to
    # which autograd would let nobody write
    return [found[0].data] if len(found) == 1 else [x.clone() for x in found]


def _reduce_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, ctx.op, ctx.group = inputs


def _reduce_adjoint(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    if ctx.op != "sum":
        raise NotImplementedError(f"the gradient of an all-reduce with {ctx.op}")
    return list(vary(grads, ctx.group)), None, None


vary_op = define(
    "vary(Tensor[] xs, str group) -> Tensor[]",
    _vary,
    lambda xs, group: [torch.empty_like(x) for x in xs],
    _keep_arguments,
    lambda ctx, grads: (reduce_op(grads, "sum", *ctx.rest), None),
)
reduce_op: Any = define(
    "reduce(Tensor[] xs, str op, str group) -> Tensor[]",
    _reduce,
    lambda xs, op, group: [x.new_empty(x.shape) for x in xs],
    _reduce_setup,
    _reduce_adjoint,
)


def vary(xs: Sequence[Tensor], group: str) -> Sequence[Tensor]:
    """`vary_op` where a graph is being traced, else its cheaper equal."""
    if _torch.is_tracing():
        return vary_op(list(xs), group)
    return Vary.apply(group, *xs)


# gather and split --------------------------------------------------------------------------------


def _gather(x: Tensor, dim: int, sizes: Ints, group: str) -> Tensor:
    shapes = [_resized(x.shape, dim, n) for n in sizes]
    return torch.cat(wire.all_gather(x.contiguous(), shapes, group), dim)


def _split(x: Tensor, dim: int, sizes: Ints, group: str) -> Tensor:
    me = groups.rank(group)
    return x.narrow(dim, sum(sizes[:me]), sizes[me]).clone(memory_format=torch.contiguous_format)


gather_op = define(
    "gather(Tensor x, int dim, int[] sizes, str group) -> Tensor",
    _gather,
    lambda x, dim, sizes, group: x.new_empty(_resized(x.shape, dim, sum(sizes))),
    _keep_arguments,
    lambda ctx, g: (split_op(g, *ctx.rest), None, None, None),
)
split_op: Any = define(
    "split(Tensor x, int dim, int[] sizes, str group) -> Tensor",
    _split,
    lambda x, dim, sizes, group: x.new_empty(_resized(x.shape, dim, sizes[groups.rank(group)])),
    _keep_arguments,
    lambda ctx, g: (gather_op(g, *ctx.rest), None, None, None),
)


# window ------------------------------------------------------------------------------------------


def _window(
    x: Tensor, dim: int, sizes: Ints, starts: Ints, stops: Ints, wrap: bool, fill: float, group: str
) -> Tensor:
    """Rows [starts[me], stops[me]) of a dim cut into sizes; beyond its ends fill or wrap."""
    me = groups.rank(group)
    plan = exchange(tuple(sizes), tuple(starts), tuple(stops), wrap, me)
    received: list[list[Tensor]] = [[] for _ in sizes]
    if plan.communicates:
        sends = [[x.narrow(dim, a, n) for a, n in to] for to in plan.sends]
        shapes = [
            [_resized(x.shape, dim, p.length) for p in plan.pieces if p.source == r and r != me]
            for r in range(len(sizes))
        ]
        received = wire.exchange(sends, shapes, x, group, "window")
    out = _empty(x, _resized(x.shape, dim, plan.rows))
    row = 0
    for source, start, length in plan.pieces:
        here = out.narrow(dim, row, length)
        if source == FILL:
            here.fill_(fill)
        elif source == me:
            here.copy_(x.narrow(dim, start, length))
        else:
            here.copy_(received[source].pop(0))
        row += length
    return out


def _window_fake(
    x: Tensor, dim: int, sizes: Ints, starts: Ints, stops: Ints, wrap: bool, fill: float, group: str
) -> Tensor:
    plan = exchange(tuple(sizes), tuple(starts), tuple(stops), wrap, groups.rank(group))
    return _empty(x, _resized(x.shape, dim, plan.rows))


def _window_adjoint(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    dim, sizes, starts, stops, wrap, _, group = ctx.rest
    return window_add_op(g, dim, sizes, starts, stops, wrap, group), *[None] * 7


def _window_add(
    g: Tensor, dim: int, sizes: Ints, starts: Ints, stops: Ints, wrap: bool, group: str
) -> Tensor:
    """The adjoint of `_window`: rows of windows go home, where they are added up."""
    me = groups.rank(group)
    plan = exchange(tuple(sizes), tuple(starts), tuple(stops), wrap, me)
    out = _empty(g, _resized(g.shape, dim, sizes[me])).zero_()
    sends: list[list[Tensor]] = [[] for _ in sizes]
    row = 0
    for source, start, length in plan.pieces:
        part = g.narrow(dim, row, length)
        if source == me:
            out.narrow(dim, start, length).add_(part)
        elif source != FILL:
            sends[source].append(part)
        row += length
    if plan.communicates:
        shapes = [[_resized(g.shape, dim, n) for _, n in of] for of in plan.sends]
        received = wire.exchange(sends, shapes, g, group, "window_add")
        for rows, parts in zip(plan.sends, received, strict=True):
            for (start, length), part in zip(rows, parts, strict=True):
                out.narrow(dim, start, length).add_(part)
    return out


def _window_add_adjoint(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    dim, sizes, starts, stops, wrap, group = ctx.rest
    return window_op(g, dim, sizes, starts, stops, wrap, 0.0, group), *[None] * 6


window_op = define(
    "window(Tensor x, int dim, int[] sizes, int[] starts, int[] stops, bool wrap, float fill, "
    "str group) -> Tensor",
    _window,
    _window_fake,
    _keep_arguments,
    _window_adjoint,
)
window_add_op = define(
    "window_add(Tensor g, int dim, int[] sizes, int[] starts, int[] stops, bool wrap, str group)"
    " -> Tensor",
    _window_add,
    lambda g, dim, sizes, starts, stops, wrap, group: _empty(
        g, _resized(g.shape, dim, sizes[groups.rank(group)])
    ),
    _keep_arguments,
    _window_add_adjoint,
)


# swap --------------------------------------------------------------------------------------------


def _swap(x: Tensor, old: int, new: int, old_sizes: Ints, new_sizes: Ints, group: str) -> Tensor:
    me = groups.rank(group)
    sends = [[part] for part in x.split(list(new_sizes), new)]
    shapes = [[_resized(_resized(x.shape, old, n), new, new_sizes[me])] for n in old_sizes]
    mine = sends[me][0]
    sends[me], shapes[me] = [], []
    received = wire.exchange(sends, shapes, x, group, "swap")
    received[me] = [mine]
    return torch.cat([parts[0] for parts in received], old).contiguous()


swap_op: Any = define(
    "swap(Tensor x, int old, int new, int[] old_sizes, int[] new_sizes, str group) -> Tensor",
    _swap,
    lambda x, old, new, old_sizes, new_sizes, group: x.new_empty(
        _resized(_resized(x.shape, old, sum(old_sizes)), new, new_sizes[groups.rank(group)])
    ),
    _keep_arguments,
    lambda ctx, g: (
        swap_op(g, ctx.rest[1], ctx.rest[0], ctx.rest[3], ctx.rest[2], ctx.rest[4]),
        *[None] * 5,
    ),
)


# ring --------------------------------------------------------------------------------------------


def _ring(x: Tensor, dim: int, sizes: Ints, held: int, shift: int, group: str) -> Tensor:
    n, me = len(sizes), groups.rank(group)
    if shift % n == 0:
        return x.clone(memory_format=torch.contiguous_format)
    sends: list[list[Tensor]] = [[] for _ in sizes]
    shapes: list[list[list[int]]] = [[] for _ in sizes]
    sends[(me + shift) % n] = [x]
    shapes[(me - shift) % n] = [_resized(x.shape, dim, sizes[(me - shift - held) % n])]
    return wire.exchange(sends, shapes, x, group, "ring")[(me - shift) % n][0]


def _ring_adjoint(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    dim, sizes, held, shift, group = ctx.rest
    return ring_op(g, dim, sizes, held + shift, -shift, group), *[None] * 5


ring_op = define(
    "ring(Tensor x, int dim, int[] sizes, int held, int shift, str group) -> Tensor",
    _ring,
    lambda x, dim, sizes, held, shift, group: x.new_empty(
        _resized(x.shape, dim, sizes[(groups.rank(group) - shift - held) % len(sizes)])
    ),
    _keep_arguments,
    _ring_adjoint,
)


# take and put ------------------------------------------------------------------------------------


def exchange_parts(
    parts: Sequence[Tensor], shapes: Sequence[Ints], like: Tensor, group: str, label: str
) -> list[Tensor]:
    """What each rank had for this one; parts[r] goes to rank r, this rank's own stays."""
    if len(parts) == 1:
        return list(parts)
    me = groups.rank(group)
    found = wire.exchange(
        [[p] if r != me else [] for r, p in enumerate(parts)],
        [[s] if r != me else [] for r, s in enumerate(shapes)],
        like, group, label,
    )  # fmt: skip
    return [parts[r] if r == me else f[0] for r, f in enumerate(found)]


def requests(index: Tensor, sizes: Ints, group: str) -> tuple[Tensor, list[int], list[Tensor]]:
    """Sort global indices by owner and tell each owner: (order, counts, local rows asked of me)."""
    groups.check_values(group)
    n = len(sizes)
    ends = torch.tensor(sizes, device=index.device).cumsum(0)
    owner = torch.bucketize(index, ends, right=True)
    order = torch.argsort(owner, stable=True)
    counts = torch.bincount(owner, minlength=n)
    asked = [int(c) for c in exchange_parts(counts.split(1), [[1]] * n, counts, group, "take")]
    wanted = (index - (ends - torch.tensor(sizes, device=index.device))[owner])[order]
    per_owner = counts.tolist()
    rows = exchange_parts(wanted.split(per_owner), [[c] for c in asked], wanted, group, "take")
    return order, per_owner, rows


def _take(x: Tensor, index: Tensor, sizes: Ints, group: str) -> Tensor:
    order, counts, rows = requests(index, sizes, group)
    shapes = [[c, *x.shape[1:]] for c in counts]
    out = x.new_empty([index.numel(), *x.shape[1:]])
    out[order] = torch.cat(exchange_parts([x[r] for r in rows], shapes, x, group, "take"))
    return out


def _put(rows: Tensor, index: Tensor, sizes: Ints, group: str) -> Tensor:
    order, counts, wanted = requests(index, sizes, group)
    shapes = [[r.numel(), *rows.shape[1:]] for r in wanted]
    parts = exchange_parts(rows[order].split(counts), shapes, rows, group, "put")
    out = rows.new_zeros([sizes[groups.rank(group)], *rows.shape[1:]])
    for at, part in zip(wanted, parts, strict=True):
        out.index_add_(0, at, part)
    return out


def _index_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.rest = inputs[2:]


take_op = define(
    "take(Tensor x, Tensor index, int[] sizes, str group) -> Tensor",
    _take,
    lambda x, index, sizes, group: x.new_empty([index.numel(), *x.shape[1:]]),
    _index_setup,
    lambda ctx, g: (put_op(g, ctx.saved_tensors[0], *ctx.rest), None, None, None),
)
put_op: Any = define(
    "put(Tensor rows, Tensor index, int[] sizes, str group) -> Tensor",
    _put,
    lambda rows, index, sizes, group: rows.new_empty([sizes[groups.rank(group)], *rows.shape[1:]]),
    _index_setup,
    lambda ctx, g: (take_op(g, ctx.saved_tensors[0], *ctx.rest), None, None, None),
)
