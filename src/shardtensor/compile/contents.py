"""Objects whose contents no identity tells: what they hold now, and how to put that back."""

from __future__ import annotations

import collections
import io
import random
import sys
import threading
from array import array
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from ..errors import UnsupportedOpError

_BYTES = (array, bytearray, memoryview)
# classes of Python's own that hold others in attributes
HOLDERS = (
    collections.UserDict, collections.UserList, collections.UserString, collections.ChainMap,
    type(sys.modules["os"].environ),
)  # fmt: skip


class One:
    """A value that is compared by identity, or by value where it is a number or a string."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        a, b = self.value, other.value if isinstance(other, One) else None
        plain = isinstance(a, int | float | complex | str)
        return a is b or (plain and type(a) is type(b) and repr(a) == repr(b))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self.value)


class Bits(One):
    """The state of a generator, compared by its text; arrays have no one ==."""

    def __init__(self, text: str, state: Any) -> None:
        super().__init__(text)
        self.state = state


def _is_array(x: Any) -> bool:
    """Whether x has elements as numpy's arrays do; their class and its aliases have none."""
    return hasattr(type(x), "__array_interface__")


def is_described(x: Any) -> bool:
    """Whether `describe` knows the contents; UnsupportedOpError for what a trace would spend."""
    if _is_stream(x):
        return True
    if isinstance(x, Iterator) and not isinstance(x, Tensor):
        raise UnsupportedOpError(
            f"a compiled program reads {type(x).__name__} {x!r:.60}, which a trace would advance: "
            "read it before the call, or leave this part out of st.compile"
        )
    kinds = (Tensor, set, ContextVar, threading.local, random.Random, *_BYTES)
    return isinstance(x, kinds) or _is_array(x) or _generator(x) is not None


def _is_stream(x: Any) -> bool:
    """Whether x is a file that says where it stands, or from which nothing is read."""
    if type(x).__module__ != "_io":
        return False
    return x.closed or not x.readable() or (x.seekable() and not isinstance(x, io.TextIOWrapper))


def _stream(x: Any) -> tuple[Any, ...]:
    """Where a file stands, and what it holds if it is in memory."""
    if x.closed or not x.readable():
        return (x.closed,)
    memory = isinstance(x, io.BytesIO | io.StringIO)
    return (False, x.tell(), x.getvalue() if memory else None)


def describe(x: Any) -> Any:
    """What an object holds, comparable by ==."""
    if _is_stream(x):
        return _stream(x)
    if isinstance(x, Tensor):
        return (tuple(x.shape), x.dtype, x.device, x.requires_grad)
    if isinstance(x, set):
        return frozenset(x)
    if isinstance(x, ContextVar):
        return One(x.get(None))
    if isinstance(x, threading.local):
        return {k: One(v) for k, v in vars(x).items()}
    if isinstance(x, random.Random):
        return x.getstate()
    if isinstance(x, _BYTES):
        return x.tobytes() if isinstance(x, array | memoryview) else bytes(x)
    if _is_array(x):
        # of a masked one both parts: its own tobytes writes to it
        parts = (x.data, x.mask) if hasattr(x, "mask") else (x,)
        return (x.shape, str(x.dtype), *(part.tobytes() for part in parts))
    state = _generator(x).state
    return Bits(repr(state), state)


def held(x: Any) -> Any:
    """What an object holds and may be read by way of it."""
    if isinstance(x, ContextVar):
        return x.get(None)
    return dict(vars(x)) if isinstance(x, threading.local) else None


def put_back(x: Any, had: Any) -> None:
    """Let an object hold again what `describe` said."""
    if _is_stream(x):
        if not x.closed and len(had) == 3:
            if had[2] is not None and x.getvalue() != had[2]:
                x.seek(0)
                x.truncate()
                x.write(had[2])
            x.seek(had[1])
    elif isinstance(x, set):
        x.clear()
        x.update(had)
    elif isinstance(x, ContextVar):
        x.set(had.value)
    elif isinstance(x, threading.local):
        vars(x).clear()
        vars(x).update({k: one.value for k, one in had.items()})
    elif isinstance(x, random.Random):
        x.setstate(had)
    elif isinstance(x, array):
        del x[:]
        x.frombytes(had)
    elif isinstance(x, bytearray):
        x[:] = had
    elif isinstance(x, memoryview):
        x.cast("B")[:] = had
    elif _is_array(x) and x.shape == had[0] and x.flags.writeable:
        x[...] = sys.modules["numpy"].frombuffer(had[2], x.dtype).reshape(x.shape)
    elif _generator(x) is not None:
        _generator(x).state = had.state


def _generator(x: Any) -> Any:
    """What has the state of one of numpy's random generators."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(x, numpy.random.RandomState):
        return x._bit_generator
    return x.bit_generator if isinstance(x, numpy.random.Generator) else None
