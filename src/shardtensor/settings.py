"""What contexts set for the calls inside; a checkpoint's recomputation has what its forward had.

Backward may run in another thread or after the context was left, so a recomputed function brings
its settings along.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any

_state = threading.local()
# of a setting the context that a recomputed function needs around it
contexts: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {}
# by name what is remembered of earlier calls, on which later ones depend: a recomputed function has
# a copy of what its forward began with as the setting of this name
remembered: dict[str, Callable[[], dict[Any, Any]]] = {}


def current(name: str, default: Any) -> Any:
    """The value in force in this thread."""
    return getattr(_state, name, default)


@contextmanager
def setting(name: str, value: Any) -> Iterator[None]:
    """Inside, the setting has this value in this thread."""
    before = dict(_state.__dict__)
    setattr(_state, name, value)
    try:
        yield
    finally:
        _put(before)


def _put(values: dict[str, Any]) -> None:
    _state.__dict__.clear()
    _state.__dict__.update(values)


def bringing(fn: Callable[..., Any]) -> Callable[..., Any]:
    """fn with the settings that are in force now, whenever and wherever it is called."""
    values = dict(_state.__dict__)
    past = {name: dict(known()) for name, known in remembered.items()}

    @wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = dict(_state.__dict__)
        _put({**values, **{name: dict(known) for name, known in past.items()}})
        try:
            with ExitStack() as stack:
                for name, enter in contexts.items():
                    if name in values:
                        stack.enter_context(enter(values[name]))
                return fn(*args, **kwargs)
        finally:
            _put(before)

    return run
