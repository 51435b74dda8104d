"""Large tensors that a model makes of sizes, indices and coordinates alone, made sharded.

A bias of each pair of tokens, the mask of shifted windows, zeros that modes are written to: plain
code makes them whole on every rank before they meet a shard. Inside `sharding` the call that begins
such a tensor gives a ShardTensor, of which each rank makes its own rows; the ops that follow have
rules. What a model makes of weights alone stays whole: it is used as a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch.overrides import TorchFunctionMode

from .. import _torch, settings
from .begun import BEGINS, PLAIN, Where


class _Making(TorchFunctionMode):
    def __init__(self, where: Where) -> None:
        super().__init__()
        self.where = where

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        begin = BEGINS.get(func)
        if begin is not None and PLAIN.issuperset(types) and _eager():
            out = begin(self.where, func, args, kwargs or {})
            if out is not NotImplemented:
                return out
        return func(*args, **(kwargs or {}))


def _eager() -> bool:
    return not (_torch.is_tracing() or _torch.transforming())


@contextmanager
def sharding(where: Where) -> Iterator[None]:
    """Inside, large tensors that are made of sizes, indices and coordinates alone are sharded."""
    with settings.setting("made", where), _Making(where):
        yield


def around(inputs: Sequence[Any], least: float) -> AbstractContextManager[None]:
    """`sharding` where inputs of a model's forward lie; from how many bytes on."""
    where = None if _torch.is_tracing() else Where.of(inputs, least)
    return sharding(where) if where else nullcontext()


settings.contexts["made"] = _Making
