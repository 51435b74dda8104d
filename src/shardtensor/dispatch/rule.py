"""`shardtensor.rule`: rules for torch functions and for what users bring.

Torch functions, custom ops and functions wrapped by torch.overrides dispatch by themselves. A plain
Python function (a Triton launcher, a binding) and a module's forward do not: their name is replaced
by one that asks for ShardTensors first, as soon as their module is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial, wraps
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from .. import _torch, registry
from ..later import when_loaded
from ..registry import F, handlers
from ..tensor import ShardTensor


def rule(*keys: Any, captured: bool = False) -> Callable[[F], F]:
    """Register the decorated function as what happens to calls with ShardTensors.

    keys, each of them one of
    - a torch function or method (`F.interpolate`, `torch.Tensor.sum`), or an aten name ("conv2d"),
      which covers the function, the method and the op of that name;
    - an op: what `torch.library.custom_op` returned, `torch.ops.lib.op`, or an overload of one;
    - a `torch.autograd.Function`: its `apply`;
    - an `nn.Module` class: its `forward`, the module being the first argument;
    - a Python function of a module: its name is replaced wherever loaded modules have it. The
      original is its `__wrapped__`;
    - the full name of such a function ("natten.functional.na2d"): the same, now if its module is
      loaded, else when it is; nothing where the module does not have it. Of an op, too.

    The decorated function has the signature of what it stands for. At least one argument is a
    ShardTensor; a plain tensor is the same on all ranks. It must decide from specs alone, raise
    UnsupportedOpError before it communicates, and return ShardTensors. A later rule for a key
    replaces the earlier. captured: calls with functions that capture a ShardTensor, too, of a
    Python function. Raises ValueError for a Python function that no loaded module names:
    wrap that one with `torch.overrides.wrap_torch_function` where it is defined.
    """

    def register(fn: F) -> F:
        run = _checked(fn)
        names: dict[str, list[str]] = {}
        for key in keys:
            if isinstance(key, str) and "." in key:
                module, _, name = key.rpartition(".")
                names.setdefault(module, []).append(name)
            else:
                registry.rule(*_targets(key, captured))(run)
        for module, waiting in names.items():
            when_loaded(module, partial(_take, waiting, run, captured))
        return fn

    return register


def _checked(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The rule, whose results are held to their specs: a wrong shape shows here, not ops later."""

    @wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        out = fn(*args, **kwargs)
        for x in out if isinstance(out, list | tuple) else (out,):
            if isinstance(x, ShardTensor) and x._local.shape != x._spec.local_shape:
                raise RuntimeError(
                    f"the rule {fn.__qualname__} gave a local tensor of shape "
                    f"{tuple(x._local.shape)} for {x._spec}, which has "
                    f"{tuple(x._spec.local_shape)} on this rank"
                )
        return out

    # what is said of the rule later is said of this, too
    run.__dict__ = fn.__dict__
    return run


def _targets(key: Any, captured: bool) -> list[Any]:
    if isinstance(key, str):
        return [key]
    if isinstance(key, type) and issubclass(key, nn.Module):
        return [_forward(key)]
    overloads = _torch.ops_of(key)
    if overloads:
        return overloads
    if _torch.is_python_function(key) and not _torch.asks_for_overrides(key):
        return _named([key], captured)
    return [key]


def _take(names: list[str], run: Callable[..., Any], captured: bool, module: ModuleType) -> None:
    found = [getattr(module, n) for n in names if hasattr(module, n)]
    ops = [overload for f in found for overload in _torch.ops_of(f)]
    functions = [f for f in found if not _torch.ops_of(f)]
    registry.rule(*ops, *_named(functions, captured))(run)


def _forward(module: type[nn.Module]) -> Callable[..., Any]:
    own = module.__dict__.get("forward")
    if getattr(own, "_asks_shardtensor", False):
        return own  # type: ignore[return-value]
    # a subclass that inherits forward gets one of its own, and its base keeps its own
    module.forward = _asking(module.forward)
    return module.forward


def _named(functions: Sequence[Callable[..., Any]], captured: bool) -> list[Callable[..., Any]]:
    """What asks for ShardTensors in the place of each function; all modules are looked through."""
    holds = captures_shards if captured else _holds_shards
    asking = {
        id(f): _asking(f, holds) for f in functions if not getattr(f, "_asks_shardtensor", False)
    }
    found = set()
    for module in list(sys.modules.values()) if asking else ():
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in asking:
                setattr(module, name, asking[id(value)])
                found.add(id(value))
    for f in functions:
        if id(f) in asking and id(f) not in found:
            raise ValueError(
                f"rule for {f.__qualname__}: no loaded module has it under a name that could be "
                "replaced; decorate it with torch.overrides.wrap_torch_function where it is defined"
            )
    return [asking.get(id(f), f) for f in functions]


def _asking(
    function: Callable[..., Any], holds: Callable[[Any], bool] | None = None
) -> Callable[..., Any]:
    holds = holds or _holds_shards

    @wraps(function)
    def ask(*args: Any, **kwargs: Any) -> Any:
        if any(map(holds, args)) or any(map(holds, kwargs.values())):
            return _handled(ask, args, kwargs)
        return function(*args, **kwargs)

    ask._asks_shardtensor = True  # type: ignore[attr-defined]
    return ask


def _holds_shards(x: Any) -> bool:
    if isinstance(x, torch.Tensor):
        return isinstance(x, ShardTensor)
    if isinstance(x, list | tuple):
        return any(map(_holds_shards, x))
    return isinstance(x, dict) and any(map(_holds_shards, x.values()))


def _handled(ask: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return handlers[ask](ask, args, kwargs)


_torch.hide_from_dynamo(_handled)


def captures_shards(x: Any, depth: int = 4) -> bool:
    """Whether x holds ShardTensors, or a function that captures some, or an object with some."""
    if not depth or torch.compiler.is_compiling():
        return _holds_shards(x)
    if isinstance(x, torch.Tensor | int | float | str | type | ModuleType) or x is None:
        return isinstance(x, ShardTensor)
    if isinstance(x, FunctionType):
        inside: Any = [*_contents(x), *(x.__defaults__ or ())]
    elif isinstance(x, list | tuple):
        inside = x
    elif isinstance(x, dict):
        inside = x.values()
    elif isinstance(x, partial):
        inside = (x.func, *x.args, *x.keywords.values())
    elif isinstance(x, MethodType):
        inside = (x.__self__, x.__func__)
    else:
        inside = getattr(x, "__dict__", {}).values()
    return any(captures_shards(y, depth - 1) for y in inside)


def _contents(function: FunctionType) -> list[Any]:
    """What a function's closure holds, of cells that are filled."""
    found = list[Any]()
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:
            continue
    return found
