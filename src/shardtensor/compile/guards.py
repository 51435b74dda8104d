"""The Python state that a call reads: attributes, globals, closures and what lists and dicts hold.

A compiled program holds for one state of it. While the program is traced, attributes of modules and
of users' objects are noted as they are read; globals and closures are those that the code names.
Afterwards `Reads.changed` compares: by identity, in C, where nothing changed.
"""

from __future__ import annotations

import argparse
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from itertools import chain, repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import probe
from ..caller import is_library
from ..tensor.tape import Tape
from .attributes import MISSING, noting, watch

_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)


class Reads:
    """What one call read. inputs: ids of modules whose parameters and buffers are given anew.

    tape: of random generators that are read.
    """

    def __init__(self, inputs: frozenset[int], tape: Tape) -> None:
        self.inputs, self.tape = inputs, tape
        self.known: dict[int, Any] = {}
        # (mapping, name) -> value
        self.slots: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        self.dicts: list[tuple[Any, dict[Any, Any], str]] = []
        self.lists: list[tuple[Any, tuple[Any, ...], str]] = []
        self.cells: list[tuple[Any, Any, str]] = []
        # whose contents no identity tells
        self.described: list[tuple[Any, Any, str]] = []
        self.draws: Any = _draws()
        for hooks in probe.global_hooks():
            self.reach(hooks, "a hook of all modules")

    # what is read ------------------------------------------------------------------------------

    def reach(self, x: Any, name: str) -> None:
        """Note what x holds, as far as only reading it shall tell."""
        if isinstance(x, (*_PLAIN, Enum)) or id(x) in self.known:
            return
        self.known[id(x)] = x
        if isinstance(x, torch.Generator):
            self.tape.take(x)
        elif isinstance(x, Tensor | set) or hasattr(x, "__array_interface__"):
            self.described.append((x, _described(x), name))
        elif isinstance(x, types.FunctionType):
            self._function(x)
        elif isinstance(x, types.MethodType):
            self.reach(x.__self__, name)
            self.reach(x.__func__, name)
        elif isinstance(x, partial):
            for part in (x.func, x.args, x.keywords):
                self.reach(part, name)
        elif isinstance(x, property):
            self.reach(x.fget, name)
        elif isinstance(x, _NAMESPACES):
            self._mapping(vars(x), name)
        elif isinstance(x, dict | types.MappingProxyType):
            self._mapping(x, name)
        elif isinstance(x, list | tuple | frozenset | deque):
            self.lists.append((x, tuple(x), name))
            for v in x:
                self.reach(v, name)
        elif isinstance(x, type):
            if _of_user(x):
                self._mapping(vars(x), x.__name__)
        elif isinstance(x, nn.Module):
            self._mapping(x.__dict__["_modules"], "a module")
            if id(x) not in self.inputs:
                self._mapping(x.__dict__["_parameters"], "a parameter")
                self._mapping(x.__dict__["_buffers"], "a buffer")
            self._method(x, "forward")
        elif _of_user(type(x)):
            watch(type(x))
            self._method(x, "__call__")

    def read(self, owner: Any, name: str, value: Any) -> None:
        """Note an attribute that is read."""
        if id(owner) not in self.known or (id(owner), name) in self.slots:
            return
        own = _dict_of(owner)
        if name == "__dict__" and own is not None and not isinstance(owner, nn.Module):
            self._mapping(own, type(owner).__name__)
        hidden = name in ("_parameters", "_buffers") and id(owner) in self.inputs
        if name.startswith("__") or hidden:
            return
        self.known.setdefault(id(own), own)
        label = f"{type(owner).__name__}.{name}"
        if own is not None:
            self.slots[id(owner), name] = (own, name, own.get(name, MISSING))
            if name in own:
                self.reach(value, label)
                return
        for cls in type(owner).__mro__:
            if _of_user(cls) or (name in vars(cls) and cls is not nn.Module):
                self._slot(vars(cls), name, cls)
            if name in vars(cls):
                found = vars(cls)[name]
                if isinstance(found, types.MemberDescriptorType):
                    self.slots[id(owner), name] = (_Slots(owner), name, value)
                self.reach(
                    found if callable(found) or isinstance(found, property) else value, label
                )
                return

    def written(self, owner: Any, name: str) -> None:
        """Note an attribute that is about to be written."""
        if id(owner) not in self.known or (id(owner), name) in self.slots:
            return
        own = _dict_of(owner)
        if own is None:
            self.slots[id(owner), name] = (_Slots(owner), name, getattr(owner, name, MISSING))
            return
        for part in ("_parameters", "_buffers", "_modules"):
            if isinstance(owner, nn.Module) and name in own.get(part, ()):
                own = own[part]
        self.slots[id(owner), name] = (own, name, own.get(name, MISSING))

    def _slot(self, mapping: Any, name: str, owner: Any) -> None:
        self.known.setdefault(id(owner), owner)
        self.slots.setdefault((id(owner), name), (mapping, name, mapping.get(name, MISSING)))

    def _mapping(self, x: Any, name: str) -> None:
        self.known[id(x)] = x
        self.dicts.append((x, dict(x), name))
        for k, v in list(x.items()):
            self.reach(v, k if isinstance(k, str) else name)

    def _method(self, x: Any, name: str) -> None:
        found = getattr(type(x), name, None)
        if isinstance(found, types.FunctionType):
            self._function(found)

    def _function(self, x: types.FunctionType) -> None:
        """Note cells, defaults and globals that a function reads, and what they lead to."""
        if is_library(x.__code__.co_filename):
            return
        self.known[id(x)] = x
        names = _names(x.__code__)
        for name, cell in zip(x.__code__.co_freevars, x.__closure__ or (), strict=True):
            self.cells.append((cell, _content(cell), name))
            self.reach(_content(cell), name)
        for default in (x.__defaults__, x.__kwdefaults__):
            self.reach(default, "a default")
        for name in names:
            value = x.__globals__.get(name, sys.modules.get(name, MISSING))
            if value is MISSING:
                continue
            if name in x.__globals__:
                self._slot(x.__globals__, name, x.__globals__)
            if not isinstance(value, types.ModuleType):
                self.reach(value, name)
            elif not is_library(getattr(value, "__file__", None) or "<frozen>"):
                for inner in names & vars(value).keys():
                    self._slot(vars(value), inner, value)
                    self.reach(vars(value)[inner], inner)

    # what became of it -------------------------------------------------------------------------

    def close(self) -> None:
        """Make the comparison fast; nothing is noted any more."""
        plain = [s for s in self.slots.values() if isinstance(s[0], dict)]
        self.other = [s for s in self.slots.values() if not isinstance(s[0], dict)]
        self.fast = tuple(map(list, zip(*plain, strict=True))) if plain else ([], [], [])
        self.maps = [d for d, _, _ in self.dicts]
        self.rows = [x for x, _, _ in self.lists if isinstance(x, list | deque)]
        self.sizes = [len(x) for x in (*self.maps, *self.rows)]
        self.held = [*self._held()]
        self.known.clear()
        self.draws = None

    def _held(self) -> Iterator[Any]:
        yield from chain.from_iterable(self.maps)
        yield from chain.from_iterable(map(_values, self.maps))
        yield from chain.from_iterable(self.rows)
        for cell, _, _ in self.cells:
            yield _content(cell)

    def hold(self) -> bool:
        """Whether all is as it was when it was read."""
        mappings, names, values = self.fast
        same = (
            all(map(is_, map(dict.get, mappings, names, repeat(MISSING)), values))
            and [len(x) for x in (*self.maps, *self.rows)] == self.sizes
            and all(map(is_, self._held(), self.held))
        )
        if not same and self.changed():
            return False
        return all(_same(m.get(n, MISSING), v) for m, n, v in self.other) and all(
            _described(x) == had for x, had, _ in self.described
        )

    def changed(self) -> str:
        """What is not as it was when it was read, in words; "" where all is."""
        for (_, _), (mapping, name, had) in self.slots.items():
            now = mapping.get(name, MISSING)
            if not _same(now, had):
                return f"{name}: {_short(had)} -> {_short(now)}"
        for mapping, had, name in self.dicts:
            if [*mapping] != [*had] or not all(map(_same, mapping.values(), had.values())):
                return f"what {name} holds"
        for x, had, name in self.lists:
            if len(x) != len(had) or not all(map(_same, x, had)):
                return f"what {name} holds"
        for cell, had, name in self.cells:
            if not _same(_content(cell), had):
                return f"{name}: {_short(had)} -> {_short(_content(cell))}"
        for x, had, name in self.described:
            if _described(x) != had:
                return f"{name}: {_short(had)} -> {_short(_described(x))}"
        if self.draws is not None and self.draws[0] != _draws()[0]:
            return "the state of Python's or numpy's random numbers"
        return ""

    def restore(self) -> None:
        """Put everything back as it was when it was read."""
        for mapping, name, had in self.slots.values():
            if isinstance(mapping, dict | _Slots):
                mapping.pop(name, None) if had is MISSING else mapping.update({name: had})
        for mapping, had, _ in self.dicts:
            if isinstance(mapping, dict) and not (len(mapping) == len(had) and all(
                a is b and v is w
                for (a, v), (b, w) in zip(mapping.items(), had.items(), strict=True)
            )):  # fmt: skip
                mapping.clear()
                mapping.update(had)
        for x, had, _ in self.lists:
            if isinstance(x, list | deque) and not _same(tuple(x), had):
                x.clear()
                x.extend(had)
        for x, had, _ in self.described:
            if isinstance(x, set) and x != had:
                x.clear()
                x.update(had)
        for cell, had, _ in self.cells:
            if had is not MISSING:
                cell.cell_contents = had
        if self.draws is not None:
            random.setstate(self.draws[1])
            if self.draws[2] is not None:
                sys.modules["numpy"].random.set_state(self.draws[2])


