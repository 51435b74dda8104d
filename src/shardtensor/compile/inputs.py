"""What a compiled program is given: local tensors, and what tells the inputs of graphs apart."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..comm.deferred import Twin, slot_of
from ..comm.sums import vary
from ..dispatch.axes import as_shards
from ..errors import UnsupportedOpError
from ..later import dt
from ..spec import Spec
from ..tensor import ShardTensor, wrap


class Own:
    """A module's parameters and buffers as inputs of a graph.

    A parameter whose gradient is summed later, by `parallelize` or FSDP2, is an input twice: where
    it meets a shard it is the second, which leaves the sum to its slot.
    """

    def __init__(self, state: dict[str, Tensor], parts: list[tuple[Any, Tensor]]) -> None:
        self.names = list(state)
        self.seen = [seen for seen, _ in parts]
        self.tensors = [x for _, x in parts]
        self.slots: dict[str, tuple[Any, Tensor]] = {}
        if torch.is_grad_enabled():
            for name, p, x in zip(self.names, state.values(), self.tensors, strict=True):
                slot = slot_of(p)
                if slot is not None and x.requires_grad:
                    self.slots[name] = slot, x

    def key(self) -> tuple[Any, ...]:
        """What a graph is for."""
        groups = tuple((name, slot.group) for name, (slot, _) in self.slots.items())
        return key_of(self.tensors), tuple(self.seen), groups

    def doubles(self) -> list[Tensor]:
        """What to trace the second inputs with."""
        return [x.detach().requires_grad_() for _, x in self.slots.values()]

    def inside(self, given: Iterator[Tensor]) -> dict[str, Tensor]:
        """The state that a traced module has, of the first inputs of a graph."""
        local = {name: next(given) for name in self.names}
        for name, (slot, _) in self.slots.items():
            local[name]._shardtensor_slot = Twin(slot.group, next(given))  # type: ignore[attr-defined]
        return {
            name: x if seen is None else wrap(x, *seen)
            for (name, x), seen in zip(local.items(), self.seen, strict=True)
        }

    def used(self, graph: GraphModule, written: Container[Node]) -> list[str]:
        """The names whose second inputs the graph needs; it has no others afterwards.

        written: the nodes that the graph writes to.
        """
        inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
        first = dict(zip(self.names, inputs, strict=False))
        found = []
        for name, node in zip(self.slots, inputs[len(self.names) :], strict=False):
            if node.users and first[name] in written:
                raise UnsupportedOpError(
                    f"a compiled program that writes to {name}, whose gradient parallelize sums: "
                    "write to parameters outside of st.compile"
                )
            if node.users:
                found.append(name)
            else:
                graph.graph.erase_node(node)
        return found

    def twins(self, names: list[str]) -> list[Tensor]:
        """The second inputs for a run."""
        found = []
        for slot, x in map(self.slots.__getitem__, names):
            value = slot.use(x)
            # nobody sums any longer
            found.append(vary([x], slot.group)[0] if value is None else value)
        return found


def seen(x: Any) -> tuple[Spec, Any] | None:
    return (x._spec, x._strides) if isinstance(x, ShardTensor) else None


def parted(x: Any) -> tuple[Any, Any]:
    return seen(x), x.to_local() if isinstance(x, ShardTensor) else x


def parts_of(state: dict[str, Tensor], leaves: list[Any]) -> list[tuple[Any, Tensor]]:
    """(spec and strides, local tensor) of parameters and buffers beside activations."""
    meshes = (x._spec.mesh for x in leaves if isinstance(x, ShardTensor))
    mesh = next(meshes, None) if any(isinstance(x, dt.DTensor) for x in state.values()) else None
    return [parted(as_shards(x, mesh) if isinstance(x, dt.DTensor) else x) for x in state.values()]


def key_of(leaves: Any) -> tuple[Any, ...]:
    return tuple(
        (x.shape, x.stride(), x.dtype, x.device, x.requires_grad) if isinstance(x, Tensor)
        else _value(x)
        for x in leaves
    )  # fmt: skip


def _value(x: Any) -> Any:
    """What tells one argument from another: 1, 1.0 and True are equal, but give other dtypes."""
    if isinstance(x, float | complex):
        return type(x), repr(x)
    try:
        hash(x)
    except TypeError:
        # what it holds is among what is read
        return type(x), id(x)
    return type(x), x


def state_of(fn: Any) -> dict[str, Tensor]:
    if not isinstance(fn, nn.Module):
        return {}
    return {**dict(fn.named_parameters()), **dict(fn.named_buffers())}


def using(fn: Any, own: dict[str, Tensor]) -> Any:
    return torch.nn.utils.stateless._reparametrize_module(fn, own) if own else nullcontext()


def replaced(fn: Any, own: dict[str, Tensor]) -> str:
    """A parameter or buffer that is another tensor than it was given as."""
    now = state_of(fn)
    found = [name for name in {**own, **now} if now.get(name) is not own.get(name)]
    return f"the parameter or buffer {found[0]}" if found else ""
