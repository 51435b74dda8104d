"""Inputs and outputs of any make: tensors in dicts, tuples and dataclasses, nested."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def mapped(fn: Callable[[Any], Any], tree: Any, made: dict[int, Any] | None = None) -> Any:
    """The same tree with fn(x) in place of each leaf x; what occurs twice is made once."""
    made = {} if made is None else made
    if id(tree) not in made:
        # the original is kept, too: another object must not get its id
        made[id(tree)] = tree, _mapped(fn, tree, made)
    return made[id(tree)][1]


def _mapped(fn: Callable[[Any], Any], tree: Any, made: dict[int, Any]) -> Any:
    if isinstance(tree, Tensor):
        return fn(tree)
    if isinstance(tree, Mapping):
        items = {k: mapped(fn, v, made) for k, v in tree.items()}
        if type(tree) is dict:
            return items
        held: Any = copy.copy(tree)
        for k, v in items.items():
            held[k] = v
        return held
    if is_dataclass(tree) and not isinstance(tree, type):
        other: Any = copy.copy(tree)
        for f in fields(tree):
            if hasattr(tree, f.name):
                object.__setattr__(other, f.name, mapped(fn, getattr(tree, f.name), made))
        return other
    if isinstance(tree, list | tuple):
        values = [mapped(fn, v, made) for v in tree]
        if hasattr(tree, "_fields"):
            return type(tree)(*values)
        return type(tree)(values) if type(tree) in (list, tuple) else tree
    return fn(tree)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of all that is no container, in order."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for k, v in tree.items():
            yield from leaves(v, f"{path}[{k!r}]")
    elif is_dataclass(tree) and not isinstance(tree, type):
        for f in fields(tree):
            yield from leaves(getattr(tree, f.name, None), f"{path}.{f.name}")
    elif isinstance(tree, list | tuple):
        for i, v in enumerate(tree):
            yield from leaves(v, f"{path}[{i}]")
    else:
        yield path, tree


def tensors(tree: Any) -> list[Tensor]:
    """All tensors in it, in order."""
    return [x for _, x in leaves(tree) if isinstance(x, Tensor)]
