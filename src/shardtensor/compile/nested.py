"""Arguments and results of any make as leaves; dataclasses of tensors are taken apart, too."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..containers import tensors
from ..dispatch.fallback import is_shard
from ..errors import UnsupportedOpError


class _Fields:
    """A dataclass whose fields are nodes: a class of users is not entered in torch's table."""

    def __init__(self, x: Any) -> None:
        self.kind, self.names = type(x), tuple(f.name for f in fields(x))
        self.values = [_opened(getattr(x, name)) for name in self.names]


def _made(values: Any, context: Any) -> Any:
    kind, names, _ = context
    x = object.__new__(kind)
    for name, value in zip(names, values, strict=True):
        # frozen ones, too
        object.__setattr__(x, name, value)
    return x


# by its id, too: classes of functions may have one name
pytree.register_pytree_node(_Fields, lambda x: (x.values, (x.kind, x.names, id(x.kind))), _made)


def flat(x: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves and form: `pytree.tree_unflatten` gives it again."""
    leaves, form = pytree.tree_flatten(x, is_leaf=is_shard)
    if any(map(_opens, leaves)):
        return pytree.tree_flatten(_opened(x), is_leaf=is_shard)
    return leaves, form


def _opened(x: Any) -> Any:
    return pytree.tree_map(lambda y: _Fields(y) if _opens(y) else y, x, is_leaf=is_shard)


def _opens(x: Any) -> bool:
    """Whether a leaf is a dataclass with tensors, and nothing but its fields."""
    if not is_dataclass(x) or isinstance(x, type | Tensor | nn.Module):
        return False
    if type(x).__new__ is not object.__new__:
        # a dict, say, which holds more
        return False
    names = [f.name for f in fields(x)]
    if not all(hasattr(x, n) for n in names) or not {*getattr(x, "__dict__", ())} <= {*names}:
        return False
    return holds_tensors([getattr(x, n) for n in names])


def holds_tensors(x: Any) -> bool:
    """Whether there are tensors in it, however deep in what is no user's class."""
    return any(isinstance(y, Tensor) or _opens(y) for y in pytree.tree_leaves(x, is_leaf=is_shard))


def check_results(leaves: list[Any]) -> None:
    """Refuse a result with tensors that no graph gives."""
    for x in leaves:
        if isinstance(x, Tensor):
            continue
        # a class of dict or list is a leaf here
        if tensors(x) or holds_tensors([*getattr(x, "__dict__", {}).values()]):
            raise UnsupportedOpError(
                f"a result of type {type(x).__name__} with tensors in it: return them in a "
                "dataclass, a dict or a tuple"
            )


def check_scripted(modules: list[nn.Module]) -> None:
    """Refuse weights that only TorchScript sees, which would be constants of the graph."""
    for m in modules:
        if isinstance(m, torch.jit.ScriptModule) and next(m.parameters(), None) is not None:
            raise UnsupportedOpError(
                f"{m.original_name} is scripted, whose weights a compiled program does not see: "
                "leave it out of st.compile (blocks=), or take the module that was scripted"
            )
