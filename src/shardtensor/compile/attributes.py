"""Attributes of the objects of a class, noted as they are read and written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

MISSING: Any = object()
HOOKS = ("__getattribute__", "__setattr__")
_now = threading.local()
# classes whose attributes are noted, and what they had in their own dict
_watched: dict[type, dict[str, Any]] = {}
_open: list[object] = []


class Notes(Protocol):
    """Is told of attributes: of a read one's value, of one that is about to be written."""

    def read(self, owner: Any, name: str, value: Any) -> None: ...

    def written(self, owner: Any, name: str) -> None: ...


@contextmanager
def noting() -> Iterator[Callable[[Notes], None]]:
    """Until it is left, what the thread reads is noted by whom it gave to the function yielded."""

    def note(notes: Notes) -> None:
        _now.notes = notes

    before, _now.notes = getattr(_now, "notes", None), None
    token = object()
    _open.append(token)
    try:
        yield note
    finally:
        _now.notes = before
        _open.remove(token)
        if not _open:
            _unwatch()


def _told(call: str, *args: Any) -> None:
    notes = getattr(_now, "notes", None)
    if notes is None:
        return
    # not of what is read to note it
    _now.notes = None
    try:
        getattr(notes, call)(*args)
    finally:
        _now.notes = notes


def watch(cls: type) -> None:
    """Let attributes of this class's objects be noted."""
    if cls in _watched:
        return
    get: Any = cls.__getattribute__
    put: Any = cls.__setattr__

    def read(self: Any, name: str) -> Any:
        value = MISSING
        try:
            value = get(self, name)
        finally:
            # also of what is not there, as for a module's parameters or hasattr
            _told("read", self, name, value)
        return value

    def write(self: Any, name: str, value: Any) -> None:
        _told("written", self, name)
        put(self, name, value)

    own = {k: vars(cls)[k] for k in HOOKS if k in vars(cls)}
    try:
        for name, hook in zip(HOOKS, (read, write), strict=True):
            setattr(cls, name, hook)
    except TypeError:
        # a class of C
        return
    _watched[cls] = own


def _unwatch() -> None:
    for cls, own in _watched.items():
        for name in HOOKS:
            if name in own:
                setattr(cls, name, own[name])
            elif name in vars(cls):
                # a trace that noted the class itself has restored it already
                delattr(cls, name)
    _watched.clear()


class Slots:
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


def put_attribute(x: Any, name: str, value: Any) -> None:
    if value is MISSING:
        delattr(x, name)
    else:
        setattr(x, name, value)
