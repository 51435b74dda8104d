"""A program: steps from one tensor to the next, and how its arguments lie; what draws them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any

import torch
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
