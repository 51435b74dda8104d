"""Losses: the mean is that of the whole tensor, whatever the sizes of the shards.

Elementwise losses run without reduction on aligned operands; then the global mean or sum. Losses
that PyTorch composes of other ops need no rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _torch
from ..errors import UnsupportedOpError
from ..registry import rule
from ..tensor import wrap
from . import labels
from .agreed import agreed_sums
from .pointwise import function_rule, pointwise
from .reduce import wide

NONE, MEAN, SUM = 0, 1, 2


def _reduced(x: Tensor, reduction: int) -> Tensor:
    return x.mean() if reduction == MEAN else x.sum() if reduction == SUM else x


@cache
def _unreduced(name: str) -> tuple[Any, list[str]]:
    """The loss of every element, and the names of aten's arguments."""
    overload = _torch.overloads(_torch.aten_packet(name))[0]

    def each(*tensors: Tensor, **rest: Any) -> Tensor:
        return overload(*tensors, **rest, reduction=NONE)

    each.__name__ = name
    return each, [a.name for a in overload._schema.arguments]


@function_rule(
    "mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "soft_margin_loss",
    "binary_cross_entropy_with_logits",
)  # fmt: skip
def elementwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    each, names = _unreduced(func.__name__.split(".")[0])
    given = dict(zip(names, args, strict=False))
    given |= {"self" if k == "input" else k: v for k, v in kwargs.items()}
    reduction = given.pop("reduction", MEAN)
    tensors = (given.pop("self"), given.pop("target"))
    if tensors[0].shape != tensors[1].shape:
        given_shape = tensors[0].shape
        tensors = torch.broadcast_tensors(*tensors)
        if each.__name__ == "soft_margin_loss" and tensors[0].shape != given_shape:
            raise RuntimeError(
                f"soft_margin_loss: output with shape {list(given_shape)} doesn't match the "
                f"broadcast shape {list(tensors[0].shape)}"
            )
    rest = {k: v for k, v in given.items() if v is not None}
    if each.__name__ != "binary_cross_entropy":
        return _reduced(pointwise(each, tensors, rest), reduction)
    operands = (*tensors, *rest.values())
    terms = labels.elementwise(*(x.ndim for x in operands))
    return _checked(terms, lambda x, t, *w: each(x, t, *w), operands, reduction)


def _checked(
    terms: str | tuple[labels.Labels, ...],
    fn: Callable[..., Tensor],
    operands: Sequence[Tensor | None],
    reduction: int,
) -> Tensor:
    """The mean or sum of what fn gives for each element; its error on one rank is raised on all."""
    p = labels.plan(terms, *operands)
    local = p.fit(operands)
    if reduction == NONE:
        return p.result(fn(*local))
    dtype = local[0].dtype
    (total,) = agreed_sums(lambda: [fn(*local).sum(dtype=wide(dtype))], 1, p.out, wide(dtype))
    total = total / p.out.shape.numel() if reduction == MEAN else total
    return wrap(total.to(dtype), p.out.with_dims(()))


@cache
def _terms(ndim: int) -> tuple[labels.Labels, ...]:
    """Labels of scores (N, C, d...), class indices (N, d...), weights (C,), and each one's loss."""
    places = tuple([f"d{i}" for i in range(ndim - 1)])
    return (*places[:1], "C", *places[1:]), places, ("C",), places


@rule("nll_loss", "nll_loss2d", "nll_loss_nd")
def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
) -> Tensor:
    """input: log-probabilities (N, C, d...); target: class indices (N, d...)."""
    return _nll(input, target, weight, reduction, ignore_index, 0.0)


@rule("cross_entropy_loss")
def cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """input: logits (N, C, d...); target: class indices (N, d...) or probabilities (N, C, d...)."""
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    classes = 0 if input.ndim == 1 else 1
    if target.is_floating_point() and target.shape == input.shape:
        p = target
        if label_smoothing:
            p = p * (1 - label_smoothing) + label_smoothing / input.shape[classes]
        if weight is not None:
            p = p * weight.view(-1, *[1] * (input.ndim - classes - 1))
        each = -(F.log_softmax(input, classes) * p).sum(classes)
        return _reduced(each, reduction)
    logs = F.log_softmax(input, classes)
    return _nll(logs, target, weight, reduction, ignore_index, label_smoothing)


