"""What gradients of attention are made of, where they are added up, and how they lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Given(NamedTuple):
    """What the gradients of a block are made of: g, that of its result, and what forward had.

    out, sums: over all keys, the sums `settled`.
    """

    g: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    out: Tensor
    sums: Tensor


class OfQueries:
    """The gradient of queries, to which blocks add theirs; the kernel's own where one has all rows.

    total: memory for it, filled with zeros.
    """

    def __init__(self, q: Tensor, dtype: torch.dtype, total: Tensor | None = None) -> None:
        self.q, self.dtype, self.total = q, dtype, total

    def add(self, rows: tuple[int, int], part: Tensor) -> None:
        whole = rows == (0, self.q.shape[2])
        if self.total is None and whole and lies(part, self.dtype):
            self.total = part
            return
        total = self.total = self.result()
        (total if whole else total[:, :, rows[0] : rows[1]]).add_(part)

    def result(self) -> Tensor:
        return beside(self.q, self.dtype).zero_() if self.total is None else self.total


def sums_of(own: list[Tensor], dtype: torch.dtype, into: Sequence[Tensor] = ()) -> list[Tensor]:
    """Sums for keys and values, heads beside each other; one tensor of both if they are alike.

    into: where they are, of the same form.
    """
    alike = own[0].shape == own[1].shape
    if into:
        home = list(into)
    elif alike:
        b, heads, rows, width = own[0].shape
        home = [own[0].new_empty((2, b, rows, heads, width), dtype=dtype).transpose(2, 3)]
    else:
        home = [beside(x, dtype) for x in own]
    for to, x in zip(home[0] if alike else home, own, strict=True):
        to.copy_(x)
    return home


def add(to: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    if len(parts) == 1 < len(to):
        # those of both in one tensor
        parts = parts[0].unbind()
    for x, part in zip(to, parts, strict=False):
        x.add_(part)


def beside(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor of x's shape, heads beside each other in memory, as kernels give them."""
    b, heads, rows, width = x.shape
    return x.new_empty([b, rows, heads, width], dtype=dtype).transpose(1, 2)


def lies(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether x is what `beside` gives."""
    return x.dtype is dtype and x.transpose(1, 2).is_contiguous()