class _Slots:
    """An object with __slots__, as a mapping."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def get(self, name: str, default: Any) -> Any:
        return getattr(self.owner, name, default)

    def pop(self, name: str, default: Any) -> None:
        if hasattr(self.owner, name):
            delattr(self.owner, name)

    def update(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self.owner, name, value)


def _values(x: Any) -> Any:
    return x.values()


def _dict_of(x: Any) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = object.__getattribute__(x, "__dict__")
    except AttributeError:
        return None
    return found


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


def _names(code: types.CodeType) -> set[str]:
    """The globals and attributes that code and the functions within it name."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _of_user(cls: type) -> bool:
    """Whether a class is written in Python, outside of this library, torch and Python's own."""
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None) or ("" if cls.__module__ == "__main__" else "<frozen>")
    return not is_library(file) and not issubclass(cls, Tensor)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, float | complex):
        # of one sign, and not a number twice
        return repr(a) == repr(b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, types.MethodType):
        return a.__self__ is b.__self__ and a.__func__ is b.__func__
    return isinstance(a, _PLAIN) and bool(a == b)


def _short(x: Any) -> str:
    return "nothing" if x is MISSING else repr(x)[:80]


def _described(x: Any) -> Any:
    if isinstance(x, Tensor):
        return (tuple(x.shape), x.dtype, x.device, x.requires_grad)
    return frozenset(x) if isinstance(x, set) else (x.shape, str(x.dtype), x.tobytes())


def _draws() -> tuple[Any, Any, Any]:
    """Where the generators of Python and numpy stand: to compare, and to set them."""
    numpy = sys.modules.get("numpy")
    python, state = random.getstate(), None if numpy is None else numpy.random.get_state()
    return (python, repr(state), state and state[1].tobytes()), python, state


@contextmanager
def recording(inputs: frozenset[int], tape: Tape, roots: Callable[[], Any]) -> Iterator[Reads]:
    """Note what the code inside reads, from roots() on, in this thread."""
    with noting() as note:
        reads = Reads(inputs, tape)
        watch(nn.Module)
        for x in roots():
            reads.reach(x, "an argument")
        note(reads)
        yield reads
