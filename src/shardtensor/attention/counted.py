"""What the keys of a block weigh in rows that a mask of large numbers fills; nothing is looked at.

There the log-sum-exp that a kernel gives has lost the digits with which blocks are merged. So it is
taken from a base, the largest number that the mask has in the row for all keys: the kernel counts
once more what the keys weigh beside one more key of that score. Scores are rounded as in the
attention itself. Those that lie farther from the base than weights reach are not counted: their
log-sum-exp has the digits that they have themselves. Where the base leaves them too few of those,
the row is NaN (`refused`).
"""

from __future__ import annotations

from math import exp, inf, nan

import torch
from torch import Tensor

from .. import _torch

# log-sum-exps beyond this have lost digits of the sums that they stand for
COARSE = {torch.float32: 1 << 8, torch.float64: 1 << 20}
# scores beside numbers beyond this are rounded to more than a thirtieth
LOST = {torch.float32: 1 << 19, torch.float64: 1 << 48}
# the log-sum-exp of a row that sees no key of a block: finite, so that merges need not ask for it
NOTHING = -1e30
# scores to which kernels, which compute powers of two, may add up none
HUGE = -1e38
# powers of e that weights have digits for
_REACH = {torch.float16: 8.0, torch.float64: 700.0}
# a block just beyond those weighs nothing beside what is nearer by this
_NEAR = 10.0
# keys that are added, of which one counts: rows of a mask begin where kernels ask for it
_MORE, _SIZE = 16, float(1 << 14)


class Top:
    """The largest numbers of an additive mask in each row (B or 1, H or 1, L or 1), for all keys.

    What follows of them, and of the shapes of blocks, is made once for all blocks.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers
        self.made: tuple[Tensor, Tensor, Tensor] | None = None
        # of which rows of another these are
        self.part: tuple[Top, tuple[int, int]] | None = None
        # of the largest block so far
        self.values: list[tuple[Tensor, Tensor]] = []

    def cut(self, rows: tuple[int, int]) -> Top:
        """Those of some rows."""
        if self.numbers.shape[-1] == 1 or rows == (0, self.numbers.shape[-1]):
            return self
        made = Top(self.numbers[..., rows[0] : rows[1]])
        made.values, made.part = self.values, (self, rows)
        return made

    def based(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(the base of each row, 0 where keys are not counted; the bias of keys that are added).

        And by how much at most a log-sum-exp beside it is rounded, where that is much.
        """
        if self.made is None and self.part is not None:
            of, (a, b) = self.part
            base, last, coarse = of.based(dtype)
            self.made = base[..., a:b], last[..., a:b, :], coarse[..., a:b]
        elif self.made is None:
            fine = (self.numbers.abs() <= COARSE[dtype]) | (self.numbers == -inf)
            last = self.numbers.new_full((*fine.shape, _MORE), -inf)
            last[..., 0] = self.numbers.masked_fill(fine, -inf)
            base = self.numbers.to(dtype).masked_fill(fine, 0.0)
            size = base.abs()
            coarse = size.mul(4 * torch.finfo(dtype).eps).masked_fill_(size <= LOST[dtype], 0.0)
            self.made = base, last, coarse
        return self.made

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


def counted(
    q: Tensor, k: Tensor, block: _torch.Block, top: Top, lse: Tensor, hidden: Tensor
) -> Tensor:
    """The log-sum-exps of a block from the base of each row on; hidden: rows that see no key."""
    bias = block.bias
    assert bias is not None
    base, last, coarse = top.based(lse.dtype)
    more, values = top.added(k)
    keys = torch.cat((k, more), 2)
    lead = torch.broadcast_shapes(bias.shape[:-1], last.shape[:-1])
    both = torch.cat((bias.expand(*lead, k.shape[2]), last.expand(*lead, _MORE)), -1)
    counter = _torch.attention_kernel(q, keys, values, both, False)
    assert counter is not None
    found, _ = counter.forward(q, keys, values, _torch.Block(block.scale, both))
    own, other = found[..., :2].to(lse.dtype).unbind(-1)
    # infinite, or no number, in rows that are not counted
    weight = torch.div(own, other).log_()
    # not nearer to the base than it is
    lse = lse.sub_(base).add_(torch.copysign(coarse, weight)).masked_fill_(hidden, NOTHING)
    return torch.where(weight.abs() <= reach(q.dtype), weight, lse, out=lse)


def reach(dtype: torch.dtype) -> float:
    """How many powers of e weights of a dtype have digits for."""
    return _REACH.get(dtype, 80.0)


def absolute(top: Top, lse: Tensor) -> Tensor:
    """sums (2, B, H, L) of log-sum-exps that are taken from a base; -inf where no key was seen."""
    base, _, coarse = top.based(lse.dtype)
    most = reach(lse.dtype)
    # what is more than a number can hold stays a logarithm, which `refused` knows by the number
    held = torch.where(coarse > 0, most, most - 2 * _NEAR).to(lse.dtype)
    few = lse.clamp(-held, held)
    sums = lse.new_empty((2, *lse.shape))
    torch.add(base, lse - few, out=sums[0])
    torch.exp(few, out=sums[1])
    nothing = lse < NOTHING / 2
    sums[0].masked_fill_(nothing, -inf)
    sums[1].masked_fill_(nothing, 0.0)
    return sums


def refused(out: Tensor, sums: Tensor) -> Tensor:
    """out with NaN in rows of large numbers whose blocks were weighed by sums of few digits.

    Those that `absolute` has found beyond reach; what other ranks have found is added already.
    """
    total, most = sums[1], exp(reach(sums.dtype) - _NEAR)
    far = (total > most) | ((total < 1 / most) & (total > 0))
    return out.masked_fill(far.unsqueeze(-1), nan)


def from_base(top: Top, sums: Tensor) -> Tensor:
    """Log-sum-exps taken from a base, of sums as two numbers."""
    base, *_ = top.based(sums.dtype)
    return sums[0].sub(base).add_(sums[1].log()).clamp_min_(NOTHING)
