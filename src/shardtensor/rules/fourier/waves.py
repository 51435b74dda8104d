"""Fourier sums over a rank's own rows of a dim, as products with small matrices of waves."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import _torch
from ...cache import cached
from ..ranges import numbers_on


def waves(freqs: tuple[int, ...], start: int, rows: int, n: int, sign: int, like: Tensor) -> Tensor:
    """exp(sign 2 pi i k j / n) for frequencies k and rows j = start, start + 1, ...: (k, j)."""
    make = _waves_of if _torch.under_modes() else _kept_waves
    return make(freqs, start, rows, n, sign, like.dtype, like.device)


def _waves_of(
    freqs: tuple[int, ...], start: int, rows: int, n: int, sign: int, dtype: Any, device: Any
) -> Tensor:
    # kept waves must serve in training though first made for inference
    with torch.inference_mode(False), torch.no_grad():
        k = numbers_on(device, freqs)
        j = torch.arange(start, start + rows, device=device)
        # whole turns taken off as integers: the angle is exact to the last digit
        angle = (k[:, None] * j % n).double() * (sign * 2 * math.pi / n)
        wave = torch.complex(angle.cos(), angle.sin())
        return wave.to(dtype if dtype.is_complex else dtype.to_complex())


_kept_waves = cached(_waves_of)


def scale(n: int, norm: str | None, sign: int) -> float:
    """The factor of a transform of length n in the direction of `sign`."""
    if norm == "ortho":
        return 1 / math.sqrt(n)
    if norm not in (None, "forward", "backward"):
        raise RuntimeError(f"Invalid normalization mode: {norm!r}")
    return 1 / n if (norm == "forward") == (sign < 0) else 1.0


def modes_of(
    x: Tensor, d: int, freqs: tuple[int, ...], start: int, n: int, norm: str | None, sign: int
) -> Tensor:
    """Modes of dim d, of length n, as far as its rows from `start` on make them: addends."""
    rows = x.movedim(d, -1)
    factor = scale(n, norm, sign)
    matrix = waves(freqs, start, rows.shape[-1], n, sign, rows) * factor
    with torch.autocast(x.device.type, enabled=False):
        if rows.is_complex():
            part = rows @ matrix.mT
        else:
            # (rows, modes) complex as (rows, 2 modes) real
            part = rows @ torch.view_as_real(matrix.mT.contiguous()).flatten(1)
            part = torch.view_as_complex(part.unflatten(-1, (-1, 2)).contiguous())
    return part.movedim(-1, d).contiguous()


def rows_of(
    x: Tensor, d: int, freqs: tuple[int, ...], rows: tuple[int, int], n: int, norm: Any, sign: int
) -> Tensor:
    """Rows [start, stop) of dim d, of length n, from its modes."""
    start, stop = rows
    matrix = waves(freqs, start, stop - start, n, sign, x) * scale(n, norm, sign)
    with torch.autocast(x.device.type, enabled=False):
        return (x.movedim(d, -1) @ matrix).movedim(-1, d)


def real_rows_of(
    x: Tensor, d: int, freqs: tuple[int, ...], rows: tuple[int, int], n: int, norm: str | None
) -> Tensor:
    """Rows [start, stop) of a real dim d, of length n, from its modes of non-negative frequency."""
    # a real field counts every mode twice, but for the mean and the last of an even length
    once = 2 * numbers_on(x.device, freqs) % n == 0
    twice = 2 - once.double()
    start, stop = rows
    matrix = waves(freqs, start, stop - start, n, 1, x)
    matrix = matrix * (twice[:, None] * scale(n, norm, 1)).to(matrix.dtype)
    modes = x.movedim(d, -1)
    with torch.autocast(x.device.type, enabled=False):
        real = modes.real @ matrix.real - modes.imag @ matrix.imag
    return real.movedim(-1, d)
