"""The form of what an op gives, by a rule where one says it: a kernel for "meta" takes longer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._torch import kernels

# (shape, stride, offset, dtype) of a new tensor; an argument, which is the result; or None
Form = tuple[tuple[int, ...], tuple[int, ...], int, torch.dtype]
Forms = Sequence[Form | Tensor | None] | None
_POINTWISE = """
    add sub mul div neg sqrt rsqrt addcmul addcdiv lerp relu gelu silu sigmoid tanh
    threshold_backward gelu_backward silu_backward sigmoid_backward tanh_backward
"""
_IN_PLACE = "add_ sub_ mul_ div_ addcmul_ addcdiv_ lerp_ relu_ copy_ fill_ zero_"
_NEW = "new_empty new_full new_ones new_zeros"
_MAKES_NEW = {"dtype", "layout", "device", "pin_memory"}


def contiguous(shape: Sequence[int], dtype: torch.dtype) -> Form:
    """That of a new tensor whose last dim lies in a row."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(1, n)
    return tuple(shape), tuple(reversed(strides)), 0, dtype


def _alike(given: Sequence[Tensor]) -> bool:
    """Floating, of one shape and dtype, all contiguous."""
    x = given[0]
    if not x.dtype.is_floating_point:
        return False
    shape, dtype = x.shape, x.dtype
    return all(y.shape == shape and y.dtype == dtype and y.is_contiguous() for y in given)


def _pointwise(given: Sequence[Tensor], args: Any, kwargs: Any) -> Forms:
    if not _alike(given) or not _real((*args, *kwargs.values())):
        return None
    return [(tuple(given[0].shape), given[0].stride(), 0, given[0].dtype)]


def _in_place(given: Sequence[Tensor], args: Any, kwargs: Any) -> Forms:
    return [args[0]] if _alike(given) and _real((*args[1:], *kwargs.values())) else None


def _real(args: Sequence[Any]) -> bool:
    return not any(isinstance(a, complex) for a in args)


def _new(given: Sequence[Tensor], args: Any, kwargs: Any) -> Forms:
    if not kwargs.keys() <= _MAKES_NEW or kwargs.get("layout") not in (None, torch.strided):
        return None
    return [contiguous(args[1], kwargs.get("dtype") or given[0].dtype)]


def _cast(given: Sequence[Tensor], args: Any, kwargs: Any) -> Forms:
    x, form = args[0], kwargs.get("memory_format")
    if form not in (None, torch.contiguous_format, torch.preserve_format) or not x.is_contiguous():
        return None
    if kwargs.get("layout") not in (None, torch.strided):
        return None
    return [(tuple(x.shape), x.stride(), 0, kwargs.get("dtype") or x.dtype)]


def _batch_norm(given: Sequence[Tensor], args: Any, kwargs: Any) -> Forms:
    x, *_, training, _, _ = args
    if x.ndim < 2 or not x.is_contiguous():
        return None
    kept = contiguous((x.shape[1] if training else 0,), x.dtype)
    return [(tuple(x.shape), x.stride(), 0, x.dtype), kept, kept]


def _batch_norm_backward(given: Sequence[Tensor], args: Any, kwargs: Any) -> Forms:
    grad, x, weight, *_, mask = args
    if x.ndim < 2 or (mask[0] and not _alike((grad, x))):
        return None
    each = contiguous((x.shape[1],), x.dtype if weight is None else weight.dtype)
    own = (tuple(x.shape), x.stride(), 0, x.dtype)
    return [form if m else None for form, m in zip((own, each, each), mask, strict=True)]


def _softmax(given: Sequence[Tensor], args: Any, kwargs: Any) -> Forms:
    """On GPUs float16 may give fp32."""
    x, _, widens = args
    if not x.is_contiguous():
        return None
    return [(tuple(x.shape), x.stride(), 0, torch.float32 if widens else x.dtype)]


def _softmax_backward(given: Sequence[Tensor], args: Any, kwargs: Any) -> Forms:
    grad, _, _, dtype = args
    return [(tuple(grad.shape), grad.stride(), 0, dtype)] if grad.is_contiguous() else None


def _statistics(given: Sequence[Tensor], args: Any, kwargs: Any) -> Forms:
    """There is no kernel for "meta": a fake mode would run it on real zeros as large as x."""
    x, kept, *_ = args
    dtype = x.dtype if kept is None else torch.promote_types(x.dtype, kept.dtype)
    return [contiguous((x.shape[1],), dtype)] * 2


def _in_rows(x: Tensor, weight: Tensor, bias: Any, sizes: Any, settings: Any) -> bool:
    """Whether what a convolution gives is contiguous, as what it takes is."""
    if x.ndim < 4 or x.dtype != weight.dtype or not (x.is_contiguous() and weight.is_contiguous()):
        return False
    # of sizes of one the strides do not say how it lies
    if min(*x.shape, *weight.shape[:2]) < 2 or len(settings[0]) != x.ndim - 2:
        return False
    library = kernels.conv_backend(x, weight, bias, *settings, sizes)
    return bool(kernels.conv_format(x, weight, library) == torch.contiguous_format)


def _convolved(given: Sequence[Tensor], args: Any, kwargs: Any) -> Forms:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = args
    if transposed or not _in_rows(x, weight, bias, None, args[3:]):
        return None
    if x.shape[1] != groups * weight.shape[1] or weight.shape[0] % groups:
        return None
    sides = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    places = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides]
    return (
        [contiguous((x.shape[0], weight.shape[0], *places), x.dtype)] if min(places) > 0 else None
    )


def _convolved_backward(given: Sequence[Tensor], args: Any, kwargs: Any) -> Forms:
    grad, x, weight, sizes, *settings, mask = args
    if grad.dtype != x.dtype or not _in_rows(x, weight, None, sizes, settings):
        return None
    shapes = (x.shape, weight.shape, sizes)
    return [contiguous(s, x.dtype) if m else None for s, m in zip(shapes, mask, strict=True)]


_FORMS: dict[str, Callable[[Sequence[Tensor], Any, Any], Forms]] = {
    **dict.fromkeys(_POINTWISE.split(), _pointwise),
    **dict.fromkeys(_IN_PLACE.split(), _in_place),
    **dict.fromkeys(_NEW.split(), _new),
    "_to_copy": _cast,
    "native_batch_norm": _batch_norm,
    "native_batch_norm_backward": _batch_norm_backward,
    **dict.fromkeys(("_softmax", "_log_softmax"), _softmax),
    **dict.fromkeys(("_softmax_backward_data", "_log_softmax_backward_data"), _softmax_backward),
    "batch_norm_update_stats": _statistics,
    "convolution": _convolved,
    "convolution_backward": _convolved_backward,
}


def forms(name: str, given: Sequence[Tensor], args: Any, kwargs: Any) -> Forms:
    """Those of an op's results; None where no rule says them. given: its tensors."""
    rule = _FORMS.get(name)
    return None if rule is None or not given or "out" in kwargs else rule(given, args, kwargs)
