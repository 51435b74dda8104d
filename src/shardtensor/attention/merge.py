"""Merging what queries found in blocks of keys. Shapes and sums are those of `blocks`."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from . import merge_kernel
from .blocks import wide
from .counted import Top, absolute


class Merge:
    """Out and sums over the keys of all blocks added so far; NaN-safe, in fp32 or fp64."""

    def __init__(self, q: Tensor, v: Tensor, top: Top | None = None) -> None:
        """top: from whose base the blocks' log-sum-exps are taken."""
        self.top = top
        self.like, self.shape = q, [*q.shape[:-1], v.shape[-1]]
        self.dtype = wide(q.dtype)
        self.found: tuple[Tensor, Tensor] | None = None
        # whether a block has met another by two numbers a row
        self.paired = False

    def add(self, rows: tuple[int, int], out: Tensor, sums: Tensor, *, last: bool = False) -> None:
        """Take in what the queries `rows` see in one more block; last: no other is to come."""
        if self.found is None and rows == (0, self.shape[2]) and _heads_beside(out):
            self.found = out.to(self.dtype), sums.to(self.dtype)
            return
        if self.found is None:
            self.found = self._nothing(lone=sums.ndim == 3)
        all_out, every = self.found
        have_out, have = all_out[:, :, rows[0] : rows[1]], every[..., rows[0] : rows[1]]
        if have.ndim == sums.ndim == 3:
            if merge_kernel.takes(have_out, out, have, sums):
                ends = last and have.shape == every.shape
                both = have.new_ones((2, *have.shape)) if ends else have
                to, put = (
                    (torch.empty_like(all_out, dtype=out.dtype), both[0])
                    if ends
                    else (have_out, have)
                )
                merge_kernel.merged(have_out, have, out, sums, to, put)
                self.found = (to, both) if ends else self.found
                return
            # few kernels that each read what they get in its own dtype
            weight = torch.sub(sums, have).sigmoid_().unsqueeze(-1)
            if last and have.shape == every.shape:
                self.found = self._ended(all_out, every, out, sums, weight)
                return
            torch.logaddexp(have, sums, out=have)
            if out.dtype == self.dtype:
                have_out.lerp_(out, weight)
            else:
                have_out.addcmul_(weight, out - have_out)
            return
        if every.ndim == 3:
            every = _paired(every)
            # rows of which no block has come yet
            every[1].masked_fill_(every[0] == -inf, 0.0)
        if not self.paired:
            # finite, so that no difference is of infinities
            every[0].clamp_min_(torch.finfo(self.dtype).min)
            self.found, self.paired = (all_out, every), True
        top, total = every[:, ..., rows[0] : rows[1]].unbind(0)
        self._weigh(have_out, top, total, out, _paired(sums).to(self.dtype))

    def _weigh(
        self, have_out: Tensor, top: Tensor, total: Tensor, out: Tensor, sums: Tensor
    ) -> None:
        """Take in a block whose sums are two numbers."""
        most = torch.maximum(top, sums[0])
        own = torch.sub(sums[0], most).exp_().mul_(sums[1])
        total.mul_(top.sub_(most).exp_()).add_(own)
        top.copy_(most)
        # of rows that have seen nothing: see `result`
        weight = own.div_(total.clamp_min(torch.finfo(self.dtype).tiny)).unsqueeze(-1)
        if out.dtype == self.dtype:
            have_out.lerp_(out, weight)
        else:
            have_out.addcmul_(weight, out - have_out)

    def _ended(
        self, have_out: Tensor, have: Tensor, out: Tensor, sums: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The last merge: out in the dtype of the queries, sums as two numbers."""
        both = have.new_ones((2, *have.shape))
        torch.logaddexp(have, sums, out=both[0])
        if out.dtype == self.dtype:
            return have_out.lerp_(out, weight), both
        return torch.addcmul(
            have_out, weight, out - have_out, out=torch.empty_like(have_out, dtype=out.dtype)
        ), both

    def result(self) -> tuple[Tensor, Tensor]:
        """(out, sums); zeros and -inf where no key was seen. In fp32 or fp64 but after a last."""
        out, sums = self._nothing(lone=False) if self.found is None else self.found
        if self.top is not None and self.found is not None:
            sums = absolute(self.top, sums if sums.ndim == 3 else sums[0])
            return out.masked_fill_((sums[1] == 0).unsqueeze(-1), 0.0), sums
        if self.paired:
            nothing = sums[1] == 0
            out.masked_fill_(nothing.unsqueeze(-1), 0.0)
            sums[0].masked_fill_(nothing, -inf)
        return out, _paired(sums)

    def _nothing(self, *, lone: bool) -> tuple[Tensor, Tensor]:
        b, h, rows, width = self.shape
        # the layout that fused kernels give: heads beside each other in memory
        out = self.like.new_zeros([b, rows, h, width], dtype=self.dtype).transpose(1, 2)
        if lone:
            return out, self.like.new_full([b, h, rows], -inf, dtype=self.dtype)
        sums = self.like.new_zeros([2, b, h, rows], dtype=self.dtype)
        sums[0].fill_(-inf)
        return out, sums


def log_of(sums: Tensor) -> Tensor:
    """The log-sum-exps (B, H, L)."""
    return sums if sums.ndim == 3 else sums[0] + sums[1].log()


def _paired(sums: Tensor) -> Tensor:
    """sums as two numbers."""
    if sums.ndim == 4:
        return sums
    both = sums.new_ones((2, *sums.shape))
    both[0].copy_(sums)
    return both


def relative(sums: Tensor, top: Tensor) -> Tensor:
    """The sums of exp(scores - top), 0 where nothing was seen."""
    return torch.where(sums[0] == -inf, 0.0, sums[1] * (sums[0] - top).exp())


def _heads_beside(out: Tensor) -> bool:
    return out.transpose(1, 2).is_contiguous()
