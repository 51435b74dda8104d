"""PyTorch's operator database called wrongly: other dtypes, dims, sizes and numbers than an op takes.

What torch refuses must raise on all ranks, also where a shard has no rows to find it out by.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from campaigns import operands

# samples are drawn from those of a whole op
COST = 3
DTYPES = [
    torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.complex64, torch.complex128,
]  # fmt: skip
NUMBERS = [-9, -3, -1, 0, 1, 2, 5, 9, 0.5, -1.5, None, True, "some"]


def _resized(x: Tensor, rng: random.Random) -> Tensor:
    ways = [lambda: x.unsqueeze(0), lambda: x.unsqueeze(-1)]
    if x.ndim:
        d = rng.randrange(x.ndim)
        ways += [lambda: torch.cat([x, x], d)]
        if x.shape[d]:
            ways += [lambda: x.select(d, 0), lambda: x.narrow(d, 0, x.shape[d] - 1)]
    return rng.choice(ways)().detach().clone()


def _retyped(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype)


def mutated(leaves: list[Any], rng: random.Random) -> list[Any]:
    """The operands and numbers of a call, with a mistake."""
    leaves = list(leaves)
    tensors = [i for i, x in enumerate(leaves) if type(x) is Tensor and x.layout is torch.strided]
    numbers = [i for i, x in enumerate(leaves) if isinstance(x, int | float | str) or x is None]
    kind = rng.choice(["all", "one", "one", "size", "size", "number", "number"])
    if kind == "number" and numbers:
        leaves[rng.choice(numbers)] = rng.choice(NUMBERS)
    elif kind == "all" or (kind == "one" and len(tensors) < 2):
        dtype = rng.choice(DTYPES)
        for i in tensors:
            leaves[i] = _retyped(leaves[i], dtype)
    elif tensors:
        i = rng.choice(tensors)
        x = leaves[i]
        if kind == "one":
            leaves[i] = _retyped(x, rng.choice(DTYPES))
        else:
            leaves[i] = _resized(x, rng)
    return leaves


class Case(operands.Case):
    """A call with a mistake, and where its operands lie."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.way, self.outs, self.grad = "value", [], False

    def _sample(self, rng: random.Random) -> Any:
        self.way = "value"
        sample = super()._sample(rng)
        if sample is None:
            return None
        leaves, tree = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        sample.input, sample.args, sample.kwargs = pytree.tree_unflatten(mutated(leaves, rng), tree)
        return sample


def draw(rng: random.Random) -> Case:
    return Case(rng)
