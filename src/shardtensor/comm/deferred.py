"""Gradients of parameters that are summed over the ranks later, many in one message.

`vary` of a parameter that has a slot leaves the sum of its gradient to whoever made the slot
(`parallelize`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..cache import cached
from ..cuts import Cut
from . import groups
from .formats import memory_format


class Slot(Protocol):
    """What a parameter has whose gradient is summed over `group` later.

    declines: whether the sum may be made now instead, as torch.func wants it, which follows no sum
    that is made later.
    """

    group: str
    declines: bool

    def use(self, x: Tensor) -> Tensor | None:
        """The parameter's value, whose gradient this rank's part is; None: sum it now."""

    def cut(self, x: Tensor, dim: int, sizes: Cut, read: bool) -> Tensor | None:
        """This rank's rows of the value, whose gradient is theirs; None: gather it now.

        read: they may be a view.
        """


def use_all(slots: Sequence[Slot], xs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """`Slot.use` of several, together where their kind has a way for it."""
    first = slots[0]
    together = getattr(first, "use_all", None)
    if together is None or len(set(map(type, slots))) > 1:
        return [s.use(x) for s, x in zip(slots, xs, strict=True)]
    found: Sequence[Tensor | None] = together(slots, xs)
    return found


class Twin:
    """The slot of a parameter while it is traced: its value is another input of the graph."""

    declines = False

    def __init__(self, group: str, value: Tensor) -> None:
        self.group, self.value = group, value

    def use(self, x: Tensor) -> Tensor:
        return self.value

    def cut(self, x: Tensor, dim: int, sizes: Cut, read: bool) -> Tensor:
        return rows(self.value, dim, sizes, self.group, read)


def rows(x: Tensor, dim: int, sizes: Cut, group: str, read: bool) -> Tensor:
    """This rank's rows of a tensor, whose gradient is zero elsewhere.

    In memory of their own, unless they are only read.
    """
    me = groups.rank(group)
    own = x.narrow(dim, sizes.offsets[me], sizes[me])
    return own if read else own.clone(memory_format=memory_format(x))


# the attribute of a parameter, or of a DTensor parameter's local tensor, that is its slot
SLOT = "_shardtensor_slot"


def slots_of(tensors: Sequence[Tensor]) -> list[Slot | None]:
    """The slot of each of them."""
    return [getattr(x, SLOT, None) for x in tensors]


def check_mesh(slot: Slot, group: str, mesh: DeviceMesh) -> None:
    """Raise ValueError if a parameter's gradient is the sum over more ranks than share the sample.

    group: over which its gradient is summed at this use, beside a tensor that lies on the mesh.
    """
    if slot.group != group and not _holds(mesh, slot.group):
        raise ValueError(
            f"parallelize was told that {groups.size(slot.group)} ranks share each sample, but a "
            f"parameter meets a tensor on {mesh}: name the axis along which samples differ, "
            "parallelize(model, mesh, data=...), or distribute the samples over all its other axes"
        )


@cached
def _holds(mesh: DeviceMesh, group: str) -> bool:
    return set(groups.members(group)) <= set(mesh.mesh.flatten().tolist())
