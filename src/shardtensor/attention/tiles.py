"""Neighbourhood attention of local queries to local keys, tile by tile, as a dispatcher op.

A tile is a box of queries of one residue class per dim and the box of keys that any of them sees: a
block of attention with a mask. Tiles with the same mask go together, as many as CHUNK scores allow,
and of small shards fewer, so that tiles take a share of memory as all else does.
Backward recomputes the scores of a tile; kept are queries, keys, values, the result and its
log-sum-exp. Measured on a CPU core (96^2 tokens, kernel 7; 20^3, 5; 8192, 513): backward takes 0.3
to 0.7 of the time of torch.utils.checkpoint around tiles, whose slices each have a gradient of the
size of the whole, at the same memory; plain SDPA of the tiles keeps 1 to 3 times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import _torch
from ..cache import unseen
from ..comm.define import define, run
from ..errors import UnsupportedOpError
from .blocks import CHUNK, Rule, backward, coarse_rows, forward, settled, wide
from .gradients import Given
from .merge import log_of
from .pieces import At, Pieced, box_shape, boxes, taken

# scores of tiles that go together: as many as queries have numbers over this, or LITTLE
SHARE, LITTLE = 4, 1 << 18
# entries of a tile's mask
MASK = 1 << 20
# queries that a tile has along each of 1, 2 or 3 dims, at least
LEAST = {1: 64, 2: 8, 3: 4}

Seen = tuple[tuple[int, int], ...]


class Line(NamedTuple):
    """The windows along one dim of `size` tokens."""

    size: int
    kernel: int
    stride: int
    dilation: int
    causal: bool

    def window(self, p: int, n: int) -> tuple[int, int]:
        """What token p of a residue class of n tokens sees: [start, stop) of the class."""
        group = p // self.stride * self.stride
        if self.causal:
            leader = min(group + self.stride, n) - 1
            return max(leader - self.kernel + 1, 0), p + 1
        leader = min(group + self.stride // 2, n - 1)
        start = min(max(leader - self.kernel // 2, 0), n - self.kernel)
        return start, start + self.kernel

    def members(self, r: int) -> int:
        """How many tokens residue class r has."""
        return len(range(r, self.size, self.dilation))

    def rows(self, start: int, stop: int) -> tuple[int, int]:
        """The range of rows that covers what queries [start, stop) see, not none of them."""
        d = self.dilation
        low, high = [], []
        # windows move on along a class: its first query sees the first row, its last the last
        for i in range(start, min(start + d, stop)):
            low.append(self.window(i // d, self.members(i % d))[0] * d + i % d)
        for i in range(max(stop - d, start), stop):
            high.append((self.window(i // d, self.members(i % d))[1] - 1) * d + i % d + 1)
        return min(low), max(high)


class Strip(NamedTuple):
    """Queries of one class along one dim, the keys that they see, and which of these each sees."""

    queries: slice
    keys: slice
    seen: Seen


def _slice(low: int, high: int, r: int, d: int, start: int) -> slice:
    """Tokens [low, high) of residue class r among local rows that begin at global row `start`."""
    return slice(low * d + r - start, (high - 1) * d + r - start + 1, d)


def _strips(line: Line, starts: tuple[int, int], queries: int, side: int) -> list[Strip]:
    d, found = line.dilation, []
    for r in range(d):
        first, stop = (-(-(i - r) // d) for i in (starts[0], starts[0] + queries))
        for a in range(first, stop, side):
            seen = [line.window(p, line.members(r)) for p in range(a, min(a + side, stop))]
            low, high = seen[0][0], seen[-1][1]
            queries_at = _slice(a, a + len(seen), r, d, starts[0])
            keys_at = _slice(low, high, r, d, starts[1])
            found.append(Strip(queries_at, keys_at, tuple((x - low, y - low) for x, y in seen)))
    return found


def _sides(lines: Sequence[Line]) -> list[int]:
    """How many queries a tile has along each dim: as many as a kernel, its mask below MASK."""
    found = [max(line.kernel, LEAST[len(lines)]) for line in lines]
    while prod(n * (n + line.kernel) for n, line in zip(found, lines, strict=True)) > MASK:
        widest = max(range(len(found)), key=lambda i: found[i])
        if found[widest] == 1:
            break  # one query sees more than that
        found[widest] = -(-found[widest] // 2)
    return found


@lru_cache(maxsize=32)
def _tiles(
    lines: tuple[Line, ...], starts: tuple[tuple[int, int], ...], shape: tuple[int, ...]
) -> dict[tuple[Seen, ...], list[tuple[At, At]]]:
    """(queries, keys) of all tiles, by their masks."""
    every = map(_strips, lines, starts, shape, _sides(lines))
    found: dict[tuple[Seen, ...], list[tuple[At, At]]] = {}
    for strips in product(*every):
        at = [(slice(None), *(s[i] for s in strips)) for i in range(2)]
        found.setdefault(tuple(s.seen for s in strips), []).append((at[0], at[1]))  # type: ignore[arg-type]
    return found


def _mask(seen: tuple[Seen, ...], like: Tensor) -> Tensor | None:
    """(1, 1, queries, keys) of a tile; None where every query sees every key."""
    if all(span == line[0] for line in seen for span in line):
        return None
    if like.is_cuda and type(like) is Tensor:
        # made on the host, whose copies wait for the device
        return _kept_mask(seen, str(like.device))
    return _made_mask(seen, like.device)


def _made_mask(seen: tuple[Seen, ...], device: torch.device | str) -> Tensor:
    whole = torch.ones([1, 1], dtype=torch.bool, device=device)
    for line in seen:
        start, stop = torch.tensor(line, device=device).unsqueeze(-1).unbind(1)
        at = torch.arange(line[-1][1], device=device)
        own = (at >= start) & (at < stop)
        whole = (whole[:, None, :, None] & own[:, None]).flatten(2).flatten(0, 1)
    return whole[None, None]


_kept_mask = lru_cache(maxsize=64)(unseen(_made_mask))


class Call(NamedTuple):
    """The integers of one call, as the dispatcher takes them."""

    windows: Sequence[int]  # a Line for each dim, flat
    starts: Sequence[int]  # of queries and of keys, for each dim
    scale: float

    def lines(self) -> tuple[Line, ...]:
        found = [Line(*self.windows[i : i + 5]) for i in range(0, len(self.windows), 5)]  # type: ignore[arg-type]
        return tuple(x._replace(causal=bool(x.causal)) for x in found)

    def batches(self, q: Tensor) -> Iterator[tuple[Tensor | None, tuple[At, ...], tuple[At, ...]]]:
        """(mask, queries, keys) of tiles that are computed together; none where q is empty."""
        if not q.numel():
            return
        starts = tuple(zip(self.starts[::2], self.starts[1::2], strict=True))
        most = min(CHUNK, max(LITTLE, q.numel() // SHARE))
        for seen, tiles in _tiles(self.lines(), starts, tuple(q.shape[1:-2])).items():
            scores = q.shape[0] * q.shape[-2] * prod(len(s) * s[-1][1] for s in seen)
            n = max(1, most // scores)
            mask = _mask(seen, q)
            for i in range(0, len(tiles), n):
                queries, keys = zip(*tiles[i : i + n], strict=True)
                yield mask, queries, keys


def _taken(x: Pieced, at: Sequence[At]) -> Tensor:
    """Tiles (B, *spatial, H, E) of x as one (tiles * B, H, L, E)."""
    return torch.cat([taken(x, a) for a in at]).flatten(1, -3).transpose(1, 2)


def _parts(x: Tensor, like: Pieced, at: Sequence[At]) -> Iterator[tuple[Tensor, Tensor]]:
    """(place in `like`, its part of x) of every tile; the reverse of `_taken`."""
    for a, part in zip(at, x.transpose(1, 2).split(like.shape[0]), strict=True):
        box = part.reshape(box_shape(like, a))
        for into, where in boxes(like, a):
            yield into, box[where]


def attended(q: Tensor, k: Pieced, v: Pieced, *integers: Any) -> tuple[Tensor, Tensor]:
    """(result, log-sum-exp) of neighbourhood attention, tile by tile."""
    call = Call(*integers)
    out, lse = _fake(q, k, v)
    rule = Rule(call.scale)
    for mask, queries, keys in call.batches(q):
        found = forward(_taken(q, queries), _taken(k, keys), _taken(v, keys), mask, rule)
        total = log_of(found[1])
        for into, part in (
            *_parts(found[0], out, queries), *_parts(total.unsqueeze(-1), lse, queries)
        ):  # fmt: skip
            into.copy_(part)
    return out, lse


def _attend_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *integers: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of neighbourhood attention, tile by tile."""
    dk, dv = (torch.zeros_like(x, dtype=wide(x.dtype)) for x in (k, v))
    dq = add_gradients(g, q, k, v, out, lse, dk, dv, Call(*integers))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def add_gradients(
    g: Tensor, q: Tensor, k: Pieced, v: Pieced, out: Tensor, lse: Tensor, dk: Pieced, dv: Pieced,
    call: Call,
) -> Tensor:  # fmt: skip
    """The gradient of q, tile by tile; those of k and v are added to dk and dv."""
    rule = Rule(call.scale)
    dq = torch.zeros_like(q, dtype=wide(q.dtype))
    for mask, queries, keys in call.batches(q):
        operands = _taken(q, queries), _taken(k, keys), _taken(v, keys)
        found = _taken(lse, queries).squeeze(-1)
        sums = torch.stack((found, torch.ones_like(found), found))
        if coarse_rows(found) is not None:
            sums = settled(forward(*operands, mask, rule)[1])
        # no name for it: what is taken of g and out goes with the call
        grads = backward(
            Given(_taken(g, queries), *operands, mask, _taken(out, queries), sums), rule, False
        )
        for x, into, at in zip(grads[:3], (dq, dk, dv), (queries, keys, keys), strict=True):
            # tiles share keys
            for place, part in _parts(x, into, at):
                place.add_(part)
    return dq.to(q.dtype)