def _nll(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    smoothing: float,
) -> Tensor:
    """The loss of every element, or reduced: its sums and the weight's in one message."""
    classes = 0 if input.ndim == 1 else 1
    if not input.ndim:
        raise RuntimeError("loss: an input of classes has 1 dim or more")
    if (*input.shape[:classes], *input.shape[classes + 1 :]) != tuple(target.shape):
        raise UnsupportedOpError(
            f"loss of input {tuple(input.shape)} and target {tuple(target.shape)}: "
            "the shapes differ"
        )
    _check_classes(input, target, weight, classes)
    p = labels.plan(_terms(input.ndim), input, target, weight)
    logs, t, w = p.fit((input, target, weight))
    t = t.long()
    valid = t != ignore_index

    def parts() -> list[Tensor]:
        """The addends of the loss of every element, then its weight."""
        index = torch.where(valid, t, 0)
        scale = valid.to(logs.dtype) if w is None else torch.where(valid, w[index], 0)
        picked = logs.gather(classes, index.unsqueeze(classes)).squeeze(classes)
        # torch's forward mode takes the weights as constants
        each = [-picked * (scale.detach() if _torch.transforming() else scale)]
        if smoothing:
            shape = [-1] + [1] * (logs.ndim - classes - 1)
            each.append(-(logs if w is None else logs * w.view(shape)).sum(classes))
        # what is ignored has no gradient, even where the mean of nothing has one that is not finite
        return [*(torch.where(valid, p, 0) for p in each), scale.detach()]

    def smoothed(values: Sequence[Tensor]) -> Tensor:
        if not smoothing:
            return values[0]
        return (1 - smoothing) * values[0] + smoothing / logs.shape[classes] * values[1]

    if reduction == NONE:
        try:
            return p.result(smoothed(parts()))
        except RuntimeError as e:
            if "out of bounds" not in str(e):
                raise
            # of torch's type, with the place where it was raised, at which `apart.note` looks
            raise IndexError(str(e)).with_traceback(e.__traceback__) from None
    # all sums in one message
    dtype = wide(logs.dtype)
    *totals, weights = agreed_sums(
        lambda: [v.sum(dtype=dtype) for v in parts()],
        3 if smoothing else 2, p.out, dtype, IndexError,
    )  # fmt: skip
    total = smoothed([t / weights for t in totals] if reduction == MEAN else totals)
    return wrap(total.to(logs.dtype), p.out.with_dims(()))


def _check_classes(x: Tensor, target: Tensor, weight: Tensor | None, classes: int) -> None:
    """Torch's own conditions, which shards without elements would not meet."""
    if target.dtype is not torch.int64 and (target.dtype is not torch.uint8 or x.ndim > 2):
        raise RuntimeError(f"loss: class indices of {target.dtype}; torch.int64 is expected")
    if weight is None:
        return
    if tuple(weight.shape) != (x.shape[classes],):
        raise RuntimeError(
            f"loss: a weight of shape {tuple(weight.shape)} for {x.shape[classes]} classes"
        )
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise RuntimeError(f"loss: a weight of {weight.dtype} for an input of {x.dtype}")


@rule("multi_margin_loss")
def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: float = 1,
    margin: float = 1,
    weight: Tensor | None = None,
    reduction: int = MEAN,
) -> Tensor:
    """input: scores (N, C), (C,) or one; target: class indices (N,) or one."""
    if input.ndim < 2:
        found = multi_margin_loss(
            input.reshape(1, -1), target.reshape(1), p, margin, weight, reduction
        )
        return found.reshape(target.shape) if reduction == NONE else found

    def each(x: Tensor, t: Tensor, w: Tensor | None) -> Tensor:
        return torch.ops.aten.multi_margin_loss(x, t, p, margin, w, NONE)

    return _checked("n C, n, C -> n", each, (input, target, weight), reduction)


@rule("multilabel_margin_loss")
def multilabel_margin_loss(input: Tensor, target: Tensor, reduction: int = MEAN) -> Tensor:
    """input: scores (N, C), (C,) or one; target: class indices, ended by -1, of the same shape."""
    if input.ndim < 2:
        found = multilabel_margin_loss(input.reshape(1, -1), target.reshape(1, -1), reduction)
        return found.reshape(()) if reduction == NONE else found

    def each(x: Tensor, t: Tensor) -> Tensor:
        return torch.ops.aten.multilabel_margin_loss(x, t, NONE)

    return _checked("n C, n C -> n", each, (input, target), reduction)
