"""Mean and variance of this rank's part of each row, in one kernel.

On CPUs torch's own kernel of statistics adds up number by number, and takes four to six times as
long as that of batch norm's backward, which gives the sums of x and of x * x of short pieces. Where
means are near zero their sum has as many digits as torch's; elsewhere that of differences from the
means has.
"""

from __future__ import annotations

from math import inf

import numpy as np
import torch
from torch import Tensor

from ..._torch import kernels
from ...cache import cached
from .affine import far
from .moments import accumulated
from .numbers import READ, Numbers, fresh, numbers_of, on_host, tensors

# elements below which a piece costs more than it saves, and beyond which its sum loses digits; of
# all rows together, likewise
PIECES, WORTH = (32, 512), 2**14
# squares of a mean in variances up to which the mean of squares has the digits of the variance
NEAR = 9.0


def moments_of(rows: Tensor) -> tuple[Numbers, Numbers]:
    """Mean and variance of (samples, rows, ...) for each row; zeros where there are no elements."""
    n = rows.shape[1]
    if not rows.numel():
        nothing = numbers_of(rows.new_zeros(2, n, dtype=accumulated(rows.dtype)))
        return nothing[0], nothing[1]
    quick = _of_pieces(rows)
    if quick is not None:
        return quick
    # given in the dtype of running statistics, which are not used
    half = rows.dtype.itemsize == 2 and rows.device.type == "cpu"
    unused = rows.new_empty(n, dtype=torch.float32) if half else None
    found = torch.batch_norm_update_stats(rows, unused, unused, 0.0)
    mean, var = fresh(*found)
    if far(rows, mean, (var + 1e-30) ** -0.5):
        # by its rounding alone means of parts would differ, which adds to the variance
        center, one = tensors(rows, n, mean, 1.0)
        _, rest, _ = kernels.batch_norm_backward(
            one[:1].expand(rows.shape), rows, None, None, None, center, one, True, 0.0,
            [False, True, False],
        )  # fmt: skip
        rest = fresh(rest)[0] * (n / rows.numel())
        mean, var = mean + rest, (var - rest**2).clip(0.0)
    return mean, var


def _of_pieces(rows: Tensor) -> tuple[Numbers, Numbers] | None:
    """Both from sums of pieces; None where that pays nothing, or numbers are no numbers."""
    if rows.numel() < WORTH or not on_host(rows) or rows.dtype != accumulated(rows.dtype):
        return None
    piece = _piece(rows.shape)
    if not piece or not rows.is_contiguous():
        return None
    mean, var, near = _summed(rows, piece)
    if near:
        return mean, var
    (center,) = tensors(rows, rows.shape[1], mean)
    rest, var, near = _summed(rows - center.view(-1, *[1] * (rows.ndim - 2)), piece)
    return (READ[type(center)](center) + rest, var) if near else None


def _summed(rows: Tensor, piece: int) -> tuple[Numbers, Numbers, bool]:
    """Mean and variance, and whether the variance has its digits."""
    flat = rows.view(1, -1, piece)
    zero, one = _constants(flat.shape[1], rows.dtype)
    _, squares, total = kernels.batch_norm_backward(
        flat, flat, None, None, None, zero, one, True, 0.0, [False, True, True]
    )
    shape, n = (rows.shape[0], rows.shape[1], -1), rows.shape[1] / rows.numel()
    mean = n * np.add.reduce(READ[type(total)](total).reshape(shape), (0, 2), np.float64)
    of_mean = mean * mean
    var = (
        n * np.add.reduce(READ[type(squares)](squares).reshape(shape), (0, 2), np.float64) - of_mean
    )
    near = (of_mean <= NEAR * var) & (var < inf)
    return mean, var, bool(np.logical_and.reduce(near))


@cached
def _piece(shape: torch.Size) -> int:
    """How many elements that lie one after the other are added up first; 0: none."""
    n = 1
    for size in reversed(shape[2:]):
        n *= size
        if n >= 128:
            break
    while n > PIECES[1] and n % 2 == 0:
        n //= 2
    return n if PIECES[0] <= n <= PIECES[1] else 0


@cached
def _constants(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.zeros(n, dtype=dtype), torch.ones(n, dtype=dtype)
