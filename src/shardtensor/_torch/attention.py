# mypy: disable-error-code="attr-defined, union-attr, assignment, misc"
"""Private torch APIs of fused attention: the kernel that takes a block, with its log-sum-exp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class AttentionKernel(NamedTuple):
    """A fused attention kernel of q (B, H, L, E), k and v (B, G, S, E), H a multiple of G.

    forward(q, k, v, bias, causal, scale) gives (out, lse). backward(g, q, k, v, bias, out, lse,
    causal, scale) gives (dq, dk, dv) and takes an lse over more keys than k's.
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def attention_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool
) -> AttentionKernel | None:
    """The kernel that takes a block of attention, None if none does."""
    cuda = torch.backends.cuda
    if q.device.type == "cpu":
        return _FLASH_CPU if cuda.flash_sdp_enabled() else None
    if q.device.type != "cuda" or torch.version.hip or mask is not None or q.shape[-1] % 8:
        return None
    same = q.shape[1] // k.shape[1]
    params = cuda.SDPAParams(q, _heads(k, same), _heads(v, same), None, 0.0, causal, False)
    if cuda.can_use_flash_attention(params):
        return _FLASH_CUDA
    return _EFFICIENT_CUDA if cuda.can_use_efficient_attention(params) else None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """The tensor with rows that lie in one piece, as the kernels ask."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads(x: torch.Tensor, times: int) -> torch.Tensor:
    return x if times == 1 else x.repeat_interleave(times, 1)


def _summed_heads(x: torch.Tensor, times: int) -> torch.Tensor:
    return x if times == 1 else x.unflatten(1, (-1, times)).sum(2)


def _flash_cpu(q: Any, k: Any, v: Any, bias: Any, causal: bool, scale: float) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _rows(q), _rows(k), _rows(v), 0.0, causal, attn_mask=bias, scale=scale
    )


def _flash_cpu_backward(
    g: Any, q: Any, k: Any, v: Any, bias: Any, out: Any, lse: Any, causal: bool, scale: float
) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _rows(g), _rows(q), _rows(k), _rows(v), _rows(out), lse, 0.0, causal, attn_mask=bias,
        scale=scale,
    )  # fmt: skip


def _flash_cuda(q: Any, k: Any, v: Any, bias: Any, causal: bool, scale: float) -> Any:
    same = q.shape[1] // k.shape[1]
    return torch.ops.aten._scaled_dot_product_flash_attention(
        _rows(q), _rows(_heads(k, same)), _rows(_heads(v, same)), 0.0, causal, False, scale=scale
    )[:2]


def _flash_cuda_backward(
    g: Any, q: Any, k: Any, v: Any, bias: Any, out: Any, lse: Any, causal: bool, scale: float
) -> Any:
    same = q.shape[1] // k.shape[1]
    # without dropout the kernel does not read its random state
    state, unused = (torch.empty(n, dtype=torch.uint64, device=q.device) for n in ([2], []))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        g.contiguous(), _rows(q), _rows(_heads(k, same)), _rows(_heads(v, same)), out, 
        lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, state, unused,
        scale=scale,
    )  # fmt: skip
    return dq, _summed_heads(dk, same), _summed_heads(dv, same)


def _efficient_cuda(q: Any, k: Any, v: Any, bias: Any, causal: bool, scale: float) -> Any:
    same = q.shape[1] // k.shape[1]
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        _rows(q), _rows(_heads(k, same)), _rows(_heads(v, same)), None, True, 0.0, causal,
        scale=scale,
    )  # fmt: skip
    # the kernel pads the rows of lse to a multiple of 32
    return out, lse[:, :, : q.shape[2]]


def _efficient_cuda_backward(
    g: Any, q: Any, k: Any, v: Any, bias: Any, out: Any, lse: Any, causal: bool, scale: float
) -> Any:
    same = q.shape[1] // k.shape[1]
    padded = torch.nn.functional.pad(lse, (0, -q.shape[2] % 32), value=float("inf"))
    state = torch.zeros((), dtype=torch.int64, device=q.device)
    dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        g.contiguous(), _rows(q), _rows(_heads(k, same)), _rows(_heads(v, same)), None, out,
        padded.contiguous(), state, state, 0.0, [True, True, True, False], causal, scale=scale,
    )  # fmt: skip
    return dq, _summed_heads(dk, same), _summed_heads(dv, same)


_FLASH_CPU = AttentionKernel(_flash_cpu, _flash_cpu_backward)

# the kernels for CUDA are written from the signatures of torch 2.11 to 2.13
_FLASH_CUDA = AttentionKernel(_flash_cuda, _flash_cuda_backward)

_EFFICIENT_CUDA = AttentionKernel(_efficient_cuda, _efficient_cuda_backward)
