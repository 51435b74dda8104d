"""Random programs: chains of ops on randomly sharded tensors, for hypothesis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as some
from torch import Tensor
from torch.distributed.tensor import Placement, Replicate, Shard

from shardtensor.ranks.testing import On

MESHES = [(1,), (2,), (3,), (4,), (5,), (2, 2), (2, 1), (1, 3), (3, 2), (2, 2, 2)]
MOST = 400  # elements; a chain must not grow without bound


@dataclass
class Program:
    """fn(*args) and how its args lie on the mesh; `text` is what a failure prints."""

    mesh: tuple[int, ...]
    args: list[Tensor] = field(default_factory=list)
    places: list[On | None] = field(default_factory=list)
    steps: list[tuple[str, Callable[..., Tensor]]] = field(default_factory=list)

    def __call__(self, *args: Tensor) -> Tensor:
        x = args[0]
        for _, step in self.steps:
            x = step(x, args)
        return x

    def __repr__(self) -> str:
        given = [f"{tuple(a.shape)} {p}" for a, p in zip(self.args, self.places, strict=True)]
        return f"mesh {self.mesh}, args {given}, steps {[name for name, _ in self.steps]}"


@some.composite
def shard_sizes(draw: Any, n: int, parts: int) -> list[int]:
    """Any sizes of `parts` shards of a dim of n rows, empty ones too."""
    cuts = sorted(draw(some.lists(some.integers(0, n), min_size=parts - 1, max_size=parts - 1)))
    ends = [0, *cuts, n]
    return [b - a for a, b in pairwise(ends)]


@some.composite
def places(draw: Any, shape: tuple[int, ...], mesh: tuple[int, ...]) -> On:
    """Any placement of a tensor; a dim may be sharded by several mesh axes."""
    found: list[Placement] = []
    parts: dict[int, int] = {}
    for axis in mesh:
        d = draw(some.integers(-1, len(shape) - 1)) if shape else -1
        found.append(Replicate() if d < 0 else Shard(d))
        if d >= 0:
            parts[d] = parts.get(d, 1) * axis
    if draw(some.booleans()):
        return On(found)
    return On(found, {d: draw(shard_sizes(shape[d], n)) for d, n in parts.items()})


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    """Well separated, none near zero: no kink or tie decides a gradient."""
    g = torch.Generator().manual_seed(seed)
    n = prod(shape)
    values = (torch.randperm(n, generator=g) + 0.5 - n / 2) / max(1, n) * 4
    return values.to(torch.float64).reshape(shape)


# Each maker draws the arguments of one op for a tensor like x: (text, step), or None if it has none

Maker = Callable[[Any, Tensor, Program], tuple[str, Callable[..., Tensor]] | None]
MAKERS: dict[str, Maker] = {}


def maker(fn: Maker) -> Maker:
    MAKERS[fn.__name__] = fn
    return fn


def operand(draw: Any, shape: tuple[int, ...], program: Program) -> int:
    """A second operand, plain or sharded in its own way: its place among the arguments."""
    program.args.append(numbers(shape, len(program.args)))
    plain = draw(some.booleans())
    program.places.append(None if plain else draw(places(shape, program.mesh)))
    return len(program.args) - 1


def some_dim(draw: Any, x: Tensor) -> int:
    return draw(some.integers(-x.ndim, x.ndim - 1))


@maker
def unary(draw: Any, x: Tensor, program: Program) -> Any:
    name = draw(some.sampled_from(["sin", "tanh", "sigmoid", "exp", "square", "neg", "cos"]))
    return name, lambda x, args: getattr(torch, name)(x * 0.7)


@maker
def binary(draw: Any, x: Tensor, program: Program) -> Any:
    shape = tuple(draw(some.sampled_from([n, 1])) for n in x.shape)
    shape = shape[draw(some.integers(0, x.ndim)) :]
    i = operand(draw, shape, program)
    name = draw(some.sampled_from(["add", "mul", "sub", "maximum", "where"]))
    if name == "where":
        return f"where {shape}", lambda x, args: torch.where(args[i] > 0.1, x, args[i])
    return f"{name} {shape}", lambda x, args: getattr(torch, name)(x, args[i])


@maker
def reduction(draw: Any, x: Tensor, program: Program) -> Any:
    d, keep = some_dim(draw, x), draw(some.booleans())
    names = ["sum", "mean", "amax", "logsumexp", "norm", "prod", "var", "median", "nansum"]
    name = draw(some.sampled_from(names))
    if not x.shape[d] or (name == "var" and x.shape[d] < 2):
        return None
    if name == "median":
        return f"median {d}", lambda x, args: x.median(d).values
    return f"{name} {d} {keep}", lambda x, args: getattr(torch, name)(x, dim=d, keepdim=keep)


@maker
def along(draw: Any, x: Tensor, program: Program) -> Any:
    d = some_dim(draw, x)
    if not x.shape[d]:
        return None
    ops: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax": lambda x: x.softmax(d),
        "log_softmax": lambda x: x.log_softmax(d),
        "cumsum": lambda x: x.cumsum(d),
        "cumprod": lambda x: x.cumprod(d),
        "flip": lambda x: x.flip(d),
        "diff": lambda x: torch.cat([x, x], d).diff(dim=d),
        "sort": lambda x: x.sort(d).values,
        "topk": lambda x: x.topk(max(1, x.shape[d] // 2), d).values,
        "normalize": lambda x: F.normalize(x, dim=d),
        "logcumsumexp": lambda x: x.logcumsumexp(d),
        "cummax": lambda x: x.cummax(d).values,
    }
    name = draw(some.sampled_from(sorted(ops)))
    return f"{name} {d}", lambda x, args: ops[name](x)


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
def linear(draw: Any, x: Tensor, program: Program) -> Any:
    out = draw(some.integers(1, 4))
    i = operand(draw, (out, x.shape[-1]), program)
    return f"linear {out}", lambda x, args: F.linear(x, args[i])


@maker
def product(draw: Any, x: Tensor, program: Program) -> Any:
    if x.ndim < 2:
        return None
    i = operand(draw, tuple(x.shape), program)
    return "matmul", lambda x, args: x @ args[i].transpose(-1, -2)


@maker
def convolved(draw: Any, x: Tensor, program: Program) -> Any:
    if x.ndim not in (3, 4) or 0 in x.shape:
        return None
    kernel = [draw(some.integers(1, 3)) for _ in x.shape[2:]]
    stride = [draw(some.integers(1, 2)) for _ in kernel]
    i = operand(draw, (2, x.shape[1], *kernel), program)
    conv = F.conv1d if x.ndim == 3 else F.conv2d
    pads = [draw(some.integers(0, k // 2)) for k in kernel]
    if any(n + 2 * p < k for n, p, k in zip(x.shape[2:], pads, kernel, strict=True)):
        return None
    name = f"conv {kernel} stride {stride} padding {pads}"
    return name, lambda x, args: conv(x, args[i], stride=stride, padding=pads)


@maker
def pooled(draw: Any, x: Tensor, program: Program) -> Any:
    if x.ndim not in (3, 4) or 0 in x.shape or min(x.shape[2:]) < 2:
        return None
    name = draw(some.sampled_from(["max_pool", "avg_pool", "adaptive_avg_pool", "interpolate"]))
    n = draw(some.integers(2, 3))
    if name == "interpolate":
        mode = "linear" if x.ndim == 3 else "bilinear"
        return f"{name} {n}", lambda x, args: F.interpolate(x, scale_factor=n, mode=mode)
    fn = getattr(F, f"{name}{x.ndim - 2}d")
    return f"{name} {n}", lambda x, args: fn(x, n if "adaptive" in name else 2)


@maker
def normed(draw: Any, x: Tensor, program: Program) -> Any:
    if x.ndim < 3 or prod(x.shape[1:]) < 2 or 0 in x.shape or x.numel() < 4:
        return None
    name = draw(some.sampled_from(["layer_norm", "group_norm", "batch_norm"]))
    if name == "layer_norm":
        if x.shape[-1] < 2:
            return None
        return name, lambda x, args: F.layer_norm(x, x.shape[-1:], eps=0.1)
    if name == "group_norm":
        return name, lambda x, args: F.group_norm(x, 1, eps=0.1)
    if x.numel() // x.shape[1] < 2:
        return None
    # contiguous: torch 2.13 on a CPU gives a wrong gradient of a transposed input
    return name, lambda x, args: F.batch_norm(x.contiguous(), None, None, training=True, eps=0.1)


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
def in_place(draw: Any, x: Tensor, program: Program) -> Any:
    shape = tuple(draw(some.sampled_from([n, 1])) for n in x.shape)
    i = operand(draw, shape, program)
    name = draw(some.sampled_from(["add_", "mul_", "clamp_", "sigmoid_", "copy_"]))

    def step(x: Tensor, args: Any) -> Tensor:
        y = x.clone()
        if name == "clamp_":
            return y.clamp_(-0.9, 0.9)
        return y.sigmoid_() if name == "sigmoid_" else getattr(y, name)(args[i])

    return f"{name} {shape}", step


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
def compared(draw: Any, x: Tensor, program: Program) -> Any:
    i = operand(draw, tuple(x.shape[-1:]), program)
    name = draw(some.sampled_from(["cdist", "einsum", "lerp", "cross_entropy"]))
    if name == "cdist" and x.ndim >= 2 and x.shape[-1]:
        return name, lambda x, args: torch.cdist(x * 1.01, x.flip(-2).detach() + 0.3)
    if name == "einsum":
        return name, lambda x, args: torch.einsum("...i,i->...i", x, args[i])
    if name == "lerp":
        return name, lambda x, args: torch.lerp(x, args[i], 0.3)
    if x.ndim < 2 or not x.shape[1] or 0 in x.shape:
        return None
    target = torch.zeros((x.shape[0], *x.shape[2:]), dtype=torch.int64)
    return name, lambda x, args: F.cross_entropy(x, target, reduction="none")


@maker
def masked(draw: Any, x: Tensor, program: Program) -> Any:
    if draw(some.booleans()):
        return "masked_fill", lambda x, args: x.masked_fill(x > 0.3, 0.5)
    return "tril", (lambda x, args: x.tril(-1)) if x.ndim > 1 else (lambda x, args: x * 2)


@maker
def spectrum(draw: Any, x: Tensor, program: Program) -> Any:
    d = some_dim(draw, x)
    if not x.shape[d]:
        return None
    return f"rfft {d}", lambda x, args: torch.view_as_real(torch.fft.rfft(x, dim=d)).sum(-1)


@maker
def redistributed(draw: Any, x: Tensor, program: Program) -> Any:
    place = draw(places(tuple(x.shape), program.mesh))

    def step(x: Any, args: Any) -> Tensor:
        if not hasattr(x, "redistribute"):
            return x
        return x.redistribute(placements=place.placements, sizes=place.sizes)

    return f"to {place}", step


@some.composite
def programs(draw: Any) -> Program:
    """A program whose every intermediate is small and finite."""
    mesh = draw(some.sampled_from(MESHES))
    shape = tuple(draw(some.lists(some.integers(1, 6), min_size=1, max_size=4)))
    program = Program(mesh)
    program.args.append(numbers(shape, 7))
    program.places.append(draw(places(shape, mesh)))
    x = program.args[0]
    for _ in range(draw(some.integers(1, 6))):
        if not x.ndim:
            break
        make = MAKERS[draw(some.sampled_from(sorted(MAKERS)))]
        made = make(draw, x, program)
        if made is None:
            continue
        try:
            y = made[1](x, program.args)
        except RuntimeError:
            # what plain PyTorch refuses
            continue
        if y.numel() > MOST or (y.numel() and not y.abs().max() < 1e3):
            continue
        program.steps.append(made)
        x = y
    return program
