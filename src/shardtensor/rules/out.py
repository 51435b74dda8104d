"""`out=` arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import UnsupportedOpError
from ..registry import OUT, rule
from ..tensor import ShardTensor
from ..tensor.redistribute import reduced

# what torch returns nothing for where `out=` is given
_SILENT = ("split_copy", "split_with_sizes_copy", "unbind_copy")


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

    Tried with tensors of two rows, as kernels refuse what shapes alone allow.
    """

    def small(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return torch.ones([min(n, 2) for n in x.shape], dtype=x.dtype)

    name = func.__name__.split(".")[0]
    given = pytree.tree_map(small, (args, kwargs), is_leaf=lambda x: isinstance(x, Tensor))
    try:
        with torch.no_grad():
            tried = func(*given[0], **given[1])
            tried = tried if isinstance(tried, tuple | list) else [tried]
            empty = [
                torch.empty_like(t, dtype=o.dtype) for t, (o, _) in zip(tried, pairs, strict=False)
            ]
            func(
                *given[0],
                **given[1],
                out=type(out)(empty) if isinstance(out, tuple | list) else empty[0],
            )
    except (RuntimeError, TypeError, ValueError, IndexError) as e:
        words = str(e).splitlines()[0]
        if any(
            word in words for word in ("type", "cast", "expected", "implemented", "only supports")
        ):
            raise type(e)(f"{name}, out=: {words}") from e
        raise UnsupportedOpError(
            f"{name}: out= of {pairs[0][0].dtype} for a result of {pairs[0][1].dtype}: "
            "give one of its dtype"
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
