"""What simulated ranks returned, looked at when they have ended: wholes of all ranks' shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import UnsupportedOpError
from ..later import dt
from ..tensor import ShardTensor

_SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}


class Seen(ShardTensor):
    """A ShardTensor of ranks that have ended, which still knows the shards of the others.

    Its values can be read (`full_tensor`, `item`, `numpy`, `tolist`, of its gradient too), without
    a graph. Ops on it that communicate find no ranks.
    """

    # by rank of the world: what that one returned in this place
    _others: list[Any]

    def full_tensor(self, *, grad_placements: Sequence[dt.Placement] | None = None) -> Tensor:
        """The whole tensor as a plain one; nothing is communicated."""
        return _whole(self, [getattr(x, "_local", None) for x in self._others])

    @property
    def grad(self) -> Any:
        """The gradient, which can be read too."""
        own = super().grad
        return None if own is None else _seen(own, [_gradient(x) for x in self._others])

    @grad.setter
    def grad(self, value: Any) -> None:
        raise UnsupportedOpError("a gradient for a tensor whose ranks have ended")


def _gradient(x: Any) -> Any:
    return super(Seen, x).grad if isinstance(x, Seen) else None


def _seen(x: ShardTensor, others: list[Any]) -> ShardTensor:
    x.__class__ = Seen
    x._others = others  # type: ignore[attr-defined]
    return x


def seen(results: list[Any]) -> None:
    """Let the ShardTensors among the ranks' results be read after the ranks have ended."""
    leaves = [pytree.tree_leaves(result) for result in results]
    if len({len(found) for found in leaves}) == 1:
        for same in zip(*leaves, strict=True):
            for x in same:
                if type(x) is ShardTensor:
                    _seen(x, list(same))


def _whole(x: ShardTensor, locals_: list[Tensor | None]) -> Tensor:
    spec, mesh = x.spec, x.spec.mesh
    partial = dict(spec.partial)
    blocks: dict[tuple[int, ...], list[Tensor]] = {}
    for place in product(*map(range, mesh.shape)):
        local = locals_[int(mesh.mesh[place])]
        if local is None or local.shape != spec.local_shape_at(place):
            raise UnsupportedOpError(
                f"full_tensor of {spec} after its ranks have ended: not all have returned it"
            )
        # replicated along an axis: the first rank's
        if all(i == 0 or a in partial or _cut(spec, a) for a, i in enumerate(place)):
            kept = tuple(0 if a in partial else i for a, i in enumerate(place))
            blocks.setdefault(kept, []).append(local.detach())
    whole = x._local.detach().new_empty(spec.shape)
    kinds = set(partial.values())
    if len(kinds) > 1 or not kinds <= set(_SUMS):
        raise UnsupportedOpError(f"full_tensor of {spec} after its ranks have ended")
    for place, parts in blocks.items():
        block = reduce(_SUMS[next(iter(kinds))], parts) if kinds else parts[0]
        block = block / len(parts) if "avg" in kinds else block
        whole[tuple(slice(*span) for span in spec.spans_at(place))] = block
    return whole


def _cut(spec: Any, axis: int) -> bool:
    return any(axis in dim.axes for dim in spec.dims)
