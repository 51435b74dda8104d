"""`shardtensor.rule`: rules for torch functions and for what users bring.

Torch functions, custom ops and functions wrapped by torch.overrides dispatch by themselves. A plain
Python function (a Triton launcher, a binding) and a module's forward do not: their name is replaced
by one that asks for ShardTensors first, as soon as their module is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .. import _torch, registry
from ..registry import F, handlers
from ..tensor import ShardTensor


def rule(*keys: Any) -> Callable[[F], F]:
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
      loaded, else when it is; nothing where the module does not have it.

    The decorated function has the signature of what it stands for. At least one argument is a
    ShardTensor; a plain tensor is the same on all ranks. It must decide from specs alone, raise
    UnsupportedOpError before it communicates, and return ShardTensors. A later rule for a key
    replaces the earlier. Raises ValueError for a Python function that no loaded module names:
    wrap that one with `torch.overrides.wrap_torch_function` where it is defined.
    """

    def register(fn: F) -> F:
        run = _checked(fn)
        for key in keys:
            if isinstance(key, str) and "." in key:
                _when_loaded(*key.rpartition(".")[::2], run)
            else:
                registry.rule(*_targets(key))(run)
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


def _targets(key: Any) -> list[Any]:
    if isinstance(key, str):
        return [key]
    if isinstance(key, type) and issubclass(key, nn.Module):
        return [_forward(key)]
    overloads = _torch.ops_of(key)
    if overloads:
        return overloads
    if _torch.is_python_function(key) and not _torch.asks_for_overrides(key):
        return [_named(key)]
    return [key]


class _Finder(MetaPathFinder):
    """Gives a module that is waited for the rules for its functions when it is imported."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[tuple[str, Callable[..., Any]]]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        others = (f for f in sys.meta_path if f is not self)
        found = (f.find_spec(fullname, path, target) for f in others)
        spec = next((s for s in found if s is not None), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_with_rules(module: ModuleType) -> None:
                load(module)
                for name, fn in self.waiting[fullname]:
                    if hasattr(module, name):
                        registry.rule(_named(getattr(module, name)))(fn)

            spec.loader.exec_module = load_with_rules  # type: ignore[method-assign]
        return spec


finder = _Finder()


def _when_loaded(module: str, name: str, fn: Callable[..., Any]) -> None:
    # kept for a module that is imported anew
    finder.waiting.setdefault(module, []).append((name, fn))
    function = getattr(sys.modules.get(module), name, None)
    if function is not None:
        registry.rule(_named(function))(fn)


def _forward(module: type[nn.Module]) -> Callable[..., Any]:
    own = module.__dict__.get("forward")
    if getattr(own, "_asks_shardtensor", False):
        return own  # type: ignore[return-value]
    # a subclass that inherits forward gets one of its own, and its base keeps its own
    module.forward = _asking(module.forward)
    return module.forward


def _named(function: Callable[..., Any]) -> Callable[..., Any]:
    if getattr(function, "_asks_shardtensor", False):
        return function
    asking = _asking(function)
    found = False
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is function:
                setattr(module, name, asking)
                found = True
    if not found:
        raise ValueError(
            f"rule for {function.__qualname__}: no loaded module has it under a name that could be "
            "replaced; decorate it with torch.overrides.wrap_torch_function where it is defined"
        )
    return asking


def _asking(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def ask(*args: Any, **kwargs: Any) -> Any:
        if any(map(_holds_shards, args)) or any(map(_holds_shards, kwargs.values())):
            return handlers[ask](ask, args, kwargs)
        return function(*args, **kwargs)

    ask._asks_shardtensor = True  # type: ignore[attr-defined]
    return ask


def _holds_shards(x: Any) -> bool:
    if isinstance(x, torch.Tensor):
        return isinstance(x, ShardTensor)
    if isinstance(x, list | tuple):
        return any(map(_holds_shards, x))
    return isinstance(x, dict) and any(map(_holds_shards, x.values()))
