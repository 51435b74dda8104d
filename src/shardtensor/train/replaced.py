"""Parameters that were replaced in their model: an optimizer that holds one raises at its step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .optimizers import check_sharded

# how often parameters were replaced; when an optimizer was looked at, and how many groups it had
_times = 0
_seen: WeakKeyDictionary[Optimizer, tuple[int, int]] = WeakKeyDictionary()


@contextmanager
def replacing(model: nn.Module, by: str) -> Iterator[None]:
    """Inside, parameters of the model are replaced by others; by: who does so."""
    global _times
    before = list(model.parameters())
    yield
    after = {id(p) for p in model.parameters()}
    _watch()
    _times += 1
    for p in before:
        if id(p) not in after:
            p._shardtensor_replaced = by  # type: ignore[attr-defined]


def check_made(model: nn.Module, by: str) -> None:
    """Raise ValueError if a module is still to make its parameters (nn.LazyLinear)."""
    for name, module in model.named_modules():
        if any(is_lazy(p) for p in (*module._parameters.values(), *module._buffers.values())):
            raise ValueError(
                f"{by}: {name or 'the model'} ({type(module).__name__}) makes its parameters at "
                "its first call: call the model once before, on an input of the right shape"
            )


@cache
def _watch() -> None:
    register_optimizer_step_pre_hook(_check)


def _check(optimizer: Optimizer, *_: Any) -> None:
    now = _times, len(optimizer.param_groups)
    if _seen.get(optimizer) == now:
        return
    for by in _replaced(p for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"this {type(optimizer).__name__} holds parameters that {by} has replaced in their "
            f"model, so it would step nothing: make the optimizer after {by}"
        )
    check_sharded(optimizer)
    _seen[optimizer] = now


def _replaced(parameters: Iterable[nn.Parameter]) -> Iterator[str]:
    for p in parameters:
        by = getattr(p, "_shardtensor_replaced", None)
        if by is not None:
            yield by
