# mypy: disable-error-code="attr-defined, assignment, override"
"""Which ops a GPU's autocast casts, for tensors of a CPU, whose own autocast has other lists.

Torch has both on any machine. What its kernel for GPUs does to an op's arguments is asked with
tensors that have no memory and say that they are on a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .dispatcher import fake_mode_here, outside_modes

_aten = torch.ops.aten
_CPU, _GPU = "AutocastCPU", "AutocastCUDA"
_OWN = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
_BELOW = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.AutocastCPU)
# on a GPU they read float16, and give fp32
_WIDENING = {
    _aten.softmax.int: _aten._softmax.default,
    _aten.log_softmax.int: _aten._log_softmax.default,
}


class _Called(Exception):
    """What autocast called once it had cast."""


class _Twin(Tensor):
    """A number on a GPU; notes to which dtypes it and others were cast."""

    casts: list[torch.dtype]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, dtype: torch.dtype, casts: list[torch.dtype]) -> _Twin:
        made = Tensor._make_wrapper_subclass(cls, (), dtype=dtype, device=torch.device("cuda"))
        made.casts = casts
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not _aten._to_copy.default:
            raise _Called(func)
        x, dtype = args[0], kwargs.get("dtype")
        if dtype not in (None, x.dtype):
            x.casts.append(dtype)
        return cls(dtype or x.dtype, x.casts)


# those in which autocast is a GPU's. Kernels do not hold them: torch keeps a kernel that has gone
_modes: list[Any] = []


@contextmanager
def as_on_gpus() -> Iterator[None]:
    """Inside, autocast of CPUs casts what that of GPUs does, and `autocast("cuda")` means it.

    For what runs under this thread's fake mode, backward too: other threads are cast as before.
    """
    library = torch.library.Library("aten", "IMPL", _CPU)
    stock, mode = torch.autocast.__init__, fake_mode_here()
    _modes.append(mode)

    def init(self: Any, device_type: str, dtype: Any = None, *args: Any, **kwargs: Any) -> None:
        if device_type == "cuda" and fake_mode_here() is mode:
            device_type, dtype = "cpu", dtype or torch.get_autocast_dtype("cuda")
        stock(self, device_type, dtype, *args, **kwargs)

    setattr(torch.autocast, "__init__", init)  # noqa: B010
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for op in _listed():
                library.impl(op, _kernel(op), _CPU, with_keyset=True)
        yield
    finally:
        setattr(torch.autocast, "__init__", stock)  # noqa: B010
        library._destroy()
        _modes.remove(mode)


@cache
def _listed() -> list[Any]:
    """The ops that either autocast lists, but for products, which both cast alike."""
    found = []
    for name in torch._C._dispatch_get_all_op_names():
        listed = [torch._C._dispatch_has_kernel_for_dispatch_key(name, k) for k in (_CPU, _GPU)]
        if name.startswith("aten::") and any(listed):
            packet, _, overload = name[len("aten::") :].partition(".")
            op = getattr(getattr(_aten, packet), overload or "default")
            if not all(listed) or _asked(op, torch.float32)[0] == []:
                found.append(op)
    return found


def _asked(op: Any, dtype: torch.dtype) -> tuple[list[torch.dtype], Exception | None]:
    """What arguments of a dtype were cast to, and what ended the call."""
    casts: list[torch.dtype] = []
    asked = [a for a in op._schema.arguments if not a.has_default_value()]
    with outside_modes():
        try:
            op._op_dk(
                torch._C.DispatchKey.AutocastCUDA, *(_like(a.type, dtype, casts) for a in asked)
            )
        except Exception as e:
            return casts, e.with_traceback(None)
    return casts, None


def _like(kind: Any, dtype: torch.dtype, casts: list[torch.dtype]) -> Any:
    """An argument of a type, of the least there is."""
    text = str(kind)
    if text.startswith("List"):
        return [_Twin(dtype, casts) if "Tensor" in text else 1]
    plain = {"Tensor": _Twin(dtype, casts), "bool": False, "str": "mean", "float": 1.0}
    return None if text.startswith("Optional") else plain.get(text, 1)


@cache
def _kernel(op: Any) -> Callable[..., Any]:
    """What autocast does with an op on a GPU, found when it is called first, under a fake mode."""
    listed = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), _GPU)
    stock = _stock(op)

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        here = fake_mode_here()
        if not any(here is mode for mode in _modes):
            return stock(keys, *args, **kwargs)
        if not listed:
            return op.redispatch(keys & _BELOW, *args, **kwargs)
        with torch._C._ExcludeDispatchKeyGuard(_OWN):
            return _way(op)(*args, **kwargs)

    return kernel


@cache
def _stock(op: Any) -> Callable[..., Any]:
    """What autocast does with an op on a CPU."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), _CPU):
        found: Callable[..., Any] = torch.library.get_kernel(op, _CPU).call_boxed
        return found
    return lambda keys, *args, **kwargs: op.redispatch(keys & _BELOW, *args, **kwargs)


@cache
def _way(op: Any) -> Callable[..., Any]:
    """The op with its arguments cast as on a GPU."""
    narrowed, _ = _asked(op, torch.float32)
    widened, end = _asked(op, torch.get_autocast_dtype("cuda"))
    if isinstance(end, RuntimeError) and "autocast" in str(end):
        return _raising(end)
    if narrowed:
        return _cast(op, _narrow)
    if widened:
        return _cast(op, lambda found: torch.float32)
    for target in (op, *(end.args if isinstance(end, _Called) else ())):
        if any(a.name == "dtype" for a in target._schema.arguments):
            return _asking(op, target)
    return _cast(op, lambda found: torch.float32 if torch.float32 in found else _narrow(found))


def _narrow(found: Any) -> torch.dtype:
    return torch.get_autocast_dtype("cpu")


def _raising(error: Exception) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        raise type(error)(*error.args)

    return run


def _is_cast(x: Any) -> bool:
    """Whether autocast looks at it."""
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype is not torch.float64


def _cast(op: Any, chosen: Callable[[set[torch.dtype]], torch.dtype]) -> Callable[..., Any]:
    """The op on arguments of the dtype that is chosen of theirs."""

    def run(*args: Any, **kwargs: Any) -> Any:
        found = {x.dtype for x in pytree.tree_leaves((args, kwargs)) if _is_cast(x)}
        if found:
            dtype = chosen(found)
            args, kwargs = pytree.tree_map(
                lambda x: x.to(dtype) if _is_cast(x) else x, (args, kwargs)
            )
        return op(*args, **kwargs)

    return run


def _asking(op: Any, target: Any) -> Callable[..., Any]:
    """The op with fp32 as the dtype of its result, where the caller asks for none."""
    names = [a.name for a in op._schema.arguments]

    def run(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x = args[0]
        if given.get("dtype") is None and _is_cast(x):
            given["dtype"] = torch.float32
            if op in _WIDENING and x.dtype is torch.float16:
                return _WIDENING[op](x, given["dim"], True)
            return target(**given)
        return op(*args, **kwargs)

    return run
