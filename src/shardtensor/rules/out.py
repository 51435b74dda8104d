"""`out=` arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _torch
from ..errors import UnsupportedOpError
from ..registry import OUT, rule
from ..tensor import ShardTensor
from ..tensor.redistribute import reduced

# what torch returns nothing for where `out=` is given
_SILENT = ("split_copy", "split_with_sizes_copy", "unbind_copy")
# what casts its result to the dtype of `out=` as pointwise ops do; the others want their own
_CASTING = {
    "cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack",
    "row_stack", "sum", "nansum", "mean", "prod", "cumsum", "cumprod", "var", "std", "logsumexp",
    "all", "any",
}  # fmt: skip


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
    """Raise what torch raises for an `out=` of another dtype: ops differ in what they cast."""

    def meta(x: Any) -> Any:
        return torch.empty(x.shape, dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x

    name = func.__name__.split(".")[0]
    given = pytree.tree_map(meta, (args, {**kwargs, "out": out}))
    try:
        with torch.no_grad():
            func(*given[0], **given[1])
    except NotImplementedError:
        pass
    except (RuntimeError, TypeError) as e:
        if any(word in str(e) for word in ("dtype", "type", "cast")):
            raise type(e)(f"{name}, out=: {e}") from e
    casting = name in _CASTING or not any(
        isinstance(x, Tensor) for x in pytree.tree_leaves(given[0])
    )
    casting = casting or (
        not name.startswith("clamp")
        and _torch.is_pointwise(getattr(torch.ops.aten, name.removeprefix("special_"), None))
    )
    for o, r in pairs:
        if o.dtype == r.dtype or (casting and torch.can_cast(r.dtype, o.dtype)):
            continue
        raise UnsupportedOpError(
            f"{name}: out= of {o.dtype} for a result of {r.dtype}: give one of its dtype"
        )


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
