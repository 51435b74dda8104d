"""The Python state that a call reads: attributes, globals, closures and what lists and dicts hold.

A compiled program holds for one state of it. While the program is traced, attributes of modules and
of users' objects are noted as they are read; globals and closures are those that the code names.
Afterwards `Reads.changed` compares: by identity, in C, where nothing changed.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from .._torch import probe
from ..caller import is_library
from ..tensor.tape import Tape
from .attributes import HOOKS, MISSING, Slots, noting, put_attribute, watch
from .code import names_of, of_user, operators
from .contents import HOLDERS, describe, held, is_described, put_back
from .identity import Identity, content_of

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
        self.kinds: list[tuple[Any, type]] = []
        self.owners: dict[type, None] = {}
        self.words: set[str] = set()
        # by the views of their attributes
        self.classes: dict[int, type] = {}
        # whose contents no identity tells
        self.described: list[tuple[Any, Any, str]] = []
        self.draws: Any = _draws()
        for hooks in probe.global_hooks():
            self.reach(hooks, "a hook of all modules")

    # what is read ------------------------------------------------------------------------------

    def reach(self, x: Any, name: str) -> None:
        """Note what x holds, as far as only reading it shall tell."""
        x = probe.in_its_place(x)
        if isinstance(x, (*_PLAIN, Enum)) or id(x) in self.known:
            return
        self.known[id(x)] = x
        if isinstance(x, torch.Generator):
            self.tape.take(x)
        elif is_described(x):
            self.described.append((x, describe(x), name))
            self.reach(held(x), name)
        elif isinstance(x, types.FunctionType):
            self._function(x)
        elif isinstance(x, types.MethodType):
            self.reach(x.__self__, name)
            self.reach(x.__func__, name)
        elif isinstance(x, partial):
            for part in (x.func, x.args, x.keywords):
                self.reach(part, name)
        elif isinstance(x, property | weakref.ref):
            self.reach(x.fget if isinstance(x, property) else x(), name)
        elif isinstance(x, _NAMESPACES + HOLDERS):
            self._mapping(vars(x), name)
        elif isinstance(x, dict | types.MappingProxyType):
            self._mapping(x, name)
        elif isinstance(x, list | tuple | frozenset | deque):
            self.lists.append((x, tuple(x), name))
            for v in x:
                self.reach(v, name)
        elif isinstance(x, type):
            # of a metaclass, too
            meta: type = x.__class__
            for cls in chain(x.__mro__, meta.__mro__):
                if of_user(cls) and (cls is x or id(cls) not in self.known):
                    self.known[id(cls)] = cls
                    mapping = vars(cls)
                    self.classes[id(mapping)] = cls
                    self._mapping(mapping, cls.__name__)
        elif hasattr(x, "__wrapped__"):
            # what functools.lru_cache makes
            self.reach(x.__wrapped__, name)
        elif isinstance(x, torch.jit.ScriptModule):
            # what it is made of is fixed, but for its weights
            self._kind(x)
        elif isinstance(x, nn.Module):
            self._kind(x)
            self._mapping(x.__dict__["_modules"], "a module")
            if id(x) not in self.inputs:
                self._mapping(x.__dict__["_parameters"], "a parameter")
                self._mapping(x.__dict__["_buffers"], "a buffer")
            self._method(x, "forward")
        elif of_user(type(x)):
            self._kind(x)
            watch(type(x))
            for method in operators(type(x)):
                self._method(x, method)

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
            if of_user(cls) or (name in vars(cls) and cls is not nn.Module):
                self._slot(vars(cls), name, cls)
            if name in vars(cls):
                found = vars(cls)[name]
                if isinstance(found, types.MemberDescriptorType):
                    self.slots[id(owner), name] = (Slots(owner), name, value)
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
            self.slots[id(owner), name] = (Slots(owner), name, getattr(owner, name, MISSING))
            return
        for part in ("_parameters", "_buffers", "_modules"):
            if isinstance(owner, nn.Module) and name in own.get(part, ()):
                own = own[part]
        self.slots[id(owner), name] = (own, name, own.get(name, MISSING))

    def _slot(self, mapping: Any, name: str, owner: Any) -> None:
        self.known.setdefault(id(owner), owner)
        self.slots.setdefault((id(owner), name), (mapping, name, mapping.get(name, MISSING)))

    def _kind(self, x: Any) -> None:
        self.kinds.append((x, type(x)))
        new = [c for c in type(x).__mro__ if c not in self.owners and of_user(c)]
        self.owners.update(dict.fromkeys(new))
        self._of_classes(self.words, new)

    def _of_classes(self, words: Iterable[str], classes: Iterable[type]) -> None:
        """Note attributes of classes that code may read from type(x)."""
        self.words.update(words)
        for cls in classes:
            for word in words:
                if word not in HOOKS:
                    self._slot(vars(cls), word, cls)

    def _mapping(self, x: Any, name: str) -> None:
        self.known[id(x)] = x
        self.dicts.append((x, dict(x), name))
        for k, v in list(x.items()):
            self.reach(v, k if isinstance(k, str) else name)

    def _method(self, x: Any, name: str) -> None:
        found = getattr(type(x), name, None)
        for cls in type(x).__mro__:
            if of_user(cls) and name in vars(cls):
                self._slot(vars(cls), name, cls)
                break
        if isinstance(found, types.FunctionType):
            self._function(found)

    def _function(self, x: types.FunctionType) -> None:
        """Note cells, defaults and globals that a function reads, and what they lead to."""
        if is_library(x.__code__.co_filename):
            return
        self.known[id(x)] = x
        self._mapping(x.__dict__, "a function's attribute")
        names = names_of(x.__code__)
        if names & {"type", "__class__"}:
            self._of_classes(names_of(x.__code__, strings=True), self.owners)
        for name, cell in zip(x.__code__.co_freevars, x.__closure__ or (), strict=True):
            self.cells.append((cell, content_of(cell), name))
            self.reach(content_of(cell), name)
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
            elif value is os:
                if names & {"environ", "getenv"}:
                    self.reach(os.environ, "os.environ")
            elif not is_library(getattr(value, "__file__", None) or "<frozen>"):
                for inner in names & vars(value).keys():
                    self._slot(vars(value), inner, value)
                    self.reach(vars(value)[inner], inner)

    # what became of it -------------------------------------------------------------------------

    def close(self) -> None:
        """Make the comparison fast; nothing is noted any more."""
        self.other = [
            s for s in self.slots.values() if not isinstance(s[0], dict | types.MappingProxyType)
        ]
        noted = (self.dicts, self.lists, self.cells, self.kinds)
        self.identity = Identity(self.slots, *([x for x, *_ in some] for some in noted))
        self.known.clear()
        self.owners.clear()
        self.draws = None

    def hold(self) -> bool:
        """Whether all is as it was when it was read."""
        if not self.identity.same():
            if self.changed():
                return False
            # equal ones in place of those that were: the next comparison is fast again
            self.identity.take()
        return all(_same(m.get(n, MISSING), v) for m, n, v in self.other) and all(
            describe(x) == had for x, had, _ in self.described
        )

    def changed(self) -> str:
        """What is not as it was when it was read, in words; "" where all is."""
        for (_, _), (mapping, name, had) in self.slots.items():
            now = mapping.get(name, MISSING)
            if not _same(now, had):
                return f"{name}: {_short(had)} -> {_short(now)}"
        for mapping, had, name in self.dicts:
            now = mapping if isinstance(mapping, dict) else _unhooked(mapping)
            had = had if mapping is now else _unhooked(had)
            if (fake := probe.FakeTensor) in now:
                # in a table by type, as of einops: of traces alone
                now, had = ({k: v for k, v in x.items() if k is not fake} for x in (now, had))
            if [*now] != [*had] or not all(map(_same, now.values(), had.values())):
                return f"what {name} holds"
        for x, had, name in self.lists:
            if len(x) != len(had) or not all(map(_same, x, had)):
                return f"what {name} holds"
        for cell, had, name in self.cells:
            if not _same(content_of(cell), had):
                return f"{name}: {_short(had)} -> {_short(content_of(cell))}"
        for x, kind in self.kinds:
            if type(x) is not kind:
                return f"the class of a {kind.__name__}"
        for x, had, name in self.described:
            if describe(x) != had:
                return f"{name}: {_short(had)} -> {_short(describe(x))}"
        if self.draws is not None and self.draws[0] != _draws()[0]:
            return "the state of Python's or numpy's random numbers"
        return ""

    def restore(self) -> None:
        """Put everything back as it was when it was read."""
        for (owner, _), (mapping, name, had) in self.slots.items():
            if isinstance(mapping, dict | Slots):
                mapping.pop(name, None) if had is MISSING else mapping.update({name: had})
            elif mapping.get(name, MISSING) is not had:
                put_attribute(self.known[owner], name, had)
        for mapping, had, _ in self.dicts:
            for name in () if isinstance(mapping, dict) else _unhooked({**had, **mapping}):
                if mapping.get(name, MISSING) is not had.get(name, MISSING):
                    put_attribute(self.classes[id(mapping)], name, had.get(name, MISSING))
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
            if describe(x) != had:
                put_back(x, had)
        for cell, had, _ in self.cells:
            if had is not MISSING:
                cell.cell_contents = had
        if self.draws is not None:
            random.setstate(self.draws[1])
            if self.draws[2] is not None:
                sys.modules["numpy"].random.set_state(self.draws[2])


def _unhooked(attributes: Any) -> dict[str, Any]:
    """Those of a class without what notes them."""
    return {k: v for k, v in attributes.items() if k not in HOOKS}


def _dict_of(x: Any) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = object.__getattribute__(x, "__dict__")
    except AttributeError:
        return None
    return found


def _same(a: Any, b: Any) -> bool:
    a, b = probe.in_its_place(a), probe.in_its_place(b)
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
