"""What the keys of a block weigh in rows that a mask of large numbers fills; nothing is looked at.

There the log-sum-exp that a kernel gives has lost the digits with which blocks are merged. So the
kernel counts once more: what the keys weigh beside one more key whose score is the largest number
that the mask has in the row. Scores are rounded as in the attention itself.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from .. import _torch
from ..cache import cached

# log-sum-exps beyond this have lost digits of the sums that they stand for
COARSE = {torch.float32: 1 << 8, torch.float64: 1 << 20}
# the log-sum-exp of a row that sees no key of a block: finite, so that merges need not ask for it
NOTHING = -1e30
# scores to which kernels, which compute powers of two, may add up none
HUGE = -1e38
# keys that are added, of which one counts: rows of a mask begin where kernels ask for it
_MORE, _SIZE = 16, float(1 << 14)


class Top:
    """The largest numbers of an additive mask in each row (B or 1, H or 1, L or 1), for all keys.

    What follows of them, and of the shapes of blocks, is made once for all blocks.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers
        self.rows: tuple[Tensor, Tensor, Tensor] | None = None
        # of the largest block so far
        self.values: list[tuple[Tensor, Tensor]] = []

    def cut(self, rows: tuple[int, int]) -> Top:
        """Those of some rows."""
        if self.numbers.shape[-1] == 1 or rows == (0, self.numbers.shape[-1]):
            return self
        made = Top(self.numbers[..., rows[0] : rows[1]])
        made.values = self.values
        return made

    def coarse(self, dtype: torch.dtype, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(rows that are counted, their numbers, the bias of the keys that are added)."""
        if self.rows is None:
            rows = (self.numbers.abs() > COARSE[dtype]) & (self.numbers > -inf)
            last = bias.new_full((*rows.shape, _MORE), -inf)
            last[..., 0] = self.numbers.to(bias.dtype).masked_fill(~rows, -inf)
            self.rows = rows, self.numbers.to(dtype), last
        return self.rows

    def added(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """(keys to add, values that tell the block's keys and those apart) for so many keys."""
        keys = k.shape[2]
        if not self.values or self.values[0][1].shape[2] < keys + _MORE:
            # as wide as keys, which kernels for CPUs ask for
            values = k.new_zeros((*k.shape[:2], keys + _MORE, k.shape[-1]))
            values[:, :, :keys, 0] = _SIZE
            values[:, :, keys:, 1] = _SIZE
            self.values[:] = [(torch.zeros_like(values[:, :, :_MORE]), values)]
        more, values = self.values[0]
        return more, values[:, :, -(keys + _MORE) :]


def top_of(mask: Tensor | None) -> Top | None:
    """Those of an additive mask."""
    if mask is None or mask.dtype is torch.bool or not mask.shape[-1]:
        return None
    top = mask.detach().amax(-1)
    return Top(top.view(*[1] * (3 - top.ndim), *top.shape))


def counted(q: Tensor, k: Tensor, block: _torch.Block, top: Top, lse: Tensor) -> Tensor:
    """sums that have their digits in the rows that the mask fills; elsewhere lse."""
    bias = block.bias
    assert bias is not None
    rows, largest, last = top.coarse(lse.dtype, bias)
    more, values = top.added(k)
    keys = torch.cat((k, more), 2)
    lead = torch.broadcast_shapes(bias.shape[:-1], last.shape[:-1])
    both = torch.cat((bias.expand(*lead, k.shape[2]), last.expand(*lead, _MORE)), -1)
    counter = _torch.attention_kernel(q, keys, values, both, False)
    assert counter is not None
    found, _ = counter.forward(q, keys, values, _torch.Block(block.scale, both))
    own, other = found[..., :2].to(lse.dtype).unbind(-1)
    sums = lse.new_empty((2, *lse.shape))
    torch.where(rows, largest, lse, out=sums[0])
    # nothing of nothing: the kernel takes numbers of such size for -inf
    weight = torch.div(own, other).nan_to_num_(nan=0.0, posinf=inf)
    torch.where(rows, weight, numbers(lse).one, out=sums[1])
    return sums


class Numbers:
    """Some numbers as tensors of a dtype."""

    def __init__(self, like: Tensor) -> None:
        least = torch.finfo(like.dtype).min
        values = 0.0, 1.0, max(NOTHING, least), -inf
        self.zero, self.one, self.nothing, self.hidden = (
            torch.full((), v, dtype=like.dtype, device=like.device) for v in values
        )


def numbers(like: Tensor) -> Numbers:
    """Those of a tensor's dtype, on its device; made once."""
    # fake ones belong to what looks on
    return Numbers(like) if type(like) is not Tensor else _numbers(like.dtype, str(like.device))


@cached
def _numbers(dtype: torch.dtype, device: str) -> Numbers:
    return Numbers(torch.empty(0, dtype=dtype, device=device))
