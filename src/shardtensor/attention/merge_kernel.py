# mypy: disable-error-code="no-untyped-def"
"""Merging a block of attention in one kernel, in Triton; SHARDTENSOR_MERGE=triton asks for it.

Two blocks' out and log-sum-exps are read once and written once, where torch's own ops are four or
five kernels. It has run in Triton's interpreter and been compiled for sm_90, on no GPU yet.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..settings import current

ASKED = os.environ.get("SHARDTENSOR_MERGE") == "triton"
# elements of out that a program has
TILE = 1 << 12
_kernel: Any = None

if ASKED:
    import triton
    import triton.language as tl

    @triton.jit
    def _merged(
        out, lse, block, block_lse, to, lse_to, heads, rows, width,
        out_b, out_h, out_r, lse_b, lse_h, lse_r, block_b, block_h, block_r, more_b, more_h, more_r,
        to_b, to_h, to_r, put_b, put_h, put_r,
        ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """Rows of one head of one sample. Strides: of batch, head and row of each operand."""
        pair = tl.program_id(1)
        b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
        i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        j = tl.arange(0, WIDTH)
        inside = i < rows
        have = tl.load(lse + b * lse_b + h * lse_h + i * lse_r, mask=inside, other=0.0)
        more = tl.load(block_lse + b * more_b + h * more_h + i * more_r, mask=inside, other=0.0)
        more = more.to(have.dtype)
        # of a row that has seen nothing it is -inf
        top = tl.maximum(have, more)
        top = tl.where(top == -float("inf"), 0.0, top)
        one, other = tl.exp(have - top), tl.exp(more - top)
        total = one + other
        found = tl.where(total > 0, top + tl.log(total), -float("inf"))
        weight = tl.where(total > 0, other / total, 0.0)
        tl.store(lse_to + b * put_b + h * put_h + i * put_r, found, mask=inside)
        both = inside[:, None] & (j < width)[None, :]
        rows_of = i[:, None]
        x = tl.load(
            out + b * out_b + h * out_h + rows_of * out_r + j[None, :], mask=both, other=0.0
        )
        y = tl.load(
            block + b * block_b + h * block_h + rows_of * block_r + j[None, :], mask=both, other=0.0
        )
        x += weight[:, None] * (y.to(x.dtype) - x)
        place = to + b * to_b + h * to_h + rows_of * to_r + j[None, :]
        tl.store(place, x.to(to.dtype.element_ty), mask=both)

    _kernel = _merged


def takes(*tensors: Tensor) -> bool:
    """Whether the kernel merges these."""
    # where memory is paged it would find what was put away
    if _kernel is None or current("paged", False):
        return False
    return all(
        type(x) is Tensor and (x.is_cuda or triton.knobs.runtime.interpret) and x.numel()
        for x in tensors
    )


def merged(out: Tensor, lse: Tensor, block: Tensor, more: Tensor, to: Tensor, put: Tensor) -> None:
    """Write what out and block (B, H, L, F), of sums lse and more (B, H, L), are together.

    to, put: where it goes, which may be out and lse.
    """
    b, heads, rows, width = out.shape
    columns = triton.next_power_of_2(width)
    part = max(1, TILE // columns)
    block = block if block.stride(-1) == 1 else block.contiguous()
    strides = [n for x in (out, lse, block, more, to, put) for n in x.stride()[:3]]
    with torch.cuda.device_of(out):
        _kernel[(triton.cdiv(rows, part), b * heads)](
            out, lse, block, more, to, put, heads, rows, width, *strides, ROWS=part, WIDTH=columns
        )
