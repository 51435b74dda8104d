"""How the whole of a sharded tensor would lie in memory: strides, and which reshapes are views.

A shard of one row, or of none, is contiguous in any order of its dims, and every reshape of it is a
view. So that all ranks decide alike, strides are those of the whole: kept with the tensor where a
shard need not show them (see `follow`), else rows first where some rank has less than two rows,
else those that the local strides show.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._torch import outside_modes
from ..cache import cached
from ..comm.formats import FORMATS, lie_last
from ..spec import Spec

# tensors of another order of dims that live, and blocks inside which all are followed
turned: dict[int, Any] = {}


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Strides:
    """The strides of a whole tensor. turned: a new tensor made like it need not be rows first."""

    strides: tuple[int, ...]
    turned: bool = field(compare=False)

    @classmethod
    def of(
        cls, shape: Sequence[int], strides: tuple[int, ...], local: Tensor | None = None
    ) -> Strides:
        """Kept in mind as long as it lives, where it is turned, or the local tensor beside it."""
        long = [s for s, n in zip(strides, shape, strict=True) if n > 1]
        odd = 0 in long or long != sorted(long, reverse=True)
        if not odd and local is not None:
            long = [s for s, n in zip(local.stride(), local.shape, strict=True) if n > 1]
            odd = long != sorted(long, reverse=True)
        made = cls(strides, odd)
        if made.turned:
            key = id(made)
            turned[key] = weakref.ref(made, lambda _: turned.pop(key, None))
        return made


@contextmanager
def following() -> Iterator[None]:
    """Inside, every op is looked at (see `follow`)."""
    token = object()
    turned[id(token)] = token
    try:
        yield
    finally:
        del turned[id(token)]


def stride(x: Any) -> tuple[int, ...]:
    """The strides of the whole of a ShardTensor."""
    if x._strides is not None:
        known: tuple[int, ...] = x._strides.strides
        return known
    return dense(x._spec.shape) if x._spec.thin else strides(x._spec, x._local.stride())


def told(x: Any, strides: tuple[int, ...]) -> Any:
    """x, new, of which the whole lies so: noted where local strides do not show it."""
    rows = zip(x._spec.shape, strides, stride(x), strict=True)
    if x._spec.thin or any(a != b for n, a, b in rows if n > 1):
        x._strides = Strides.of(x._spec.shape, strides, x._local)
    return x


def dense(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of rows first."""
    found, step = [], 1
    for n in reversed(shape):
        found.append(step)
        step *= max(1, n)
    return tuple(reversed(found))


def in_format(shape: Sequence[int], memory_format: torch.memory_format | None) -> tuple[int, ...]:
    """Strides of a tensor in a memory format; None: rows first."""
    if memory_format in (None, torch.contiguous_format):
        return dense(shape)
    turned = dense([shape[0], *shape[2:], shape[1]])
    return turned[0], turned[-1], *turned[1:-1]


