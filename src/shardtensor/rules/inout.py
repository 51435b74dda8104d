"""`out=` arguments."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UnsupportedOpError
from ..redistribute import reduced
from ..tensor import ShardTensor


def fill_out(out: Any, result: Any) -> Any:
    """Write a result into the ShardTensor(s) given as `out=`."""
    if isinstance(out, tuple | list):
        return type(result)(fill_out(o, r) for o, r in zip(out, result, strict=True))
    result = reduced(result) if isinstance(result, ShardTensor) else result
    if torch.is_grad_enabled() and (out.requires_grad or result.requires_grad):
        raise RuntimeError(
            "functions with out=... arguments don't support automatic differentiation, but one of "
            "the arguments requires grad."
        )
    if not isinstance(out, ShardTensor) and not out.numel() and out.shape != result.shape:
        out.resize_(result.shape)
    if out.shape != result.shape:
        raise UnsupportedOpError(
            f"out= of shape {tuple(out.shape)} for a result of shape {tuple(result.shape)}"
        )
    if not torch.can_cast(result.dtype, out.dtype):
        raise RuntimeError(f"out= of {out.dtype} for a result of {result.dtype}")
    return out.copy_(result)
