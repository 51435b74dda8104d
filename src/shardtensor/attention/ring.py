"""Ring attention as a dispatcher op: keys and values travel, queries stay (arXiv 2310.01889).

Rank r of `group` holds the queries [q_starts[r], + q_sizes[r]) and, before the first step, the keys
[k_starts[r], + k_sizes[r]) of the ring; or several such spans, as many on each rank. At each step
every rank attends to the block that it has while the next one arrives. Ranks of `merged` hold other
keys for the same queries: their results are merged at the end by two all-reduces.

Backward recomputes the scores block by block from the merged sums. Gradients of a block of
keys travel along with it, and from the last rank that needs it straight home. Memory is that of
some blocks (at most 28 of one rank's queries were measured), whatever the number of ranks. A
backward that is itself recorded (create_graph=True) holds all keys instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..comm import groups, wire
from ..comm.define import define
from ..errors import UnsupportedOpError
from .blocks import Merge, Rule, backward, dead_rows, forward, relative, settled, wide
from .schedule import Laid, laid, pieces
from .twice import Piece, attend_plainly

Span = tuple[int, int]


@dataclass(frozen=True)
class _Ring:
    """The integers of one call, the same on every rank of the ring but for `me`."""

    q_starts: tuple[int, ...]
    q_sizes: tuple[int, ...]
    k_starts: tuple[int, ...]
    k_sizes: tuple[int, ...]
    mask_start: int
    causal: bool
    exact: bool
    scale: float
    drop: float
    seed: int
    group: str

    @classmethod
    def of(cls, *integers: Any) -> _Ring:
        fields: list[Any] = [tuple(x) if isinstance(x, list) else x for x in integers]
        return cls(*fields)

    @cached_property
    def me(self) -> int:
        return groups.rank(self.group)

    @cached_property
    def n(self) -> int:
        return groups.size(self.group)

    @cached_property
    def laid(self) -> Laid:
        return laid(self.n, self.q_starts, self.q_sizes, self.k_starts, self.k_sizes, self.causal)

    def held(self, rank: int, step: int) -> int:
        """The block that a rank may hold after `step` hops."""
        return (rank - step) % self.n

    def seen(self, q: Tensor, block: int) -> list[tuple[Span, Span, Rule]]:
        """Local rows, local keys and rule of each piece of a block that this rank computes."""
        # ranks may have no queries for other reasons than tokens: an empty shard of the batch
        if not q.numel():
            return []
        found: list[tuple[Span, Span, Rule]] = []
        row = 0
        for first, rows in self.laid.queries[self.me]:
            key = 0
            for start, keys in self.laid.keys[block]:
                for p in pieces(rows, keys, first - start if self.causal else None):
                    seed = self._seed(block, len(found))
                    rule = Rule(self.scale, p.triangle, self.drop, seed, self.exact)
                    found.append((_moved(p.rows, row), _moved(p.keys, key), rule))
                key += keys
            row += rows
        return found

    def whole_pieces(self) -> list[Piece]:
        """What this rank's rows see of the keys of all ranks."""
        found, row = list[Piece](), 0
        for first, rows in self.laid.queries[self.me]:
            key = 0
            for start, keys in (span for block in self.laid.keys for span in block):
                for p in pieces(rows, keys, first - start if self.causal else None):
                    (a, b), (c, d) = p.rows, p.keys
                    found.append((row + a, b - a, key + c, d - c, p.triangle))
                key += keys
            row += rows
        return found

    def _seed(self, block: int, piece: int) -> int:
        most = 3 * (len(self.k_starts) // self.n) * (len(self.q_starts) // self.n)
        return (self.seed + most * block + piece) % 2**63

    def mask(self, mask: Tensor | None, block: int, rows: Span, keys: Span) -> Tensor | None:
        """The part of the mask that a piece meets; tokens are one span then."""
        if mask is None:
            return None
        if mask.shape[-1] > 1:
            first = self.laid.keys[block][0][0] - self.mask_start
            mask = mask[..., first + keys[0] : first + keys[1]]
        return mask if mask.shape[-2] == 1 else mask[..., rows[0] : rows[1], :]


def _moved(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by


def _cut(x: Tensor, rows: Span) -> Tensor:
    return x[:, :, rows[0] : rows[1]]


def _hidden(dead: Tensor | None, rows: Span) -> Tensor | None:
    return dead if dead is None or dead.shape[-1] == 1 else _cut(dead, rows)


def _like(x: Tensor, tokens: int) -> list[int]:
    """The shape of a block of keys or values with that many tokens."""
    return [*x.shape[:2], tokens, x.shape[3]]


def _post(
    ring: _Ring, to: int | None, parts: list[Tensor], arrivals: dict[int, list[list[int]]]
) -> Callable[[], dict[int, list[Tensor]]]:
    """Send parts to one rank; calling what it returns gives the tensors that came, by sender."""
    sends = {} if to is None else {to: parts}
    return wire.start_exchange(sends, arrivals, parts[0], ring.group, "ring")


def _pass_keys(ring: _Ring, step: int, held: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Start the hop after `step` of the blocks that have to travel on."""
    n, me, far = ring.n, ring.me, ring.laid.hops
    coming, before = ring.held(me, step + 1), (me - 1) % n
    arrivals = {}
    if step < far[coming]:
        arrivals[before] = [_like(x, ring.laid.held[coming]) for x in held]
    to = (me + 1) % n if step < far[ring.held(me, step)] else None
    wait = _post(ring, to, held, arrivals)
    return lambda: wait().get(before) or [x.new_empty(_like(x, 0)) for x in held]


def _pass_grads(
    ring: _Ring, step: int, grads: list[Tensor]
) -> Callable[[], tuple[list[Tensor], list[Tensor]]]:
    """Start the hop after `step` of the gradients: (those of the next block, those come home)."""
    n, me, far = ring.n, ring.me, ring.laid.hops
    block, coming = ring.held(me, step), ring.held(me, step + 1)
    before, last = (me - 1) % n, (me + step) % n
    arrivals = {}
    if step < far[coming]:
        arrivals[before] = [_like(x, ring.laid.held[coming]) for x in grads]
    if step and step == far[me]:
        arrivals[last] = [_like(x, ring.laid.held[me]) for x in grads]
    to = None
    if step < far[block]:
        to = (me + 1) % n
    elif step and step == far[block]:
        to = block
    wait = _post(ring, to, grads, arrivals)

    def arrived() -> tuple[list[Tensor], list[Tensor]]:
        found = wait()
        return (
            found.get(before, []) if step < far[coming] else [],
            found.get(last, []) if step and step == far[me] else [],
        )

    return arrived


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    """(out, sums) of this rank's queries over all keys, which come around."""
    ring, merged = _Ring.of(*rest[:-1]), rest[-1]
    steps = ring.laid.steps
    total = Merge(q, v)
    dead = dead_rows(mask, q.dtype)
    held = [k, v]
    for step in range(steps + 1):
        arriving = _pass_keys(ring, step, held) if step < steps else None
        block = ring.held(ring.me, step)
        for rows, keys, rule in ring.seen(q, block):
            part = ring.mask(mask, block, rows, keys)
            found = forward(
                _cut(q, rows), _cut(held[0], keys), _cut(held[1], keys), part, rule,
                _hidden(dead, rows),
            )  # fmt: skip
            total.add(rows, *found)
        held = arriving() if arriving else held
    out, sums = _over_ranks(*total.result(), merged)
    return out.to(q.dtype), sums


def _over_ranks(out: Tensor, sums: Tensor, group: str) -> tuple[Tensor, Tensor]:
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
    """(dq, dk, dv, dmask): keys go around once more, followed by their gradients."""
    ring = _Ring.of(*rest)
    steps, me = ring.laid.steps, ring.me
    dtype = wide(q.dtype)
    sums = settled(sums)
    dq = q.new_zeros(q.shape, dtype=dtype)
    dmask = q.new_zeros(mask.shape, dtype=dtype) if mask_grad and mask is not None else None
    held, home = [k, v], list[Tensor]()
    passing = None
    for step in range(steps + 1):
        arriving = _pass_keys(ring, step, held) if step < steps else None
        block = ring.held(me, step)
        grads = [x.new_zeros(x.shape, dtype=dtype) for x in held]
        for rows, keys, rule in ring.seen(q, block):
            found = backward(
                _cut(g, rows), _cut(q, rows), _cut(held[0], keys), _cut(held[1], keys),
                ring.mask(mask, block, rows, keys), _cut(out, rows), sums[..., rows[0] : rows[1]],
                rule, mask_grad,
            )  # fmt: skip
            parts = _cut(dq, rows), _cut(grads[0], keys), _cut(grads[1], keys)
            for into, x in zip((*parts, ring.mask(dmask, block, rows, keys)), found, strict=True):
                if into is not None and x is not None:
                    into.add_(x)
        if passing:
            came, back = passing()
            home = back or home
            for x, y in zip(grads, came, strict=False):
                x.add_(y)
        if not step and not ring.laid.hops[me]:
            home = grads
        passing = _pass_grads(ring, step, grads) if steps else None
        held = arriving() if arriving else held
    if passing:
        home = passing()[1] or home
    return (
        dq.to(q.dtype),
        # what came in one message shares its storage
        home[0].to(k.dtype, copy=True),
        home[1].to(v.dtype, copy=True),
        q.new_empty([0]) if dmask is None or mask is None else dmask.to(mask.dtype),
    )


# the ops -----------------------------------------------------------------------------------------

_INTEGERS = (
    "int[] q_starts, int[] q_sizes, int[] k_starts, int[] k_sizes, int mask_start, bool causal, "
    "bool exact, float scale, float drop, int seed, str group"
)


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
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dmask


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.rest, ctx.merged = inputs[4:-1], inputs[-1]


def _adjoint(ctx: Any, g: Tensor, _: Any) -> tuple[Any, ...]:
    mask_grad = ctx.needs_input_grad[3]
    ring = _Ring.of(*ctx.rest)
    if torch.is_grad_enabled() and not _torch.is_tracing() and not ring.drop:
        return *_recorded(ctx, g, ring), *[None] * 12
    *grads, dmask = backward_op(g, *ctx.saved_tensors, mask_grad, *ctx.rest)
    return *grads, dmask if mask_grad else None, *[None] * 12


def _recorded(ctx: Any, g: Tensor, ring: _Ring) -> list[Tensor | None]:
    """Gradients that have gradients themselves."""
    # nodes of their own: one operand may be the other, or be made from it
    given = [None if x is None else x.view_as(x) for x in ctx.saved_tensors[:4]]
    q, k, v, mask = given
    assert q is not None and k is not None and v is not None
    part = mask
    if mask is not None and mask.shape[-1] > 1:
        held = enumerate(ring.laid.held)
        blocks = (ring.mask(mask, r, (0, q.shape[2]), (0, keys)) for r, keys in held)
        part = torch.cat([x for x in blocks if x is not None], -1)
    out = attend_plainly(
        q, k, v, part, held=ring.laid.held, pieces=ring.whole_pieces(),
        scale=ring.scale, group=ring.group, merged=ctx.merged,
    )  # fmt: skip
    needs = ctx.needs_input_grad[:4]
    wanted = [x for x, need in zip(given, needs, strict=True) if need and x is not None]
    found = iter(torch.autograd.grad(out, wanted, g, create_graph=True, materialize_grads=True))
    return [next(found) if need else None for need in needs]


def _no_second(ctx: Any, *grads: Any) -> Any:
    raise UnsupportedOpError(
        "the second derivative of attention over sharded keys, compiled or with dropout; leave it "
        "out of st.compile, take dropout_p=0, or redistribute the keys to Replicate, under "
        "sdpa_kernel(SDPBackend.MATH)"
    )


attention_op = define(
    f"attention(Tensor q, Tensor k, Tensor v, Tensor? mask, {_INTEGERS}, str merged)"
    " -> (Tensor, Tensor)",
    _attention,
    _fake,
    _setup,
    _adjoint,
)
backward_op: Any = define(
    "attention_backward(Tensor g, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, "
    f"Tensor sums, bool mask_grad, {_INTEGERS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _attention_backward,
    _fake_backward,
    lambda ctx, inputs, output: None,
    _no_second,
)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    q_spans: Sequence[Span],
    k_spans: Sequence[Span],
    mask_start: int = 0,
    causal: bool,
    scale: float,
    exact: bool = True,
    drop: float = 0.0,
    seed: int = 0,
    group: str,
    merged: str,
) -> Tensor:
    """softmax(scale q k^T + mask) v over the keys of all ranks; twice without
    dropout.

    q (B, H, L, E), k (B, G, S, E), v (B, G, S, F): this rank's blocks. mask: whole along the keys
    from mask_start on, broadcasting to (B, H, L, keys). q_spans, k_spans: (start, size) of each
    ring rank's queries and keys, one or several for each rank, listed rank by rank. Over `merged`
    ranks hold other keys for the same queries; the result is then the same on all of them. exact:
    as of `blocks.Rule`. Sends each block once to each rank that needs it.
    """
    q_starts, q_sizes = zip(*q_spans, strict=True)
    k_starts, k_sizes = zip(*k_spans, strict=True)
    return attention_op(
        q, k, v, mask, q_starts, q_sizes, k_starts, k_sizes, mask_start, causal, exact, scale, drop,
        seed, group, merged,
    )[0]  # fmt: skip
