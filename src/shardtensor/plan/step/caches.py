"""What functions of others keep of a plan: a table that lru_cache made there has no memory."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any
from weakref import WeakSet

from torch import Tensor

from ..._torch import probe

# of the plan that runs
modes: WeakSet[Any] = WeakSet()
_Cache = type(functools.lru_cache(len))
# tables may lie in results of results
_DEPTH = 6
# what knows fake tensors
_OWN = ("torch.", "shardtensor.", "sympy.")


def left_over() -> bool:
    """Whether a fake tensor of a plan that has ended lives on: each holds its mode."""
    if modes:
        # round the collector's way, with something that is older
        gc.collect()
    found = len(modes) > 0
    modes.clear()
    return found


def forget() -> None:
    """Clear the functools.lru_cache of each loaded function that keeps a fake tensor.

    The next to call it would meet one. Functions are found by the names of modules and classes, and
    where a decorator closes over them.
    """
    modules = [m for name, m in list(sys.modules.items()) if not name.startswith(_OWN)]
    for cache in {id(c): c for m in modules for c in _caches(m)}.values():
        if cache.cache_info().currsize and _keeps(cache, _DEPTH):
            cache.cache_clear()


def _caches(module: Any) -> Iterator[Any]:
    for value in list(getattr(module, "__dict__", {}).values()):
        yield from _behind(value)
        if isinstance(value, type):
            for inner in list(vars(value).values()):
                # not by getattr: some stand for modules, and import them when they are asked
                held = inner.__func__ if isinstance(inner, classmethod | staticmethod) else inner
                yield from _behind(held)


def _behind(value: Any) -> Iterator[Any]:
    if isinstance(value, _Cache):
        yield value
    elif isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            found = gc.get_referents(cell)
            yield from (c for c in found if isinstance(c, _Cache))


def _keeps(x: Any, depth: int) -> bool:
    if isinstance(x, Tensor):
        return probe.is_fake(x)
    if not depth or isinstance(x, str | int | float | type | FunctionType | ModuleType):
        return False
    return any(_keeps(y, depth - 1) for y in gc.get_referents(x))
