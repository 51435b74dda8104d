"""Inputs that a graph writes to: what it reads of them is a copy, made before it runs.

torch's compiler (2.13) lets a graph write at its end and keeps the input itself for backward, or
computes there anew from it: by then it holds what was written, and the gradient is another one. An
argument with a gradient it refuses in backward.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from .._torch import probe


class Before(NamedTuple):
    """An input of a graph, by its place, of which it takes a copy, with its gradient or without."""

    place: int
    graded: bool


def hoist(graph: fx.GraphModule, graded: set[fx.Node]) -> tuple[list[int], list[Before]]:
    """Let the graph begin by writing to such inputs what they hold, which are further inputs.

    Returns also the places of all inputs that it writes to. graded: the inputs whose gradients are
    asked for; where there are none nothing is done.
    """
    nodes = list(graph.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    first = next(n for n in nodes if n.op != "placeholder")
    modes, writes, found = _modes(nodes), written(nodes), []
    needed = _read(nodes, writes) if graded else {}
    for place, x in enumerate(inputs):
        if x not in needed:
            continue
        with_grad = x in graded and any(modes[w] for w in needed[x])
        with graph.graph.inserting_before(first):
            before = graph.graph.placeholder(f"before_{place}")
            before.meta["val"] = x.meta["val"]
        found.append((x, before, Before(place, with_grad)))
    for x, before, (_, with_grad) in found:
        with graph.graph.inserting_before(first):
            call = graph.graph.call_function
            if not with_grad:
                call(probe.SET_GRAD, (False,))
            call(torch.ops.aten.copy_.default, (x, before))
            if not with_grad:
                call(probe.SET_GRAD, (True,))
    places = [i for i, x in enumerate(inputs) if x in writes]
    return places, [b for _, _, b in found]


def values(before: Iterable[Before], given: Sequence[Tensor]) -> list[Tensor]:
    """The further inputs for a run, of those that a graph had before."""
    return [given[i].clone() if graded else given[i].detach().clone() for i, graded in before]


def overlap(given: Sequence[Tensor], places: Collection[int]) -> bool:
    """Whether an input that is written to, by its place, shares memory with another one.

    A program that torch 2.13 compiled for such inputs takes others for them, too, and is wrong.
    """
    if not places:
        return False
    at = [x.untyped_storage().data_ptr() if x.layout is torch.strided else 0 for x in given]
    there = [*filter(None, at)]
    if len(set(there)) == len(there):
        return False
    return any(at[i] and at.count(at[i]) > 1 for i in places)


def written(nodes: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """The nodes whose memory, or a view of it, is written to, and what writes."""
    found: dict[fx.Node, list[fx.Node]] = {}
    shared = _shared(nodes)
    for node in nodes:
        for x in _targets(node):
            for n in shared[x]:
                found.setdefault(n, []).append(node)
    return found


def _read(
    nodes: list[fx.Node], writes: dict[fx.Node, list[fx.Node]]
) -> dict[fx.Node, list[fx.Node]]:
    """Inputs that are written to and that the result depends on, and what writes."""
    shared = _shared(nodes)
    reads: dict[fx.Node, set[fx.Node]] = {}
    for node in nodes:
        there = [reads[k] for x in node.all_input_nodes for k in shared[x]]
        reads[node] = set[fx.Node]().union(*there)
        if node.op == "placeholder" and node in writes:
            reads[node].add(node)
        for x in _targets(node):
            for k in shared[x]:
                reads[k] |= reads[node]
    result = reads[nodes[-1]]
    return {x: at for x, at in writes.items() if x in result}


def _modes(nodes: Iterable[fx.Node]) -> dict[fx.Node, bool]:
    """Whether gradients are recorded at each node of a graph that begins with them."""
    mode, found = True, {}
    for node in nodes:
        if node.target is probe.SET_GRAD:
            mode = bool(node.args[0])
        found[node] = mode
    return found


def _shared(nodes: Iterable[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """What the result of each node may share memory with, itself among them."""
    shared: dict[fx.Node, set[fx.Node]] = {}
    for node in nodes:
        schema = getattr(node.target, "_schema", None)
        shared[node] = {node}
        if node.target is operator.getitem:
            shared[node] |= shared[node.all_input_nodes[0]]
        elif schema and any(r.alias_info for r in schema.returns):
            for x in _aliased(node, writes=False):
                shared[node] |= shared[x]
    return shared


def _targets(node: fx.Node) -> list[fx.Node]:
    """What a node writes to."""
    return _aliased(node, writes=True)


def _aliased(node: fx.Node, writes: bool) -> list[fx.Node]:
    """The arguments whose memory its schema speaks of: that it writes to, or any."""
    schema, found = getattr(node.target, "_schema", None), list[fx.Node]()
    for i, argument in enumerate(schema.arguments if schema else ()):
        if argument.alias_info is not None and (argument.alias_info.is_write or not writes):
            given: Any = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            fx.node.map_arg(given, found.append)
    return found
