"""Addresses and storages, which a ShardTensor has none of."""

from __future__ import annotations

import sys
from typing import Any

from ..errors import UnsupportedOpError
from .pointwise import function_rule

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
    "share_memory_", "set_", "is_set_to", "_shallow_copy_from", "__dlpack__", "__dlpack_device__",
    "__cuda_array_interface__",
)  # fmt: skip
def memory(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A kernel would read one rank's rows as if they were all."""
    name = func.__self__.fget.__name__ if func.__name__ == "__get__" else func.__name__
    raise UnsupportedOpError(
        f"{name} of a ShardTensor, whose memory is its local tensor's: use x.to_local(), "
        "and register what launches a kernel on it with shardtensor.rule"
    )
