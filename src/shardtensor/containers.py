"""Batches, inputs and outputs of any make: dicts, tuples, dataclasses, and what pytrees know."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Parts(NamedTuple):
    """What a container holds. make: one like it of other values; names: as in code."""

    names: list[str]
    values: list[Any]
    make: Callable[[list[Any]], Any]


class _Inside:
    """Whether something is another object than the tree. Torch keeps it until a collection."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree

    def __call__(self, x: Any) -> bool:
        return x is not self.tree


def parts(tree: Any) -> Parts | None:
    """What a container holds; None for a leaf. Others than pytrees know are copied, then filled."""
    if isinstance(tree, Tensor | torch.Size):
        return None
    inside = _Inside(tree)
    values, spec = pytree.tree_flatten(tree, is_leaf=inside)
    inside.tree = None
    if not spec.is_leaf():
        keys = list(tree.keys()) if isinstance(tree, Mapping) else []
        places = keys if len(keys) == len(values) else range(len(values))
        names = [f"[{k!r}]" for k in places]
        return Parts(names, values, lambda made: pytree.tree_unflatten(made, spec))
    if isinstance(tree, Mapping):
        # a mapping that has keys need not be one to iterate over
        keys = list(tree.keys())
        return Parts([f"[{k!r}]" for k in keys], [tree[k] for k in keys], _mapping(tree, keys))
    if is_dataclass(tree) and not isinstance(tree, type):
        known = [f.name for f in fields(tree) if hasattr(tree, f.name)]
        return Parts([f".{k}" for k in known], [getattr(tree, k) for k in known], _set(tree, known))
    if isinstance(tree, list | tuple):
        return Parts([f"[{i}]" for i in range(len(tree))], list(tree), _sequence(tree))
    return None


def _mapping(tree: Mapping[Any, Any], keys: list[Any]) -> Callable[[list[Any]], Any]:
    empty: Any = copy.copy(tree) if isinstance(tree, MutableMapping) else {}
    empty.update(dict.fromkeys(keys))

    def make(values: list[Any]) -> Any:
        made = copy.copy(empty)
        made.update(zip(keys, values, strict=True))
        return made

    return make


def _set(tree: Any, names: list[str]) -> Callable[[list[Any]], Any]:
    def filled(of: Any, values: list[Any]) -> Any:
        made = copy.copy(of)
        for name, value in zip(names, values, strict=True):
            # also where it is frozen
            object.__setattr__(made, name, value)
        return made

    empty = filled(tree, [None] * len(names))
    return lambda values: filled(empty, values)


def _sequence(tree: list[Any] | tuple[Any, ...]) -> Callable[[list[Any]], Any]:
    if isinstance(tree, tuple):
        kind = type(tree)
        # a __new__ of Python's may take other arguments
        return partial(tuple.__new__, kind) if isinstance(kind.__new__, FunctionType) else kind
    empty = copy.copy(tree)
    empty.clear()

    def make(values: list[Any]) -> Any:
        made = copy.copy(empty)
        made[:] = values
        return made

    return make


def mapped(fn: Callable[[Any], Any], tree: Any, made: dict[int, Any] | None = None) -> Any:
    """The same tree with fn(x) in place of each leaf x; what occurs twice is made once."""
    made = {} if made is None else made
    if id(tree) not in made:
        found = parts(tree)
        new = fn(tree) if found is None else found.make([mapped(fn, x, made) for x in found.values])
        # the original is kept, too: another object must not get its id
        made[id(tree)] = tree, new
    return made[id(tree)][1]


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of all that is no container, in order."""
    found = parts(tree)
    if found is None:
        yield path, tree
        return
    for name, value in zip(found.names, found.values, strict=True):
        yield from leaves(value, path + name)


def tensors(tree: Any) -> list[Tensor]:
    """All tensors in it, in order."""
    return [x for _, x in leaves(tree) if isinstance(x, Tensor)]


class Form:
    """A tree without its leaves, of which it keeps none; forms of the same paths are equal."""

    def __init__(self, tree: Any) -> None:
        self.paths = [path for path, _ in leaves(tree)]
        self._make = _filling(tree)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Form) and self.paths == other.paths

    __hash__ = None  # type: ignore[assignment]

    def of(self, values: Iterable[Any]) -> Any:
        """The tree of these leaves, in order."""
        return self._make(iter(values))


def flatten(tree: Any) -> tuple[list[Any], Form]:
    """The leaves, in order, and what makes the same tree of others."""
    return [x for _, x in leaves(tree)], Form(tree)


def each(fn: Callable[[Any], Any], tree: Any) -> Any:
    """The tree with fn of each leaf, again of one that occurs twice: what sends does so alike."""
    values, form = flatten(tree)
    return form.of([fn(x) for x in values])


def _filling(tree: Any) -> Callable[[Iterator[Any]], Any]:
    found = parts(tree)
    if found is None:
        return next
    make, inside = found.make, [_filling(v) for v in found.values]
    return lambda left: make([fill(left) for fill in inside])
