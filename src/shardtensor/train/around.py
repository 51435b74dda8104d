"""A context around a model's forward, by hooks, which stay where it is copied.

Torch runs no hook where what is no Exception ends a call, as KeyboardInterrupt in a notebook. So
the call leaves what it entered, too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import nn

# the contexts that calls on this thread are in: whose they are, in the order in which entered
_here = threading.local()


def around(model: nn.Module, make: Callable[..., Any]) -> None:
    """Run the model's forward inside the context that make(*arguments) gives."""
    mine = object()

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module._compiled_call_impl is None:
            # of a copy of the model, which copies hooks
            module._compiled_call_impl = left(module._call_impl)
        context = make(*args, *kwargs.values())
        context.__enter__()
        _entered().append((mine, context))

    def leave(_: nn.Module, __: Any, out: Any) -> Any:
        # none where a hook before this one raised
        entered = _entered()
        for i in reversed(range(len(entered))):
            if entered[i][0] is mine:
                entered.pop(i)[1].__exit__(None, None, None)
                break
        return out

    model._compiled_call_impl = model._compiled_call_impl or left(model._call_impl)
    model.register_forward_pre_hook(enter, with_kwargs=True)
    model.register_forward_hook(leave, always_call=True)


def _entered() -> list[tuple[object, Any]]:
    found: list[tuple[object, Any]] = _here.__dict__.setdefault("entered", [])
    return found


def left(call: Callable[..., Any]) -> Callable[..., Any]:
    """call, after which all contexts are left that it entered."""

    def run(*args: Any, **kwargs: Any) -> Any:
        entered = _entered()
        before = len(entered)
        try:
            return call(*args, **kwargs)
        finally:
            while len(entered) > before:
                entered.pop()[1].__exit__(None, None, None)

    return run
