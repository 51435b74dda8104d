"""Steps that move, repeat or write elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as some
from torch import Tensor

from .program import Program, maker, operand, places, some_dim


@maker
def roll(draw: Any, x: Tensor, program: Program) -> Any:
    d, by = some_dim(draw, x), draw(some.integers(-9, 9))
    return f"roll {by} {d}", lambda x, args: x.roll(by, d)


@maker
def sliced(draw: Any, x: Tensor, program: Program) -> Any:
    d = some_dim(draw, x)
    a, b = (draw(some.integers(-x.shape[d] - 1, x.shape[d] + 1)) for _ in range(2))
    step = draw(some.integers(1, 3))
    index = [slice(None)] * x.ndim
    index[d] = slice(a, b, step)
    return f"slice {d} {a}:{b}:{step}", lambda x, args: x[tuple(index)]


@maker
def picked(draw: Any, x: Tensor, program: Program) -> Any:
    d = some_dim(draw, x)
    if not x.shape[d]:
        return None
    rows = draw(some.lists(some.integers(0, x.shape[d] - 1), min_size=1, max_size=5))
    if draw(some.booleans()) and len(rows) == 1:
        return f"select {d} {rows[0]}", lambda x, args: x.select(d, rows[0])
    return f"index_select {d} {rows}", lambda x, args: x.index_select(d, torch.tensor(rows))


@maker
def permuted(draw: Any, x: Tensor, program: Program) -> Any:
    order = draw(some.permutations(range(x.ndim)))
    return f"permute {order}", lambda x, args: x.permute(*order)


@maker
def reshaped(draw: Any, x: Tensor, program: Program) -> Any:
    a = draw(some.integers(0, x.ndim - 1))
    b = draw(some.integers(a, x.ndim - 1))
    if draw(some.booleans()):
        return f"flatten {a} {b}", lambda x, args: x.flatten(a, b)
    n = x.shape[a]
    factors = [k for k in range(1, n + 1) if n % k == 0]
    if not factors:
        return None
    k = draw(some.sampled_from(factors))
    return f"unflatten {a} {k}", lambda x, args: x.unflatten(a, (k, n // k))


@maker
def joined(draw: Any, x: Tensor, program: Program) -> Any:
    d = some_dim(draw, x)
    shape = list(x.shape)
    shape[d] = draw(some.integers(0, 3))
    i = operand(draw, tuple(shape), program)
    if draw(some.booleans()):
        return f"cat {shape} {d}", lambda x, args: torch.cat([x, args[i]], d)
    return f"stack {d}", lambda x, args: torch.stack([x, x * 2], d)


@maker
def padded(draw: Any, x: Tensor, program: Program) -> Any:
    if x.ndim < 3:
        return None
    mode = draw(some.sampled_from(["constant", "reflect", "replicate", "circular"]))
    n = x.shape[-1]
    most = {"constant": 3, "reflect": n - 1, "replicate": 3, "circular": n}[mode]
    if most < 0 or not n or x.ndim > 4 or 0 in x.shape:
        return None
    left, right = (draw(some.integers(0, min(3, most))) for _ in range(2))
    pads = [left, right] if x.ndim == 3 else [left, right, 0, 0]
    return f"pad {mode} {pads}", lambda x, args: F.pad(x, pads, mode)


@maker
def gathered(draw: Any, x: Tensor, program: Program) -> Any:
    d = some_dim(draw, x)
    if not x.shape[d]:
        return None
    g = torch.Generator().manual_seed(draw(some.integers(0, 99)))
    index = torch.randint(0, x.shape[d], x.shape, generator=g)
    if draw(some.booleans()):
        return f"gather {d}", lambda x, args: x.gather(d, index)
    return f"scatter_add {d}", lambda x, args: (x * 1).scatter_add(d, index, x)


@maker
def written(draw: Any, x: Tensor, program: Program) -> Any:
    """Rows, blocks and elements written into a copy, in place and not."""
    d = some_dim(draw, x)
    if not x.shape[d]:
        return None
    rows = sorted(draw(some.sets(some.integers(0, x.shape[d] - 1), min_size=1, max_size=4)))
    at = torch.tensor(rows)
    shape = list(x.shape)
    shape[d] = len(rows)
    i = operand(draw, tuple(shape), program)
    a, b = sorted((draw(some.integers(0, x.shape[d])), draw(some.integers(0, x.shape[d]))))
    block = [slice(None)] * x.ndim
    block[d] = slice(a, b)

    def setitem(x: Tensor, args: Any) -> Tensor:
        y = x * 1
        y[tuple(block)] = args[i].sum()
        return y

    def moved(x: Tensor, args: Any) -> Tensor:
        y = x.movedim(d, 0).clone()
        y[at] = args[i].movedim(d, 0)
        return y

    ops: dict[str, Callable[[Tensor, Any], Tensor]] = {
        "index_copy": lambda x, args: x.index_copy(d, at, args[i]),
        "index_add": lambda x, args: x.index_add(d, at, args[i]),
        "index_fill": lambda x, args: x.index_fill(d, at, 0.5),
        "setitem": setitem,
        "index_put": moved,
        "narrow_mul": lambda x, args: x.narrow(d, a, b - a) * 2,
    }
    name = draw(some.sampled_from(sorted(ops)))
    return f"{name} {d} {rows} {a}:{b}", ops[name]


@maker
def unfolded(draw: Any, x: Tensor, program: Program) -> Any:
    d = some_dim(draw, x)
    size, step = draw(some.integers(1, 4)), draw(some.integers(1, 3))
    if size > x.shape[d]:
        return None
    return f"unfold {d} {size} {step}", lambda x, args: x.unfold(d, size, step)


@maker
def repeated(draw: Any, x: Tensor, program: Program) -> Any:
    d, n = some_dim(draw, x), draw(some.integers(1, 3))
    if draw(some.booleans()):
        return f"repeat_interleave {n} {d}", lambda x, args: x.repeat_interleave(n, d)
    times = [1] * x.ndim
    times[d] = n
    return f"repeat {times}", lambda x, args: x.repeat(times)


@maker
def split(draw: Any, x: Tensor, program: Program) -> Any:
    d, n = some_dim(draw, x), draw(some.integers(1, 3))
    if not x.shape[d]:
        return None

    def step(x: Tensor, args: Any) -> Tensor:
        parts = x.chunk(n, d)
        return torch.cat([p * (k + 1) for k, p in enumerate(parts)][::-1], d)

    return f"chunk {n} {d}", step


@maker
def masked(draw: Any, x: Tensor, program: Program) -> Any:
    if draw(some.booleans()):
        return "masked_fill", lambda x, args: x.masked_fill(x > 0.3, 0.5)
    return "tril", (lambda x, args: x.tril(-1)) if x.ndim > 1 else (lambda x, args: x * 2)


@maker
def redistributed(draw: Any, x: Tensor, program: Program) -> Any:
    place = draw(places(tuple(x.shape), program.mesh))

    def step(x: Any, args: Any) -> Tensor:
        if not hasattr(x, "redistribute"):
            return x
        return x.redistribute(placements=place.placements, sizes=place.sizes)

    return f"to {place}", step
