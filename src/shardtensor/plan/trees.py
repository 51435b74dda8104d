"""Inputs and outputs of any make: tensors in dicts, tuples and dataclasses, nested."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn


def mapped(fn: Callable[[Any], Any], tree: Any, made: dict[int, Any] | None = None) -> Any:
    """The same tree with fn(x) in place of each leaf x; what occurs twice is made once."""
    made = {} if made is None else made
    if id(tree) not in made:
        # the original is kept, too: another object must not get its id
        made[id(tree)] = tree, _mapped(fn, tree, lambda x: mapped(fn, x, made))
    return made[id(tree)][1]


def _mapped(fn: Callable[[Any], Any], tree: Any, inside: Callable[[Any], Any]) -> Any:
    if isinstance(tree, Tensor):
        return fn(tree)
    if isinstance(tree, Mapping):
        items = {k: inside(v) for k, v in tree.items()}
        if type(tree) is dict or not isinstance(tree, MutableMapping):
            return items
        held: Any = copy.copy(tree)
        for k, v in items.items():
            held[k] = v
        return held
    if is_dataclass(tree) and not isinstance(tree, type):
        other: Any = copy.copy(tree)
        for f in fields(tree):
            if hasattr(tree, f.name):
                object.__setattr__(other, f.name, inside(getattr(tree, f.name)))
        return other
    if isinstance(tree, list | tuple):
        values = [inside(v) for v in tree]
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


def called(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of forward: a tuple or list of them, a dict by name, else the only one.

    A dict whose keys are no arguments of forward is itself the only one, if forward takes one.
    """
    if type(inputs) in (list, tuple):
        return tuple(inputs), {}
    named = isinstance(inputs, Mapping) and all(isinstance(k, str) for k in inputs)
    if named and (_takes(model, **inputs) or not _takes(model, inputs)):
        return (), dict(inputs)
    return (inputs,), {}


def _takes(model: nn.Module, *args: Any, **kwargs: Any) -> bool:
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return False
    return True


def dims_like(
    shape: Sequence[int], first: Sequence[int], dims: Sequence[int]
) -> tuple[int, ...] | None:
    """Where a tensor has the dims of the first one, by their sizes: from the front, else the back.

    So fields (B, V, levels, H, W) are cut as those of (B, C, H, W) are, and a mask (H, W), too.
    """
    for shift in (0, len(shape) - len(first)):
        found = tuple(d + shift for d in dims)
        pairs = zip(dims, found, strict=True)
        if all(0 <= e < len(shape) and shape[e] == first[d] for d, e in pairs):
            return found
    return None


class At(int):
    """The place of an input among all, where it stands in what forward takes."""


def formed(inputs: Any) -> tuple[Any, list[Any]]:
    """(form, inputs): shapes and tensors, however nested; in their form `At` in place.

    What is neither a shape nor a tensor stays in the form.
    """
    found: list[Any] = []

    def of(x: Any) -> Any:
        if isinstance(x, Tensor) or _is_shape(x):
            found.append(x)
            return At(len(found) - 1)
        return _mapped(lambda kept: kept, x, of)

    return of(inputs), found


def filled(form: Any, made: Sequence[Any]) -> Any:
    """What forward takes, of its form and the inputs that were made."""
    return mapped(lambda x: made[x] if isinstance(x, At) else x, form)


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple | list) and all(
        isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in x
    )
