"""Inputs of a graph that meet shards: gradients are summed over ranks outside of it.

A dispatcher op may not return its argument, so `vary` in a graph would copy each weight at each
call, and keep the copy for backward.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx

from ..comm.sums import Identity, reduce, vary_op
from .writes import written


class Varied(NamedTuple):
    """Inputs of a graph, by their places, whose gradients are summed over a group."""

    places: tuple[int, ...]
    group: str


def hoist(graph: fx.GraphModule) -> list[Varied]:
    """Make inputs of what `vary` gives of inputs, further ones, in the order of what is returned.

    Not where the graph writes to one of these.
    """
    nodes = list(graph.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    places, writes, found = {n: i for i, n in enumerate(inputs)}, written(nodes), []
    for node in nodes:
        if node.op != "call_function" or node.target is not vary_op:
            continue
        xs, group = node.args
        alone = {node, *xs}.isdisjoint(writes) and places.keys() >= set(xs)
        if not alone or any(user.target is not operator.getitem for user in node.users):
            continue
        own = []
        for x in xs:
            with graph.graph.inserting_after(inputs[-1]):
                inputs.append(graph.graph.placeholder(f"varied_{len(inputs)}"))
            inputs[-1].meta["val"] = x.meta["val"]
            own.append(inputs[-1])
        for user in list(node.users):
            user.replace_all_uses_with(own[user.args[1]])
            graph.graph.erase_node(user)
        graph.graph.erase_node(node)
        found.append(Varied(tuple([places[x] for x in xs]), group))
    return found


def values(varied: Iterable[Varied], given: Sequence[Tensor]) -> list[Tensor]:
    """The further inputs for a run, of those that a graph had before."""
    return [y for places, group in varied for y in _Vary.apply(group, *[given[i] for i in places])]


class _Vary(Identity):
    """`vary`; where the graph brings no gradient nothing is sent, as no op was there."""

    @staticmethod
    def forward(ctx: Any, group: str, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.shapes = [x.shape for x in xs]
        return Identity.forward(ctx, group, *xs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        there = next((g for g in grads if g is not None), None)
        if there is None:
            return None, *grads
        parts = [
            there.new_zeros(shape) if g is None else g
            for g, shape in zip(grads, ctx.shapes, strict=True)
        ]
        return None, *reduce(parts, "sum", ctx.about)
