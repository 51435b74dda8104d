"""Products of matrices of 8-bit floats, with one scale for each or one for each row and column.

Rows are independent, so shards of tokens need nothing of each other: their scales lie as they do.
The gradient of a weight sums over tokens; its addends meet in fp32, before they are rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import comm
from ...dispatch.fallback import fall_back
from ...registry import rule
from ...tensor import wrap
from .. import labels

# on a GPU rows and columns of an 8-bit matrix are whole numbers of 16 bytes
_STEP = 16
# of which torch's stubs have other types
_torch_ops: Any = torch.ops.aten
# what runs: (a, b, scale of a, scale of b, bias, dtype of the result) -> product
Kernel = Callable[..., Tensor]


@rule("_scaled_mm")
def scaled_mm(
    self: Tensor,
    mat2: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """(self * scale_a) @ (mat2 * scale_b) + bias."""

    def kernel(a: Any, b: Any, sa: Any, sb: Any, bias: Any, dtype: Any) -> Tensor:
        return _torch_ops._scaled_mm(
            a, b, sa, sb, bias=bias, out_dtype=dtype, use_fast_accum=use_fast_accum
        )

    if scale_result is None and _served(self, mat2, scale_a, scale_b, out_dtype):
        return _product(kernel, self, mat2, scale_a, scale_b, bias, out_dtype)
    args = (self, mat2, scale_a, scale_b, bias, scale_result, out_dtype, use_fast_accum)
    return fall_back(_torch_ops._scaled_mm, args, {})


@rule("_scaled_mm_v2")
def scaled_mm_v2(
    self: Tensor,
    mat2: Tensor,
    scale_a: Sequence[Tensor],
    recipe_a: Sequence[int],
    swizzle_a: Sequence[int],
    scale_b: Sequence[Tensor],
    recipe_b: Sequence[int],
    swizzle_b: Sequence[int],
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    contraction_dim: Sequence[int] = (),
    use_fast_accum: bool = False,
) -> Tensor:
    """What torch.nn.functional.scaled_mm calls: each scale with a recipe."""

    def kernel(a: Any, b: Any, sa: Any, sb: Any, bias: Any, dtype: Any) -> Tensor:
        found: Tensor = _torch_ops._scaled_mm_v2(
            a, b, [sa], recipe_a, swizzle_a, [sb], recipe_b, swizzle_b, bias, dtype,
            contraction_dim, use_fast_accum,
        )  # fmt: skip
        return found

    # by tensor or by row; none swizzled
    plain = [*recipe_a, *recipe_b] in ([0, 0], [1, 1]) and not any((*swizzle_a, *swizzle_b))
    if plain and _served(self, mat2, scale_a[0], scale_b[0], out_dtype):
        return _product(kernel, self, mat2, scale_a[0], scale_b[0], bias, out_dtype)
    args = (
        self, mat2, scale_a, recipe_a, swizzle_a, scale_b, recipe_b, swizzle_b, bias, out_dtype,
        contraction_dim, use_fast_accum,
    )  # fmt: skip
    return fall_back(_torch_ops._scaled_mm_v2, args, {})


def _served(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype | None
) -> bool:
    """Whether scales are by tensor or by row and column; the rest is gathered, or torch refuses."""
    if a.ndim != 2 or b.ndim != 2 or dtype is None or dtype.itemsize == 1:
        return False
    if a.device.type == "cuda" and (a.shape[1] % _STEP or b.shape[1] % _STEP):
        return False
    whole = scale_a.numel() == scale_b.numel() == 1
    return whole or (scale_a.shape == (a.shape[0], 1) and scale_b.shape == (1, b.shape[1]))


def _product(
    kernel: Kernel,
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    dtype: Any,
) -> Tensor:
    """The product of shards; `kernel` on each, its addends added up in fp32."""
    by_row = scale_a.numel() > 1 or scale_b.numel() > 1
    # ones of one element are the same for all
    own = [("r", "u"), ("v", "c")] if by_row else [(), ()]
    scales = [scale_a, scale_b] if by_row else [scale_a.reshape(()), scale_b.reshape(())]
    terms = (("r", "k"), ("k", "c"), *own, ("c",) if bias is not None else (), ("r", "c"))
    operands = (a, b, *scales, bias)
    p = labels.plan(terms, *operands)
    la, lb, sa, sb, lbias = p.fit(operands)
    if not p.summed:
        return p.result(_on_shards(kernel, la, lb, sa, sb, lbias, dtype))
    # CUDA's kernel of scales by row rounds to the dtype of the result
    exact = dtype if by_row and la.is_cuda else torch.float32
    total = _on_shards(kernel, la, lb, sa, sb, None, exact).float()
    total = comm.reduce(total, comm.group(p.mesh, p.summed))
    return wrap((total if lbias is None else total + lbias).to(dtype), p.out)


def _on_shards(
    kernel: Kernel,
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """kernel of local matrices, filled up to what it takes: shards may be of any size."""
    (rows, inner), columns = a.shape, b.shape[1]
    step = _STEP if a.is_cuda else 1
    k, n = (max(step, -(-s // step) * step) for s in (inner, columns))
    a = _filled(a, max(1, rows), k).contiguous()
    # columns one after the other
    b = _filled(b.t(), n, k).contiguous().t()
    if scale_a.ndim:
        scale_a = _filled(scale_a, max(1, rows), 1).contiguous()
        scale_b = _filled(scale_b, 1, n).contiguous()
    if bias is not None:
        bias = F.pad(bias, [0, n - columns])
    y = kernel(a, b, scale_a, scale_b, bias, dtype)
    return y if y.shape == (rows, columns) else y[:rows, :columns]


def _filled(x: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix with rows and columns of zeros up to a size."""
    more = [0, columns - x.shape[1], 0, rows - x.shape[0]]
    if not any(more):
        return x
    if x.element_size() == 1:
        # 8-bit floats have no kernel for it everywhere; zero is no bit
        return F.pad(x.contiguous().view(torch.uint8), more).view(x.dtype)
    return F.pad(x, more)
