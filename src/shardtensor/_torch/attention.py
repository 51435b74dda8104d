# mypy: disable-error-code="attr-defined, union-attr, assignment, misc"
"""Private torch APIs of fused attention: the kernel that takes a block, with its log-sum-exp."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from math import inf
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..cache import unseen

# in which order kernels are tried, where several can and `sdpa_kernel` was given an order
sdp_priority = torch._C._get_sdp_priority_order
set_sdp_priority = torch._C._set_sdp_priority_order


class Block(NamedTuple):
    """How a kernel weighs the keys of a block. bias: numbers to add to the scores.

    drop: the probability with which weights are dropped, seed: of what drops them.
    """

    scale: float
    bias: torch.Tensor | None = None
    causal: bool = False
    drop: float = 0.0
    seed: int = 0


class AttentionKernel(NamedTuple):
    """A fused attention kernel: q (B, H, L, E), k (B, G, S, E), v (B, G, S, F), H a multiple of G.

    forward(q, k, v, block) gives (out, lse). backward(g, q, k, v, out, lse, block, mask_grad) gives
    (dq, dk, dv, gradient of the bias or None) and takes an lse over more keys than k's.
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]


def attention_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    drop: float = 0.0,
    mask_grad: bool = False,
) -> AttentionKernel | None:
    """The kernel that takes a block of attention, None if none does."""
    cuda = torch.backends.cuda
    if q.device.type == "cpu":
        fits = cuda.flash_sdp_enabled() and q.shape[-1] == v.shape[-1] and not (drop or mask_grad)
        return _FLASH_CPU if fits else None
    if q.device.type != "cuda" or torch.version.hip or drop >= 1:
        return None
    if mask is not None and mask.dtype not in (torch.bool, q.dtype):
        return None
    width = _width(q, v)
    # heads of the width that the kernels get; nothing is copied to ask
    asked = _like(q, q.shape, width)
    keys, values = (_like(q, (*q.shape[:2], x.shape[2]), width) for x in (k, v))
    bias = None
    if mask is not None:
        bias = asked.detach().new_empty((1, 1, 1, k.shape[2])).expand(*q.shape[:3], k.shape[2])
        bias.requires_grad_(mask_grad)
    params = cuda.SDPAParams(asked, keys, values, bias, drop, causal, False)
    if drop:
        # seeds are numbers of the host here
        capturing = torch.cuda.is_current_stream_capturing()
        return None if capturing else _of_dropout(params)
    choice = _chosen(asked, keys, values, bias, causal)
    fits = choice == _CUDNN_CHOICE and not mask_grad
    if fits and _cudnn_serves(q.device, q.dtype, width, mask is not None):
        return _CUDNN
    return _able(params)


def takes_flash_on_cpus(
    q: Sequence[int],
    k: Sequence[int],
    v: Sequence[int],
    mask: Sequence[int] | None,
    grouped: bool,
) -> bool:
    """Whether plain attention of such shapes takes its fused kernel on CPUs, where that is allowed.

    Up to torch 2.13 of four dims, since 2.14 of three, too.
    """
    choose: Any = torch._fused_sdp_choice
    # rows that lie in one piece, of no more memory than one
    every = [torch.empty(s[-1:], device="cpu").expand(*s) for s in (q, k, v)]
    seen = None if mask is None else torch.empty(1, device="cpu").expand(*mask)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        return int(choose(*every, seen, 0.0, False, enable_gqa=grouped)) == _FLASH_CHOICE


def _able(params: Any) -> AttentionKernel | None:
    if torch.backends.cuda.can_use_flash_attention(params):
        return _FLASH_CUDA
    return _EFFICIENT_CUDA if torch.backends.cuda.can_use_efficient_attention(params) else None


