"""Private torch APIs of padded and packed sequences, and of jagged tensors."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from ..later import when_loaded

pad_sequence = torch._C._nn.pad_sequence
pack: Any = torch._C._VariableFunctions._pack_padded_sequence
unpack: Any = torch._C._VariableFunctions._pad_packed_sequence
left_aligned: Any = torch._nested_tensor_from_mask_left_aligned
_JAGGED = "torch.nested._internal.nested_tensor"


def is_jagged(kind: type) -> bool:
    """Whether a class is that of jagged tensors."""
    return kind.__module__ == _JAGGED


def watch_jagged(seen: Callable[[Any], Any]) -> None:
    """Let seen(types) be called of each function of jagged tensors, which may come first in it."""

    def take(module: ModuleType) -> None:
        cls: Any = module.NestedTensor
        own = cls.__torch_function__.__func__

        def ask(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if len(types) > 1:
                seen(types)
            return own(cls, func, types, args, kwargs)

        cls.__torch_function__ = classmethod(ask)

    when_loaded(_JAGGED, take)
