"""What a compiled program is given: local tensors, and what tells the inputs of graphs apart."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .. import attention
from .._torch.modules import in_their_place
from ..comm.deferred import Twin, slots_of
from ..comm.sums import vary
from ..dispatch.axes import as_shards
from ..dispatch.fallback import limit
from ..errors import UnsupportedOpError
from ..later import dt
from ..spec import Spec
from ..tensor import ShardTensor, random, wrap
from .members import Members, members_of

_form = attrgetter("shape", "dtype", "device", "requires_grad")


class Own:
    """A module's parameters and buffers as inputs of a graph.

    A parameter whose gradient is summed later, by `parallelize` or FSDP2, is an input twice: where
    it meets a shard it is the second, which leaves the sum to its slot.
    """

    def __init__(self, members: Members, parts: list[tuple[Any, Tensor]] | None) -> None:
        # parts: None where all are plain
        self.names, self.form = members.names, members.form
        self.originals = members.tensors
        self.seen, self.tensors, self.places = None, members.tensors, members.places
        if parts is not None:
            self.seen = [seen for seen, _ in parts]
            self.tensors = [x for _, x in parts]
            self.places = {id(x): i for i, x in enumerate(self.tensors)}
        self.slots: dict[str, tuple[Any, Tensor]] = {}
        if torch.is_grad_enabled():
            slots = slots_of(self.originals)
            self.slots = {
                names[0]: (slot, x)
                for names, slot, x in zip(self.names, slots, self.tensors, strict=True)
                if slot is not None and x.requires_grad
            }

    def key(self) -> tuple[Any, ...]:
        """What a graph is for."""
        groups = tuple([(name, slot.group) for name, (slot, _) in self.slots.items()])
        forms = tuple(map(_form, self.tensors)), _strides(self.tensors)
        return self.form, forms, self.seen and tuple(self.seen), groups

    def doubles(self) -> list[Tensor]:
        """What to trace the second inputs with."""
        return [x.detach().requires_grad_() for _, x in self.slots.values()]

    def inside(
        self, given: Iterator[Tensor], leaves: Sequence[Any], again: Iterable[tuple[int, int]]
    ) -> tuple[dict[str, Tensor], list[Any]]:
        """What a traced call has of the inputs of a graph: its module's state, and its leaves."""
        local = [next(given) for _ in self.names]
        first = {names[0]: x for names, x in zip(self.names, local, strict=True)}
        for name, (slot, _) in self.slots.items():
            first[name]._shardtensor_slot = Twin(slot.group, next(given))  # type: ignore[attr-defined]
        kinds = self.seen or [None] * len(local)
        own = [x if seen is None else wrap(x, *seen) for x, seen in zip(local, kinds, strict=True)]
        # what the caller has once is one object inside, too
        made = dict(zip(map(id, self.originals), own, strict=True))
        repeated = dict(again)
        for i, x in enumerate(leaves):
            if isinstance(x, Tensor) and id(x) not in made:
                if i not in repeated:
                    local.append(next(given))
                y = local[repeated.get(i, -1)]
                made[id(x)] = wrap(y, x._spec, x._strides) if isinstance(x, ShardTensor) else y
        state = {name: x for names, x in zip(self.names, own, strict=True) for name in names}
        return state, [made[id(x)] if isinstance(x, Tensor) else x for x in leaves]

    def used(self, graph: GraphModule, written: Container[Node]) -> list[str]:
        """The names whose second inputs the graph needs; it has no others afterwards.

        written: the nodes that the graph writes to.
        """
        inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
        first = {names[0]: x for names, x in zip(self.names, inputs, strict=False)}
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


class Call(NamedTuple):
    """A call that is traced: its leaves and their tree, state, further tensors, and modes.

    again: of leaves that are an input already, (their place, that of the input).
    """

    leaves: list[Any]
    tree: pytree.TreeSpec
    own: Own
    tensors: list[Tensor]
    again: tuple[tuple[int, int], ...]
    modes: tuple[Any, ...]


def seen(x: Any) -> tuple[Spec, Any] | None:
    return (x._spec, x._strides) if isinstance(x, ShardTensor) else None


def parted(x: Any) -> tuple[Any, Any]:
    return seen(x), x.to_local() if isinstance(x, ShardTensor) else x


def parts_of(tensors: list[Tensor], leaves: list[Any]) -> list[tuple[Any, Tensor]] | None:
    """(spec and strides, local tensor) of parameters and buffers beside activations.

    None where all are plain.
    """
    kinds = set(map(type, tensors))
    if not any(issubclass(kind, ShardTensor | dt.DTensor) for kind in kinds):
        return None
    meshes = (x._spec.mesh for x in leaves if isinstance(x, ShardTensor))
    mesh = next(meshes, None) if any(isinstance(x, dt.DTensor) for x in tensors) else None
    return [parted(as_shards(x, mesh) if isinstance(x, dt.DTensor) else x) for x in tensors]


def further(
    given: Sequence[Any], places: Mapping[int, int]
) -> tuple[list[Tensor], tuple[tuple[int, int], ...]]:
    """The tensors that are no inputs yet; of the others (place here, place among the inputs)."""
    found, where, again = list[Tensor](), dict[int, int](), list[tuple[int, int]]()
    for i, x in enumerate(given):
        if isinstance(x, Tensor):
            at = places.get(id(x), where.get(id(x)))
            if at is not None:
                again.append((i, at))
            else:
                where[id(x)] = len(places) + len(found)
                found.append(x)
    return found, tuple(again)


def key_of(leaves: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(
        [(_form(x), _strides([x])) if isinstance(x, Tensor) else _value(x) for x in leaves]
    )


def _strides(tensors: list[Tensor]) -> tuple[Any, ...]:
    try:
        return tuple(map(Tensor.stride, tensors))
    except RuntimeError:
        # compressed sparse tensors have none
        return tuple([x.stride() if x.layout is torch.strided else x.layout for x in tensors])


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


def using(fn: Any, own: dict[str, Tensor]) -> Any:
    return in_their_place(fn, own) if own else nullcontext()


def replaced(fn: Any, own: dict[str, Tensor]) -> str:
    """A parameter or buffer that is another tensor than it was given as."""
    now = members_of(fn)
    found = [name for name in {**own, **now} if now.get(name) is not own.get(name)]
    return f"the parameter or buffer {found[0]}" if found else ""


def modes_of(members: Members) -> tuple[Any, ...]:
    """Gradients or not, train or eval of each module, autocast, and settings."""
    casts = tuple(
        (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")
    )
    contexts = (
        attention.chosen(), limit(), random.matching(), torch.get_default_dtype(),
        torch.is_inference_mode_enabled(),
    )  # fmt: skip
    return torch.is_grad_enabled(), members.training(), casts, contexts