def _of_dropout(params: Any) -> AttentionKernel | None:
    """The same in forward and backward, whatever kernels are allowed when: each drops otherwise."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        return _able(params)


# SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
_FLASH_CHOICE, _CUDNN_CHOICE = 1, 3


def _width(q: torch.Tensor, v: torch.Tensor) -> int:
    """The width of the heads that the kernels get: a multiple of 8."""
    return -(-max(q.shape[-1], v.shape[-1]) // 8) * 8


def _like(q: torch.Tensor, rows: Sequence[int], width: int) -> torch.Tensor:
    found = q.new_empty((1, 1, 1, width)).expand(*rows[:3], width)
    return found.detach().requires_grad_(q.requires_grad)


def _chosen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, causal: bool
) -> int | None:
    """The kernel that plain attention takes on this device."""
    if type(q) is not torch.Tensor:
        return None
    choose: Any = torch._fused_sdp_choice
    return int(choose(q, k, v, bias, 0.0, causal))


@lru_cache(maxsize=64)
@unseen
def _cudnn_serves(device: torch.device, dtype: torch.dtype, width: int, biased: bool) -> bool:
    """Whether cuDNN's kernel gives and takes log-sum-exps as the others do; asked once.

    Its log-sum-exp is not documented: a block of queries over half of the keys, with what all keys
    give, must have the gradients of flash attention's kernel; with a bias of the efficient one's.
    """
    random = torch.Generator(device).manual_seed(0)
    q, k, v, g, some = (
        torch.randn((1, 2, 128, width), device=device, dtype=dtype, generator=random)
        for _ in range(5)
    )
    half = k[:, :, :64], v[:, :, :64]
    whole = part = Block(width**-0.5)
    hidden = 0
    if biased:
        bias = some.mean(-1, keepdim=True) * torch.arange(128, device=device).sub(64).to(dtype)
        # rows that see no key of a block may be anything there
        hidden = 2
        bias[:, :, :hidden, :64] = -inf
        whole = Block(width**-0.5, bias)
        part = Block(width**-0.5, bias[..., :64])
    with torch.no_grad():
        try:
            found = []
            for kernel in (_EFFICIENT_CUDA if biased else _FLASH_CUDA, _CUDNN):
                out, lse = kernel.forward(q, k, v, whole)
                own = [x[:, :, hidden:] for x in kernel.forward(q, *half, part)]
                grads = kernel.backward(g, q, *half, out, lse, part, False)[:3]
                found.append([out, lse, *own, *grads])
        except RuntimeError:
            return False
        pairs = zip(*found, strict=True)
        return all(a.shape == b.shape and bool((a - b).abs().max() < 0.05) for a, b in pairs)


def _padded(kernel: AttentionKernel) -> AttentionKernel:
    """The kernel with heads of any width: zeros, up to a multiple of 8, add nothing."""

    def wide(x: torch.Tensor, width: int) -> torch.Tensor:
        more = width - x.shape[-1]
        return torch.nn.functional.pad(x, (0, more)) if more else x

    def forward(q: Any, k: Any, v: Any, block: Block) -> Any:
        width = _width(q, v)
        found = (wide(x, width) for x in (q, k, v))
        out, lse = kernel.forward(*found, block)
        return out[..., : v.shape[-1]], lse

    def backward(
        g: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, block: Block, mask_grad: bool
    ) -> Any:
        width = _width(q, v)
        g, q_, k_, v_, out = (wide(x, width) for x in (g, q, k, v, out))
        *found, bias = kernel.backward(g, q_, k_, v_, out, lse, block, mask_grad)
        return *(d[..., : x.shape[-1]] for d, x in zip(found, (q, k, v), strict=True)), bias

    return AttentionKernel(forward, backward)


def _rows(*xs: torch.Tensor) -> list[torch.Tensor]:
    """The tensors with rows that lie in one piece, as the kernels ask."""
    found = []
    for x in xs:
        found.append(x if x.stride(-1) == 1 else x.contiguous())
    return found


def _heads(x: torch.Tensor, times: int) -> torch.Tensor:
    return x if times == 1 else x.repeat_interleave(times, 1)


def _summed_heads(x: torch.Tensor, times: int) -> torch.Tensor:
    return x if times == 1 else x.unflatten(1, (-1, times)).sum(2)


@contextmanager
def _seeded(device: torch.device, block: Block) -> Iterator[None]:
    """Inside, kernels that drop weights draw from the block's seed; it waits for no device."""
    if not block.drop or device.type != "cuda":
        yield
        return
    generator = torch.cuda.default_generators[device.index]
    kept = generator.get_state()
    generator.manual_seed(block.seed)
    try:
        yield
    finally:
        generator.set_state(kept)


def _flash_cpu(q: Any, k: Any, v: Any, block: Block) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *_rows(q, k, v), 0.0, block.causal, attn_mask=block.bias, scale=block.scale
    )


