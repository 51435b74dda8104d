"""Torch's kernels of pools in one, two and three dims as one, and their adjoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._torch import kernels

Ints = tuple[int, ...]


class How(NamedTuple):
    """What a kernel gets. by: of sums what they are divided by; None: the largest is taken."""

    kernel: Ints
    stride: Ints
    padding: Ints
    dilation: Ints
    ceil: bool
    by: int | None = None

    def padded(self, padding: Ints) -> How:
        return self._replace(padding=padding)


def some_channels(local: Tensor, d: int, op: Callable[[Tensor], Any]) -> Any:
    """op(local), which torch refuses without channels: one of zeros then stands in for them."""
    if local.shape[d] or 0 in local.shape[d + 1 :]:
        return op(local)
    out = op(F.pad(local, [0, 0] * (local.ndim - 1 - d) + [0, 1]))
    if isinstance(out, tuple):
        return tuple(None if o is None else o.narrow(d, 0, 0) for o in out)
    return out.narrow(d, 0, 0)


def pooled(x: Tensor, how: How) -> tuple[Tensor, Any]:
    """(what windows hold at most, its flat place; their sums over `by`, None)."""
    n = len(how.kernel)
    return some_channels(x, x.ndim - n - 1, lambda some: _pooled(some, how, n))


def _pooled(x: Tensor, how: How, n: int) -> Any:
    if n == 1:
        return _on_plane(lambda y, h: _pooled(y, h, 2), how, x)
    if n == 3 and x.ndim == 4:
        # torch takes a volume of one row without a batch for images, and refuses it
        return _without(0, _pooled(x.unsqueeze(0), how, n))
    kernel, stride, padding, dilation, ceil, by = how
    if by is None:
        return _LARGEST[n](x, kernel, stride, padding, dilation, ceil)
    return _SUMS[n](x, kernel, stride, padding, ceil, True, by), None


def adjoint(g: Tensor, x: Tensor, how: How, index: Tensor | None) -> Tensor:
    """The gradient of x; of the largest where no place (-1) is named, nothing has any."""
    n = len(how.kernel)
    if n == 1:
        y: Tensor = _on_plane(lambda *t: adjoint(t[0], t[1], t[-1], *t[2:-1]), how, g, x, index)
        return y
    if n == 3 and x.ndim == 4:
        g, x = g.unsqueeze(0), x.unsqueeze(0)
        return adjoint(g, x, how, None if index is None else index.unsqueeze(0)).squeeze(0)
    kernel, stride, padding, dilation, ceil, by = how
    if index is not None:
        largest = (_aten.max_pool2d_with_indices_backward, _aten.max_pool3d_with_indices_backward)
        found: Tensor = largest[n - 2](g, x, kernel, stride, padding, dilation, ceil, index)
        return found
    sums = _aten.avg_pool2d_backward, _aten.avg_pool3d_backward
    found = sums[n - 2](g, x, kernel, stride, padding, ceil, True, by)
    return found


def _on_plane(op: Callable[..., Any], how: How, *lines: Tensor | None) -> Any:
    """op of lines as planes of one row, as torch pools them."""
    planes = [None if x is None else x.unsqueeze(-2) for x in lines]
    flat = How((1, *how.kernel), (1, *how.stride), (0, *how.padding), (1, *how.dilation), *how[4:])
    return _without(-2, op(*planes, flat))


def _without(d: int, found: Any) -> Any:
    if isinstance(found, tuple):
        return tuple(None if x is None else x.squeeze(d) for x in found)
    return found.squeeze(d)


_aten: Any = torch.ops.aten
_LARGEST = {2: kernels.nn.max_pool2d_with_indices, 3: kernels.nn.max_pool3d_with_indices}
_SUMS = {2: kernels.nn.avg_pool2d, 3: kernels.nn.avg_pool3d}
