"""Dtypes and images that torch does not take as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ... import _torch
from ...comm.formats import FORMATS, memory_format

# of norms that are told it before their operands: a number of groups, the dims
_LED: dict[Callable[..., Tensor], tuple[Any, ...]] = {
    torch.group_norm: (1,), torch.layer_norm: ((2,),),
}  # fmt: skip


def of_images(norm: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
    """norm(x, *others); of images of one sample, row or column as of sequences.

    Their gradient may look like one with the channels first and last: torch 2.13 takes it for the
    wrong one on a CPU.
    """
    if x.device.type != "cpu" or x.ndim < 4 or 1 not in (x.shape[0], *x.shape[2:]):
        return norm(x, *others)
    y = norm(x.flatten(2), *others).view(x.shape)
    return y.contiguous(memory_format=memory_format(x))


def lying_as(rows: Tensor, g: Tensor) -> Tensor:
    """g, which torch 2.13 misreads on CPUs where one has the channels last and one first."""
    first = rows.is_contiguous()
    form = FORMATS.get(rows.ndim)
    if form is None or not (g if first else rows).is_contiguous(memory_format=form):
        return g
    return g.contiguous(memory_format=torch.contiguous_format if first else form)


def hold_dtypes(op: Callable[..., Tensor], x: Tensor, *others: Tensor | None) -> None:
    """Raise what a norm of torch's says of such dtypes, where they differ."""
    for t in others:
        if t is not None and t.dtype is not x.dtype:
            break
    else:
        return
    if _torch.under_modes():
        return
    if torch.is_autocast_enabled(x.device.type):
        # which casts
        return
    said = _said(op, x.device, x.dtype, *(t if t is None else t.dtype for t in others))
    if said is not None:
        raise RuntimeError(said)


@cache
def _said(op: Callable[..., Tensor], device: torch.device, *dtypes: Any) -> str | None:
    others = [d if d is None else torch.ones(2, dtype=d, device=device) for d in dtypes[1:]]
    x = torch.ones((1, 2, 2), dtype=dtypes[0], device=device)
    rest = () if op in _LED else (True, 0.1, 1e-5, False)
    try:
        with torch.no_grad():
            op(x, *_LED.get(op, ()), *others, *rest)
    except RuntimeError as e:
        return str(e)
    return None
