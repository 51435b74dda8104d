"""torch._foreach_*: the single op on each tensor of the lists."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedOpError
from .pointwise import function_rule

_NAMES = [name for name in dir(torch) if name.startswith("_foreach_")]
_OTHER = {"norm": torch.linalg.vector_norm}
# these take numbers in the lists, too
_BOUNDS = {"maximum": "clamp_min", "minimum": "clamp_max"}


def _pick(a: Any, i: int) -> Any:
    return a[i] if isinstance(a, list | tuple) else a


@function_rule(*_NAMES)
def foreach(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In place where named so, and then None, as torch returns."""
    name = func.__name__.split(".")[0].removeprefix("_foreach_")
    one = _OTHER.get(name) or getattr(torch.Tensor, name, None)
    new = getattr(torch, f"_foreach_{name.rstrip('_')}", None)
    if one is None and new is not None and name.endswith("_"):
        for x, value in zip(args[0], new(*args, **kwargs), strict=True):
            x.copy_(value)
        return None
    if one is None:
        raise UnsupportedOpError(f"{func.__name__}: call the op on each tensor")
    if name.rstrip("_") in ("addcmul", "addcdiv"):
        # the factor is a keyword of the single op: a number, one for each, or a tensor of those
        factor = kwargs.pop("scalars", None)
        if len(args) > 3:
            *args, factor = args  # type: ignore[assignment]
        if factor is not None:
            kwargs["value"] = factor.tolist() if isinstance(factor, Tensor) else factor
    if name == "pow" and not isinstance(args[0], list | tuple):
        one = torch.pow
    if name.rstrip("_") in _BOUNDS and not isinstance(_pick(args[1], 0), Tensor):
        one = getattr(torch.Tensor, name.replace(name.rstrip("_"), _BOUNDS[name.rstrip("_")]))
    n = next(len(a) for a in (*args, *kwargs.values()) if isinstance(a, list | tuple))
    found = [
        one(*(_pick(a, i) for a in args), **{k: _pick(v, i) for k, v in kwargs.items()})
        for i in range(n)
    ]
    return None if name.endswith("_") else tuple(found)
