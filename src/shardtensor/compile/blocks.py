"""The repeated blocks of a model, and one compiled program for all whose graphs are equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn


def blocks_of(model: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """The modules of these classes; without names the elements of every outermost ModuleList.

    Of elements that are only containers, as in a list of lists, their own; None is none.

    Raises ValueError where a name is no module's class.
    """
    if not names:
        blocks, inside = dict[nn.Module, None](), set[nn.Module]()
        for module in model.modules():
            if isinstance(module, nn.ModuleList) and module not in inside:
                blocks.update(dict.fromkeys(_called(module)))
                inside.update(module.modules())
        return list(blocks)
    found = [m for m in model.modules() if type(m).__name__ in names]
    missing = set(names) - {type(m).__name__ for m in found}
    if missing:
        raise ValueError(f"the model has no module of class {', '.join(sorted(missing))}")
    return found


def _called(container: nn.Module) -> Iterator[nn.Module]:
    """Its elements that have a forward, and of others theirs."""
    for m in container.children():
        if type(m).forward is nn.Module.forward:
            yield from _called(m)
        else:
            yield m


class Programs:
    """What torch.compile made of graphs, by what they compute."""

    def __init__(self) -> None:
        self.made: dict[Any, Callable[..., Any]] = {}

    def of(
        self, graph: fx.GraphModule, modes: tuple[Any, ...], options: dict[str, Any]
    ) -> Callable[..., Any]:
        """The compiled program of a graph, which an equal one may have made."""
        code = graph.graph.python_code("self")
        nodes = graph.graph.nodes
        # what the code does not say: the form of inputs, and tensors that are no inputs
        inputs = tuple(_form(n.meta.get("val")) for n in nodes if n.op == "placeholder")
        held = tuple((n.target, id(_held(graph, n))) for n in nodes if n.op == "get_attr")
        named = tuple(sorted((k, id(v)) for k, v in code.globals.items()))
        key = code.src, named, inputs, held, modes
        if key not in self.made:
            # forward: hooks of all modules are part of the graph already
            self.made[key] = _compiled(graph, options)
        return self.made[key]


def _compiled(graph: fx.GraphModule, options: dict[str, Any]) -> Callable[..., Any]:
    if options.get("backend", "inductor") != "inductor":
        return torch.compile(graph.forward, **options)
    values = [n.meta.get("val") for n in graph.graph.nodes]
    found = [x for x in values if isinstance(x, Tensor)]
    if any(x.is_complex() for x in found):
        # Inductor has no code for complex numbers: it calls torch's kernels, on copies. A step of
        # an FNO took 1.6 times as long as eagerly so, and takes 0.96 times by the graph alone
        return graph.forward
    if "mode" not in options and all(x.device.type == "cpu" for x in found):
        # it would run convolutions with the channels last, and turn what is sent between ranks to
        # that and back: a step of resnet18 took 1.00 times as long as eagerly, and takes 0.87
        given = {"layout_optimization": False, **options.get("options", {})}
        options = {**options, "options": given}
    return torch.compile(graph.forward, **options)


def _form(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.shape, x.stride(), x.dtype, x.device, x.requires_grad


def _held(graph: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value
