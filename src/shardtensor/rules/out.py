"""`out=` arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch.trial import few
from ..errors import UnsupportedOpError
from ..registry import OUT, rule
from ..tensor import ShardTensor
from ..tensor.redistribute import reduced

# what torch returns nothing for where `out=` is given
_SILENT = ("split_copy", "split_with_sizes_copy", "unbind_copy")
# words of the errors that are about dtypes
_OF_DTYPES = ("type", "cast", "expected", "implemented", "only supports")


@rule(OUT)
def fill_out(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, result: Any
) -> Any:
    """Write what func gave into the ShardTensor(s) given as `out=`."""
    several = isinstance(out, tuple | list)
    if several is isinstance(result, Tensor) or (several and len(out) != len(result)):
        raise RuntimeError(f"{func.__name__}: out= does not have the form of the result")
    pairs = list(zip(out, result, strict=True)) if several else [(out, result)]
    if any(o.dtype != r.dtype and o.shape == r.shape for o, r in pairs):
        _check_dtypes(func, args, kwargs, out, pairs)
    written = [_written(o, r) for o, r in pairs]
    if func.__name__.split(".")[0] in _SILENT:
        return None
    return type(result)(written) if several else written[0]


def _check_dtypes(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, pairs: list[Any]
) -> None:
    """Raise what torch raises for an `out=` of another dtype: ops differ in what they cast.

    Tried on a few ones, as kernels refuse what shapes alone allow.
    """
    name = func.__name__.split(".")[0]
    (args, kwargs) = few((args, kwargs))
    try:
        with torch.no_grad():
            made = func(*args, **kwargs)
            made = made if isinstance(made, tuple | list) else [made]
            into = [
                torch.empty_like(m, dtype=o.dtype) for m, (o, _) in zip(made, pairs, strict=False)
            ]
            func(*args, **kwargs, out=type(out)(into) if isinstance(out, tuple | list) else into[0])
    except (RuntimeError, TypeError, ValueError, IndexError) as e:
        said = str(e).splitlines()[0]
        if any(word in said for word in _OF_DTYPES):
            raise type(e)(f"{name}, out=: {said}") from e
        o, r = pairs[0]
        raise UnsupportedOpError(
            f"{name}: out= of {o.dtype} for a result of {r.dtype}: give one of its dtype"
        ) from e


def _written(out: Any, result: Any) -> Any:
    result = reduced(result)
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
    return out.copy_(result)
