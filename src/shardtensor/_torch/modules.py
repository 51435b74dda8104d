# mypy: disable-error-code="assignment"
"""Private torch APIs of modules: other tensors in the place of parameters, and cached ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize, stateless

from .dispatcher import hide_from_dynamo


def install(given: Callable[[Any, Any], Any]) -> None:
    """Map the tensors of torch.func.functional_call: given(module, tensors by name)."""
    call = stateless._functional_call

    def run(module: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        return call(module, given(module, tensors), *args, **kwargs)

    hide_from_dynamo(run)
    stateless._functional_call = run


@contextmanager
def in_their_place(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Inside, tensors by name are the parameters and buffers of a module.

    A recurrent one has lists of its weights, which it would make anew for others.
    """
    with stateless._reparametrize_module(module, tensors):
        layers = [m for m in module.modules() if isinstance(m, nn.RNNBase)]
        lists = [kept for m in layers for kept in (m._flat_weights, m._flat_weight_refs)]
        had = [[*kept] for kept in lists]
        for m in layers:
            m._flat_weights[:] = [getattr(m, name, None) for name in m._flat_weights_names]
            m._flat_weight_refs[:] = [w if w is None else weakref.ref(w) for w in m._flat_weights]
        try:
            yield
        finally:
            for kept, before in zip(lists, had, strict=True):
                kept[:] = before


def cached_weights() -> tuple[int, Any]:
    """How often `parametrize.cached` surrounds the process, and what it has kept."""
    return parametrize._cache_enabled, parametrize._cache


def cache_weights(enabled: int, kept: Any) -> None:
    """Let it go on from there; copies of a module have one key."""
    parametrize._cache_enabled, parametrize._cache = enabled, kept
