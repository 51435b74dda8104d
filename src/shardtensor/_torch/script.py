# mypy: disable-error-code="attr-defined, method-assign"
"""Private torch APIs of TorchScript: functions and methods as something that Python calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Scripted = (torch._C.ScriptFunction, torch._C.ScriptMethod)
_call = torch._C.ScriptFunction.__call__


def install_script_hook(around: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
    """Let around(function, args, kwargs) see calls of scripted functions; None: call on.

    Scripted methods ask for `__torch_function__` by themselves.
    """

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        handler = around(self, args, kwargs)
        return _call(self, *args, **kwargs) if handler is None else handler(self, args, kwargs)

    torch._C.ScriptFunction.__call__ = run


def python_of(function: Any) -> Callable[..., Any] | None:
    """The Python function that was scripted; None for what was traced or loaded."""
    # a traced function names its origin too, but may not do the same
    known = getattr(function, "__dict__", {})
    return known.get("_torchdynamo_inline") if known.get("__name__") == "ScriptFunction" else None


def op_by_op(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """(program, arguments): the graph of a scripted function or method, run as it is written.

    Its own executor fuses ops and takes gradients by itself after some calls.
    """
    program = torch._C._create_function_from_graph("op_by_op", function.graph)
    owner = (function.owner,) if isinstance(function, torch._C.ScriptMethod) else ()
    given = list(args)
    for a in function.schema.arguments[len(owner) + len(args) :]:
        if a.name not in kwargs and not a.has_default_value():
            raise TypeError(f"{function.name}() is missing a value for argument '{a.name}'")
        given.append(kwargs.pop(a.name) if a.name in kwargs else a.default_value)
    if kwargs:
        raise TypeError(f"{function.name}() got unexpected arguments {sorted(kwargs)}")

    def run(*args: Any) -> Any:
        with torch.jit.optimized_execution(False):
            return _call(program, *owner, *args)

    return run, tuple(given)