def by_autograd(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """The same, differentiable any number of times; keeps all scores."""
    out = q.new_zeros([*q.shape[:-1], v.shape[-1]])
    gqa = q.shape[-2] != k.shape[-2]
    with sdpa_kernel(SDPBackend.MATH):
        for mask, queries, keys in call.batches(q):
            operands = _taken(q, queries), _taken(k, keys), _taken(v, keys)
            part = F.scaled_dot_product_attention(*operands, mask, scale=call.scale, enable_gqa=gqa)
            for into, x in _parts(part, out, queries):
                into.copy_(x)
    if not q.numel():
        # every derivative asks for those of keys and values, which others may have sent
        out = out + sum(x.exp().sum() for x in (q, k, v)) * 0
    return out


# the op ------------------------------------------------------------------------------------------


def _fake(q: Tensor, k: Pieced, v: Pieced, *integers: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty([*q.shape[:-1], v.shape[-1]])
    return out, q.new_empty([*q.shape[:-1], 1], dtype=wide(q.dtype))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.call = Call(*inputs[3:])


def _adjoint(ctx: Any, g: Tensor, _: Any) -> tuple[Any, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    if torch.is_grad_enabled() and not _torch.is_tracing():
        needs = ctx.needs_input_grad[:3]
        # nodes of their own: one operand may be the other, or be made from it
        q, k, v = (x.view_as(x) for x in (q, k, v))
        wanted = [x for x, need in zip((q, k, v), needs, strict=True) if need]
        y = by_autograd(q, k, v, ctx.call)
        found = iter(torch.autograd.grad(y, wanted, g, create_graph=True))
        return *(next(found) if need else None for need in needs), None, None, None
    return *run(_backward_op, g, q, k, v, out, lse, *ctx.call), None, None, None


def _no_second(ctx: Any, *grads: Any) -> Any:
    raise UnsupportedOpError(
        "the second derivative of compiled neighbourhood attention; leave it out of st.compile"
    )


_INTEGERS = "int[] windows, int[] starts, float scale"
_op: Callable[..., tuple[Tensor, Tensor]] = define(
    f"neighborhood(Tensor q, Tensor k, Tensor v, {_INTEGERS}) -> (Tensor, Tensor)",
    attended,
    _fake,
    _setup,
    _adjoint,
    lambda q, k, v, *integers: (by_autograd(q, k, v, Call(*integers)), None),
)
_backward_op: Any = define(
    "neighborhood_backward(Tensor g, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_INTEGERS}) -> (Tensor, Tensor, Tensor)",
    _attend_backward,
    lambda g, q, k, v, *rest: tuple(torch.empty_like(x) for x in (q, k, v)),
    lambda ctx, inputs, output: None,
    _no_second,
    _no_second,
)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lines: Sequence[Line],
    starts: Sequence[Sequence[int]],
    scale: float,
) -> Tensor:
    """softmax(scale q k^T) v over the windows of `lines`; q, k, v (B, *spatial, H or G, E or F).

    starts: for each spatial dim the global rows at which q and k start. Every row that a window
    needs must be there.
    """
    return run(_op, q, k, v, *call_of(lines, starts, scale))[0]


def call_of(lines: Sequence[Line], starts: Sequence[Sequence[int]], scale: float) -> Call:
    """A call as the dispatcher takes it."""
    return Call(
        [int(i) for line in lines for i in line], [i for pair in starts for i in pair], scale
    )