def _flash_cpu_backward(
    g: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, block: Block, mask_grad: bool
) -> Any:
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *_rows(g, q, k, v, out), lse, 0.0, block.causal,
        attn_mask=block.bias, scale=block.scale,
    )  # fmt: skip
    return *grads, None


def _flash_cuda(q: Any, k: Any, v: Any, block: Block) -> Any:
    same = q.shape[1] // k.shape[1]
    with _seeded(q.device, block):
        return torch.ops.aten._scaled_dot_product_flash_attention(
            *_rows(q, _heads(k, same), _heads(v, same)), block.drop, block.causal,
            False, scale=block.scale,
        )[:2]  # fmt: skip


def _flash_cuda_backward(
    g: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, block: Block, mask_grad: bool
) -> Any:
    same = q.shape[1] // k.shape[1]
    # without dropout the kernel does not read its random state
    state, unused = (torch.empty(n, dtype=torch.uint64, device=q.device) for n in ([2], []))
    if block.drop:
        # the seed and how far it was drawn from
        numbers = state.view(torch.int64)
        numbers[:1].fill_(block.seed)
        numbers[1:].zero_()
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        g.contiguous(), *_rows(q, _heads(k, same), _heads(v, same)), out,
        lse.contiguous(), None, None, q.shape[2], k.shape[2], block.drop, block.causal, state,
        unused, scale=block.scale,
    )  # fmt: skip
    return dq, _summed_heads(dk, same), _summed_heads(dv, same), None


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


def _efficient_cuda(q: Any, k: Any, v: Any, block: Block) -> Any:
    same = q.shape[1] // k.shape[1]
    with _seeded(q.device, block):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            *_rows(q, _heads(k, same), _heads(v, same)), _aligned(block.bias, q, k),
            True, block.drop, block.causal, scale=block.scale,
        )  # fmt: skip
    # the kernel pads the rows of lse to a multiple of 32
    return out, lse[:, :, : q.shape[2]]


def _efficient_cuda_backward(
    g: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, block: Block, mask_grad: bool
) -> Any:
    same = q.shape[1] // k.shape[1]
    padded = torch.nn.functional.pad(lse, (0, -q.shape[2] % 32), value=inf)
    # on the host, where the kernel looks for them
    seed, drawn = (torch.tensor(n, dtype=torch.int64, device="cpu") for n in (block.seed, 0))
    dq, dk, dv, bias = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        g.contiguous(), *_rows(q, _heads(k, same), _heads(v, same)),
        _aligned(block.bias, q, k), out, padded.contiguous(), seed, drawn, block.drop,
        [True, True, True, mask_grad], block.causal, scale=block.scale,
    )  # fmt: skip
    return dq, _summed_heads(dk, same), _summed_heads(dv, same), bias if mask_grad else None


def _cudnn(q: Any, k: Any, v: Any, block: Block) -> Any:
    same = q.shape[1] // k.shape[1]
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *_rows(q, _heads(k, same), _heads(v, same)), _aligned(block.bias, q, k), True,
        0.0, block.causal, False, scale=block.scale,
    )  # fmt: skip
    return out, lse.reshape(out.shape[:3])


def _cudnn_backward(
    g: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, block: Block, mask_grad: bool
) -> Any:
    same = q.shape[1] // k.shape[1]
    # without dropout the kernel does not read its random state
    state = torch.empty((), dtype=torch.int64, device=q.device)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        g.contiguous(), *_rows(q, _heads(k, same), _heads(v, same)), out,
        lse.contiguous().unsqueeze(-1), state, state, _aligned(block.bias, q, k), None, None,
        q.shape[2], k.shape[2], 0.0, block.causal, scale=block.scale,
    )  # fmt: skip
    return dq, _summed_heads(dk, same), _summed_heads(dv, same), None


_FLASH_CPU = AttentionKernel(_flash_cpu, _flash_cpu_backward)

# the kernels for CUDA are written from the signatures of torch 2.11 to 2.15
_FLASH_CUDA = _padded(AttentionKernel(_flash_cuda, _flash_cuda_backward))

_EFFICIENT_CUDA = _padded(AttentionKernel(_efficient_cuda, _efficient_cuda_backward))

_CUDNN = _padded(AttentionKernel(_cudnn, _cudnn_backward))
