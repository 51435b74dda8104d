"""Addresses and storages, which a ShardTensor has none of."""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import UnsupportedOpError
from ..registry import method
from ..tensor import ShardTensor
from ..tensor.offset import begins_its_memory
from ..tensor.redistribute import replicate
from .pointwise import copy_, function_rule

_HERE = __name__.split(".")[0]


@function_rule("data_ptr")
def data_ptr(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Torch itself takes an address of zero for a tensor without memory of its own."""
    frame: Any = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_HERE):
        frame = frame.f_back
    if frame is not None and frame.f_globals.get("__name__", "").startswith("torch."):
        return 0
    return memory(func, args, kwargs)


@function_rule(
    "mutable_data_ptr", "untyped_storage", "storage", "_typed_storage", "storage_type",
    "share_memory_", "set_", "is_set_to", "_shallow_copy_from", "__dlpack__",
    "__dlpack_device__", "__cuda_array_interface__",
)  # fmt: skip
def memory(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A kernel would read one rank's rows as if they were all."""
    name = func.__self__.fget.__name__ if func.__name__ == "__get__" else func.__name__
    raise UnsupportedOpError(
        f"{name} of a ShardTensor, whose memory is its local tensor's: use x.to_local(), "
        "and register what launches a kernel on it with shardtensor.rule"
    )


@function_rule("storage_offset")
def storage_offset(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Zero of what no slice was taken of: subclasses that wrap a tensor ask for it (torchao's)."""
    if begins_its_memory(args[0]):
        return 0
    raise UnsupportedOpError(
        f"storage_offset of a ShardTensor on {args[0]._spec} whose place in memory is not known "
        "(a slice of a tensor): .clone() it first"
    )


@method
def as_subclass(x: ShardTensor, cls: type) -> NoReturn:
    """A ShardTensor is of a class of its own. Torch does not dispatch this one."""
    raise UnsupportedOpError(
        "as_subclass of a ShardTensor, which is of one: let the subclass wrap it "
        "(Tensor._make_wrapper_subclass), or take x.full_tensor()"
    )


@function_rule("apply_", "map_", "map2_")
def apply_(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A Python function of each element, in the order of one device; each rank runs all."""
    x = args[0]
    inside = [replicate(a)._local if isinstance(a, ShardTensor) else a for a in args[1:]]
    return copy_(x, func(replicate(x)._local.clone(), *inside, **kwargs))


# where C++ takes a ShardTensor for a plain tensor and reads memory that it has not ----------------

_data: Any = torch.Tensor.data


def _set_data(x: Tensor, value: Any) -> None:
    if isinstance(value, ShardTensor) and not isinstance(x, ShardTensor):
        raise UnsupportedOpError(
            f"plain.data = a ShardTensor on {value._spec}: a plain tensor is whole on every rank; "
            "assign value.full_tensor()"
        )
    _data.__set__(x, value)


def _to_dlpack(convert: Any) -> Any:
    @wraps(convert)
    def to_dlpack(tensor: Any) -> Any:
        return (
            memory(convert, (tensor,), {}) if isinstance(tensor, ShardTensor) else convert(tensor)
        )

    return to_dlpack


torch.Tensor.data = property(_data.__get__, _set_data, doc=_data.__doc__)  # type: ignore[assignment]
_convert = torch.to_dlpack
for _module in list(sys.modules.values()):
    # by its name in every module that has it already
    if getattr(_module, "__dict__", {}).get("to_dlpack") is _convert:
        _module.to_dlpack = _to_dlpack(_convert)  # type: ignore[attr-defined]
