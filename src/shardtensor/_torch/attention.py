# mypy: disable-error-code="attr-defined, union-attr, assignment, misc"
"""Private torch APIs of fused attention: the kernel that takes a block, with its log-sum-exp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch


class AttentionKernel(NamedTuple):
    """A fused attention kernel: q (B, H, L, E), k (B, G, S, E), v (B, G, S, F), H a multiple of G.

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
        fits = cuda.flash_sdp_enabled() and q.shape[-1] == v.shape[-1]
        return _FLASH_CPU if fits else None
    if q.device.type != "cuda" or torch.version.hip:
        return None
    if mask is not None and mask.dtype is not torch.bool:
        # rows of which numbers hide all keys have lost their digits, which nobody can look for
        return None
    width = _width(q, v)
    # heads of the width that the kernels get; nothing is copied to ask
    asked = _like(q, q.shape, width)
    keys, values = (_like(q, (*q.shape[:2], x.shape[2]), width) for x in (k, v))
    if mask is not None:
        bias = asked.detach().new_empty((1, 1, 1, k.shape[2])).expand(*q.shape[:3], k.shape[2])
        params = cuda.SDPAParams(asked, keys, values, bias, 0.0, causal, False)
        return _EFFICIENT_CUDA if cuda.can_use_efficient_attention(params) else None
    choice = _chosen(asked, keys, values, causal)
    if choice == _CUDNN_CHOICE and _cudnn_serves(q.device, q.dtype, width):
        return _CUDNN
    params = cuda.SDPAParams(asked, keys, values, None, 0.0, causal, False)
    if cuda.can_use_flash_attention(params):
        return _FLASH_CUDA
    return _EFFICIENT_CUDA if cuda.can_use_efficient_attention(params) else None


# SDPBackend.CUDNN_ATTENTION
_CUDNN_CHOICE = 3


def _width(q: torch.Tensor, v: torch.Tensor) -> int:
    """The width of the heads that the kernels get: a multiple of 8."""
    return -(-max(q.shape[-1], v.shape[-1]) // 8) * 8


def _like(q: torch.Tensor, rows: Sequence[int], width: int) -> torch.Tensor:
    found = q.new_empty((1, 1, 1, width)).expand(*rows[:3], width)
    return found.detach().requires_grad_(q.requires_grad)


def _chosen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> int | None:
    """The kernel that plain attention takes on this device."""
    if type(q) is not torch.Tensor:
        return None
    choose: Any = torch._fused_sdp_choice
    return int(choose(q, k, v, None, 0.0, causal))


@lru_cache(maxsize=64)
def _cudnn_serves(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether cuDNN's kernel gives and takes log-sum-exps as the others do; asked once.

    Its log-sum-exp is not documented: a block of queries over half of the keys, with what all keys
    give, must have the gradients of flash attention's kernel.
    """
    random = torch.Generator(device).manual_seed(0)
    q, k, v, g = (
        torch.randn((1, 2, 128, width), device=device, dtype=dtype, generator=random)
        for _ in range(4)
    )
    half = k[:, :, :64], v[:, :, :64]
    with torch.no_grad():
        try:
            found = []
            for kernel in (_FLASH_CUDA, _CUDNN):
                out, lse = kernel.forward(q, k, v, None, False, width**-0.5)
                part = kernel.forward(q, *half, None, False, width**-0.5)
                grads = kernel.backward(g, q, *half, None, out, lse, False, width**-0.5)
                found.append([out, lse, *part, *grads])
        except RuntimeError:
            return False
        pairs = zip(*found, strict=True)
        return all(a.shape == b.shape and bool((a - b).abs().max() < 0.05) for a, b in pairs)


def _padded(kernel: AttentionKernel) -> AttentionKernel:
    """The kernel with heads of any width: zeros, up to a multiple of 8, add nothing."""

    def wide(x: torch.Tensor, width: int) -> torch.Tensor:
        more = width - x.shape[-1]
        return torch.nn.functional.pad(x, (0, more)) if more else x

    def forward(q: Any, k: Any, v: Any, bias: Any, causal: bool, scale: float) -> Any:
        width = _width(q, v)
        found = (wide(x, width) for x in (q, k, v))
        out, lse = kernel.forward(*found, bias, causal, scale)
        return out[..., : v.shape[-1]], lse

    def backward(
        g: Any, q: Any, k: Any, v: Any, bias: Any, out: Any, lse: Any, causal: bool, scale: float
    ) -> Any:
        width = _width(q, v)
        g, q_, k_, v_, out = (wide(x, width) for x in (g, q, k, v, out))
        found = kernel.backward(g, q_, k_, v_, bias, out, lse, causal, scale)
        return tuple(d[..., : x.shape[-1]] for d, x in zip(found, (q, k, v), strict=True))

    return AttentionKernel(forward, backward)


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


def _aligned(bias: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> Any:
    """The bias (B, H, L, S) whose rows begin at multiples of 16 numbers, as the kernel asks."""
    if bias is None:
        return None
    keys = k.shape[2]
    whole = bias.expand(*bias.shape[:-1], keys)
    if whole.stride(-1) != 1 or any(n % 16 for n in whole.stride()[:-1]):
        made = bias.new_zeros((*whole.shape[:-1], keys + -keys % 16))[..., :keys]
        whole = made.copy_(whole)
    return whole.expand(*q.shape[:3], keys)


def _efficient_cuda(q: Any, k: Any, v: Any, bias: Any, causal: bool, scale: float) -> Any:
    same = q.shape[1] // k.shape[1]
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        _rows(q), _rows(_heads(k, same)), _rows(_heads(v, same)), _aligned(bias, q, k), True, 0.0,
        causal, scale=scale,
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
        g.contiguous(), _rows(q), _rows(_heads(k, same)), _rows(_heads(v, same)),
        _aligned(bias, q, k), out, padded.contiguous(), state, state, 0.0,
        [True, True, True, False], causal, scale=scale,
    )  # fmt: skip
    return dq, _summed_heads(dk, same), _summed_heads(dv, same)


def _cudnn(q: Any, k: Any, v: Any, bias: Any, causal: bool, scale: float) -> Any:
    same = q.shape[1] // k.shape[1]
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        _rows(q), _rows(_heads(k, same)), _rows(_heads(v, same)), None, True, 0.0, causal, False,
        scale=scale,
    )  # fmt: skip
    return out, lse.reshape(out.shape[:3])


def _cudnn_backward(
    g: Any, q: Any, k: Any, v: Any, bias: Any, out: Any, lse: Any, causal: bool, scale: float
) -> Any:
    same = q.shape[1] // k.shape[1]
    # without dropout the kernel does not read its random state
    state = torch.empty((), dtype=torch.int64, device=q.device)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        g.contiguous(), _rows(q), _rows(_heads(k, same)), _rows(_heads(v, same)), out,
        lse.contiguous().unsqueeze(-1), state, state, None, None, None, q.shape[2], k.shape[2], 0.0,
        causal, scale=scale,
    )  # fmt: skip
    return dq, _summed_heads(dk, same), _summed_heads(dv, same)


_FLASH_CPU = AttentionKernel(_flash_cpu, _flash_cpu_backward)

# the kernels for CUDA are written from the signatures of torch 2.11 to 2.14
_FLASH_CUDA = _padded(AttentionKernel(_flash_cuda, _flash_cuda_backward))

_EFFICIENT_CUDA = _padded(AttentionKernel(_efficient_cuda, _efficient_cuda_backward))

_CUDNN = _padded(AttentionKernel(_cudnn, _cudnn_backward))
