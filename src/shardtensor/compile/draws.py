"""Random ops of a traced graph as inputs of it: what makes them, in order, for each run.

Sharded draws are on the tape already; ops that draw plain tensors are found in the graph. Those
whose numbers depend on values of the graph have no such input and are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import UnsupportedOpError
from ..tensor.tape import DRAWN, Tape

Draw = Callable[[], Tensor]
# f(x, p, train) is x times what f gives for ones
_FACTORS = ("dropout", "feature_dropout")
# in place: the numbers of all elements are replaced
_FILLS = (
    "normal_", "uniform_", "bernoulli_", "exponential_", "random_", "cauchy_", "log_normal_",
    "geometric_",
)  # fmt: skip


def hoist(graph: fx.GraphModule, tape: Tape) -> list[Draw]:
    """Make inputs of the graph of what it draws; returns what makes them, in order."""
    nodes = list(graph.graph.nodes)
    last = [n for n in nodes if n.op == "placeholder"][-1:]
    found: list[Draw] = []
    for node in nodes:
        if node.op != "call_function" or not _draws(node):
            continue
        draw, put = _replaced(graph, node, tape)
        with graph.graph.inserting_after(last[-1]) if last else graph.graph.inserting_before():
            drawn = graph.graph.placeholder(f"random_numbers_{len(found)}")
        drawn.meta["val"] = node.meta["val"]
        last = [drawn]
        found.append(draw)
        with graph.graph.inserting_before(node):
            stands = put(drawn)
            if stands is drawn and any(map(_writes, node.users)):
                # else the graph would write to its input, too
                stands = graph.graph.call_function(torch.ops.aten.clone.default, (drawn,))
            node.replace_all_uses_with(stands)
        graph.graph.erase_node(node)
    return found


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _draws(node: fx.Node) -> bool:
    """Whether an op draws random numbers: attention is known to torch as one that does."""
    op: Any = node.target
    if op is DRAWN or torch.Tag.nondeterministic_seeded not in getattr(op, "tags", ()):
        return op is DRAWN
    given = {a.name: a.default_value for a in op._schema.arguments}
    given |= dict(zip(given, node.args, strict=False)) | node.kwargs
    rates = [given[k] for k in ("dropout_p", "dropout") if k in given]
    return not (
        (rates and rates[0] == 0) or any(given.get(k) is False for k in ("train", "training"))
    )


def _replaced(
    graph: fx.GraphModule, node: fx.Node, tape: Tape
) -> tuple[Draw, Callable[[fx.Node], fx.Node]]:
    """(what draws, what stands for the node given the drawn input)."""
    if node.target is DRAWN:
        number: Any = node.args[0]
        return tape.draws[number], lambda drawn: drawn
    op: Any = node.target
    name = op._schema.name.removeprefix("aten::")
    args: Any
    kwargs: Any
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _held(graph, n, tape))
    plain = graph.graph.call_function
    if name in _FILLS and not _tensors(args[1:], kwargs):
        make = _like(args[0])
        return (
            lambda: op(make(), *args[1:], **kwargs),
            lambda drawn: plain(torch.ops.aten.copy_.default, (node.args[0], drawn)),
        )
    if name in _FACTORS and not _tensors(args[1:], kwargs):
        make = _like(args[0])
        return (
            lambda: op(make().fill_(1), *args[1:], **kwargs),
            lambda drawn: plain(torch.ops.aten.mul.Tensor, (node.args[0], drawn)),
        )
    if name.endswith("_like") and not _tensors(args[1:], kwargs):
        make = _like(args[0])
        return lambda: op(make(), *args[1:], **kwargs), lambda drawn: drawn
    if not _tensors(args, kwargs):
        return lambda: op(*args, **kwargs), lambda drawn: drawn
    raise UnsupportedOpError(
        f"{name}: its random numbers depend on values of a compiled program; draw them apart from "
        "the values (torch.rand_like), or leave it out of st.compile"
    )


def _held(graph: fx.GraphModule, node: fx.Node, tape: Tape) -> Any:
    """What a node stands for: an object that the graph holds, or a tensor without values."""
    if node.op != "get_attr" or "val" in node.meta:
        return node.meta["val"]
    value = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    if isinstance(value, torch.Generator) and not tape.knows(value):
        raise UnsupportedOpError(
            "a random generator that a compiled program makes: make it before the call, or leave "
            "this part out of st.compile"
        )
    return value


def _tensors(*values: Any) -> bool:
    return any(isinstance(x, Tensor) for x in torch.utils._pytree.tree_leaves(values))


def _like(x: Tensor) -> Callable[[], Tensor]:
    shape, stride, dtype, device = x.shape, x.stride(), x.dtype, x.device
    return lambda: torch.empty_strided(shape, stride, dtype=dtype, device=device)
