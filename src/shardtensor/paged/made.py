"""What a part makes that does not meet others, of rows of its own and beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..containers import flatten
from ..ranks.own import random_states, restore
from ..settings import setting
from ..tensor import ShardTensor
from ..tensor.random import matching
from ..tensor.redistribute import local_of
from .meeting import Meeting, check_nodes
from .parts import Cut, cut_of
from .ranks import state

Pairs = list[tuple[Tensor, Tensor]]


@dataclass
class Made:
    """A part: the model that made it, what that was given, and gave, flat, with its form."""

    model: nn.Module
    leaves: list[Any]
    outputs: list[Any]
    tree: Any

    @property
    def sources(self) -> list[Tensor]:
        """Where gradients end: what was given, here, and trained parameters."""
        given = [local_of(x) for x in self.leaves if isinstance(x, Tensor)]
        return [*given, *(p for p in self.model.parameters() if p.requires_grad)]

    def gradients(self, pairs: Pairs) -> list[Tensor | None]:
        """Those of the sources, by pairs of a result and its cotangent."""
        asked = [x for x in self.sources if x.requires_grad]
        if not pairs or not asked:
            return [None] * len(self.sources)
        results, cotangents = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(results, asked, cotangents, allow_unused=True))
        return [next(found) if x.requires_grad else None for x in self.sources]


def made_by(
    model: nn.Module, call: Callable[..., Any], tree: Any, leaves: list[Any], counts: Any = None
) -> Made:
    """What a part makes of its rows with call, which calls the model; counts: of a trial.

    Raises ValueError for what parts that do not meet may not do.
    """
    given = [x for x in leaves if isinstance(x, Tensor)]
    before = [state(x) for x in given]
    args, kwargs = tree.of(leaves)
    with counts or Meeting(0):
        outputs = call(*args, **kwargs)
    if any(isinstance(b, ShardTensor) for b in model.buffers()):
        raise ValueError("a buffer of rows that other parts have, too")
    if [state(x) for x in given] != before:
        raise ValueError("the model writes to rows that other parts have, too")
    return Made(model, leaves, *flatten(outputs))


def tried(
    make: Callable[[Meeting], Made], axes: int, back: bool
) -> tuple[list[dict[int, Cut]], Meeting, Made]:
    """(how each sharded output is cut, what was made, by what) of a part, on fake tensors.

    back: whether backward runs, too. Raises ValueError for what parts may not do, RankError for
    what needs others.
    """
    counts, begin = Meeting(axes), random_states()
    # what is drawn does not matter here; parts draw what one device does, or must meet
    with setting("any draw", matching()), setting("matching", False):
        made = make(counts)
        tensors = [local_of(y) for y in made.outputs if isinstance(y, Tensor)]
        ends = [y for y in tensors if y.requires_grad]
        if back:
            check_nodes(ends, made.sources)
            made.gradients([(y, torch.zeros_like(y)) for y in ends])
    restore(begin)
    return [cut_of(y) for y in made.outputs if isinstance(y, ShardTensor)], counts, made
