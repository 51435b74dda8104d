"""What a plan asks of an op each time that it is called, found once for each op."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ... import _torch
from ..._torch import probe
from ...comm.define import KERNELS

_DEPENDS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_UNLIKE = {torch.Tag.inplace_view, *_DEPENDS}


class Op:
    """Facts of an op.

    collective: what it runs, if it is one of ours; lifts: makes a tensor of numbers. kept: what it
    gives is the same each time that its arguments are alike; resizes: but where this is so only if
    its result had its size already. depends: what it gives depends on values. view: of an argument;
    single: gives one result;
    written: places and names of the arguments that it writes to.
    """

    __slots__ = (
        "collective", "depends", "drawn", "func", "kept", "lifts", "mutable", "name", "resizes",
        "sends", "single", "view", "written",
    )  # fmt: skip

    def __init__(self, func: Any) -> None:
        tags = set(func.tags)
        self.func = func
        own, name = func.namespace in ("aten", "prims"), func.overloadpacket.__name__
        # with the library it is from, unless that is torch
        self.name: str = name if own else f"{func.namespace}::{name}"
        self.collective: Callable[..., Any] | None = KERNELS.get(func)
        self.sends = func.namespace == "c10d"
        self.lifts = func in probe.LIFTED
        self.depends = bool(_DEPENDS & tags)
        # torch 2.11 has no tag for it
        self.resizes = any(a.is_out for a in func._schema.arguments)
        self.drawn = torch.Tag.nondeterministic_seeded in tags
        self.view = bool(getattr(func, "is_view", False))
        self.single = len(func._schema.returns) == 1
        self.mutable = _torch.is_mutable(func)
        self.kept = (
            own
            and not _UNLIKE & tags
            and not self.name.startswith(("resize", "set_", "lift", "_foreach"))
        )
        self.written = [
            (i, a.name)
            for i, a in enumerate(func._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]


# by id: an op's own hash takes longer than a look-up
_known: dict[int, Op] = {}


def facts(func: Any) -> Op:
    """Those of an op."""
    found = _known.get(id(func))
    if found is None:
        found = _known[id(func)] = Op(func)
    return found


def leaves(x: Any) -> Iterator[Tensor]:
    """The tensors among an op's arguments or results."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for y in x:
            yield from leaves(y)
    elif isinstance(x, dict):
        for y in x.values():
            yield from leaves(y)


def mapped(x: Any, f: Callable[[Tensor], Any]) -> Any:
    """An op's arguments or results with f of each tensor in its place."""
    if isinstance(x, Tensor):
        return f(x)
    kind = type(x)
    if kind is tuple:
        return tuple([mapped(y, f) for y in x])
    if isinstance(x, list):
        return [mapped(y, f) for y in x]
    if kind is dict:
        return {k: mapped(y, f) for k, y in x.items()}
    return x
