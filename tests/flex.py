"""flex_attention as a formula of plain tensors: torch's own has no gradients on CPUs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import AuxOutput, flex_attention

from shardtensor.dispatch.rule import captures_shards


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score_mod: Any = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    return_aux: Any = None,
    kernel_options: Any = None,
) -> Any:
    """What flex_attention gives, of differentiable ops that materialize all scores."""
    groups = q.shape[1] // k.shape[1] if enable_gqa else 1
    k, v = (x.expand(len(q), *x.shape[1:]).repeat_interleave(groups, 1) for x in (k, v))
    s = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    at = [torch.arange(n) for n in s.shape]
    seen = None
    with TransformGetItemToIndex():
        if block_mask is not None:
            seen = _over_scores(block_mask.mask_mod, ())(*at)
        if score_mod is not None:
            s = _over_scores(score_mod, (0,))(s, *at)
    s = s.to(q.dtype)
    s = s if seen is None else s.masked_fill(~seen, -math.inf)
    dead = (s == -math.inf).all(-1, keepdim=True)
    top = s.detach().amax(-1, keepdim=True).masked_fill(dead, 0)
    p = (s - top).exp()
    total = p.sum(-1, keepdim=True)
    out = (p / total.masked_fill(dead, 1)) @ v
    lse = (top + total.masked_fill(dead, 1).log()).masked_fill(dead, -math.inf).squeeze(-1)
    lse = lse if lse.numel() else None
    if return_aux is not None:
        return out, AuxOutput(lse=lse if return_aux.lse else None)
    return (out, lse) if return_lse else out


def _over_scores(fn: Any, first: tuple[int, ...]) -> Any:
    for hidden in (3, 2, 1, 0):
        fn = torch.vmap(fn, in_dims=(*first, *(0 if d == hidden else None for d in range(4))))
    return fn


def flex(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
    """flex_attention of ShardTensors; of plain tensors torch's, by the formula where it has none."""
    plain = not captures_shards((q, k, v, *args))
    if plain and not q.numel() and k.shape[2]:
        # no scores: torch's way without a graph looks for a first index all the same
        args = ()
    if plain and any(x.requires_grad for x in (q, k, v)):
        return formula(q, k, v, *args, **kwargs)
    if not plain:
        return flex_attention(q, k, v, *args, **kwargs)
    # as it is without a graph made of it first
    torch_flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    try:
        return flex_attention(q, k, v, *args, **kwargs)
    finally:
        torch_flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = False