@cached
def strides(spec: Spec, own: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of the whole, of a local tensor of strides `own`."""
    order = sorted(range(len(own)), key=lambda d: (own[d], -d))
    found, step, dense = [0] * len(own), 1, 1
    for d in order:
        if own[d] == 0:
            continue
        # a slice of a dim leaves gaps between the rows of the next, which may be gone elsewhere
        exact = own[d] * step % dense == 0
        found[d] = (
            own[d] * step // dense if exact or own[d] < dense else step * (own[d] // dense + 1)
        )
        # one row may lie anywhere
        if spec.shape[d] != 1:
            step = found[d] * max(1, spec.shape[d])
            dense = own[d] * max(1, spec.local_shape[d])
    return tuple(found)


def overlaps(x: Any) -> bool:
    """Whether elements of the whole may be the same memory."""
    if x._strides is None and (x._spec.thin or x._local.is_contiguous()):
        return False
    return _overlaps(x._spec.shape, stride(x))


def expanded(x: Any) -> bool:
    """Whether rows of some dim of the whole are the same memory."""
    if x._strides is None and (x._spec.thin or 0 not in x._local.stride()):
        return False
    return any(s == 0 and n > 1 for s, n in zip(stride(x), x.shape, strict=True))


@cached
def _overlaps(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    reach = 0
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size > 1:
            if step <= reach:
                return True
            reach += step * (size - 1)
    return False


def after(x: Any, change: Callable[[Tensor], Any]) -> tuple[int, ...]:
    """The strides of the whole after change(tensor), a view in place."""
    with outside_modes():
        whole = torch.empty_strided(x.shape, stride(x), device="meta")
        change(whole)
        return whole.stride()


def is_contiguous(x: Any, memory_format: torch.memory_format) -> bool:
    """Whether the whole is contiguous in a memory format."""
    if x._strides is None and not x._spec.thin:
        return bool(x._local.is_contiguous(memory_format=memory_format))
    rows, own = range(x.ndim), stride(x)
    if memory_format is torch.contiguous_format:
        return not x.numel() or _in_order(x.shape, own, rows)
    last = FORMATS.get(x.ndim) is memory_format
    return last and _in_order(x.shape, own, (0, *rows[2:], 1))


def image_format(x: Any) -> torch.memory_format:
    """Channels last, if an image or volume lies so, else rows first."""
    rows, form = torch.contiguous_format, FORMATS.get(x.ndim)
    if form is None or (x._strides is None and x._local.is_contiguous()):
        return rows
    if is_contiguous(x, rows):
        return rows
    return form if is_contiguous(x, form) or lie_last(x.shape, stride(x)) else rows


def suggested(x: Any) -> Any:
    """x in the memory format that torch suggests for it, channels last or rows first."""
    if x._strides is None and x._local.is_contiguous():
        return x
    return x.contiguous() if image_format(x) is torch.contiguous_format else x


def order(x: Any) -> list[int]:
    """The dims as `kept` has them in memory, the outermost first; none where that is rows first."""
    if x._local.is_contiguous() if x._strides is None else not x._strides.turned:
        return []
    found = _outermost_first(kept(x._spec.shape, stride(x)))
    return found if found != sorted(found) else []


def as_stored(op: Callable[[Any], Any], x: Any, order: Sequence[int]) -> Any:
    """op of x with its dims in this order, that of memory: what is new lies as x does."""
    return op(x.permute(order)).permute([order.index(d) for d in range(len(order))])


def like_image(out: Any, x: Any) -> Any:
    """out, an image or volume as x is one, with the channels last if they lie so in x."""
    form = image_format(x)
    if out.ndim != x.ndim or form is torch.contiguous_format:
        return out
    out._local = out._local.contiguous(memory_format=form)
    strides = in_format(out.shape, form)
    out._strides = Strides.of(out.shape, strides) if out._spec.thin else None
    return out


def takes_format(x: Any, memory_format: torch.memory_format) -> bool:
    """Whether torch's `to` takes the whole to be in a memory format already."""
    with outside_modes():
        whole = torch.empty_strided(x.shape, stride(x), device="meta")
        return whole.to(memory_format=memory_format) is whole


@cached
def kept(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of what is made like a tensor: without gaps, its dims in the same order."""
    with outside_modes():
        return torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()


@cached
def is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements lie without gaps, each once, in whatever order of the dims."""
    return _in_order(shape, strides, _outermost_first(strides))


def _outermost_first(strides: Sequence[int]) -> list[int]:
    return sorted(range(len(strides)), key=lambda d: (-strides[d], d))


def _in_order(shape: Sequence[int], strides: Sequence[int], order: Sequence[int]) -> bool:
    """Whether dims lie dense in memory, the last of the order innermost."""
    step = 1
    for d in reversed(order):
        if shape[d] != 1:
            if strides[d] != step:
                return False
            step *= shape[d]
    return True


def is_view(shape: Sequence[int], stride: Sequence[int], target: Sequence[int]) -> bool:
    """Whether torch gives a tensor without empty dims in another shape as a view."""
    kept = [(n, s) for n, s in zip(shape, stride, strict=True) if n != 1]
    wanted = [n for n in target if n != 1]
    while kept:
        # the run of dims that lie one after the other in memory, from the last on
        size, step = kept.pop()
        run = size
        while kept and kept[-1][1] == step * size:
            size, step = kept.pop()
            run *= size
        while run > 1 and wanted and run % wanted[-1] == 0:
            run //= wanted.pop()
        if run > 1:
            return False
    return not wanted


def in_order_of(x: Tensor, strides: Sequence[int]) -> Tensor:
    """x with its dims in memory in the order of such strides, as torch's ops keep it."""
    return as_stored(Tensor.contiguous, x, _outermost_first(kept(x.shape, tuple(strides))))


def real_view(x: Tensor) -> Tensor:
    """torch.view_as_real of a shard, whose gradient torch has not for empty ones."""
    # a view all the same: what is written to it has to reach the backward of all ranks, and not
    # as_strided, whose gradient of an empty tensor has no graph
    return torch.view_as_real(x) if x.numel() else x.real.view(*x.shape, 2)
