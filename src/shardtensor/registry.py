"""Which function is handled how: filled by `@rule`, resolved on first use by `dispatch`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
F = TypeVar("F", bound=Callable[..., Any])

rules: dict[Any, Callable[..., Any]] = {}
# keys of two rules that are no function's: of all pointwise ops, and of results for `out=`
POINTWISE, OUT = object(), object()


class Methods(dict[str, Callable[..., Any]]):
    """What methods of ShardTensor call, by name, of modules that are built on the class."""

    # those that the package does not import by itself
    homes: ClassVar = {
        "write_items": "shardtensor.checkpoint",
        "chunks": "shardtensor.checkpoint",
    }

    def __missing__(self, name: str) -> Callable[..., Any]:
        importlib.import_module(self.homes[name])
        return self[name]


methods = Methods()
# what is waited for before a process leaves the others
before_end: list[Callable[[], None]] = []


class Handlers(dict[Any, Handler]):
    """Torch function -> handler(func, args, kwargs); a miss asks `resolve`, once."""

    resolve: Callable[[Any], Handler]
    # types of functions that are made anew for each call
    passing: tuple[type, ...] = ()

    def __missing__(self, func: Any) -> Handler:
        handler = self.resolve(func)
        if not isinstance(func, self.passing):
            self[func] = handler
        return handler


handlers = Handlers()


def rule(*keys: Any) -> Callable[[F], F]:
    """Register the decorated function as the rule for torch functions and aten names.

    `shardtensor.rule` is this one for users, and takes more kinds of keys.
    """

    def register(fn: F) -> F:
        for key in keys:
            rules[key] = fn
        handlers.clear()
        return fn

    return register


def takes_plain(fn: F) -> F:
    """Mark the rule of an in-place op that writes what is sharded into a plain tensor by itself."""
    fn.takes_plain = True  # type: ignore[attr-defined]
    return fn


def method(fn: F) -> F:
    """Register the decorated function for the methods of ShardTensor."""
    methods[fn.__name__] = fn
    return fn
