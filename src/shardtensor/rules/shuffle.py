"""Shuffles of pixels and channels, made of reshapes and permutations."""

from __future__ import annotations

from torch import Tensor

from ..registry import rule


@rule("pixel_shuffle")
def pixel_shuffle(input: Tensor, upscale_factor: int) -> Tensor:
    """(..., C r^2, H, W) to (..., C, H r, W r)."""
    r = upscale_factor
    if r < 1:
        raise RuntimeError(f"pixel_shuffle expects a positive upscale_factor, but got {r}")
    *lead, c, h, w = input.shape
    n = len(lead)
    y = input.reshape(*lead, c // r**2, r, r, h, w)
    y = y.permute(*range(n), n, n + 3, n + 1, n + 4, n + 2)
    return y.reshape(*lead, c // r**2, h * r, w * r)


@rule("pixel_unshuffle")
def pixel_unshuffle(input: Tensor, downscale_factor: int) -> Tensor:
    """(..., C, H r, W r) to (..., C r^2, H, W)."""
    r = downscale_factor
    if r < 1:
        raise RuntimeError(f"pixel_unshuffle expects a positive downscale_factor, but got {r}")
    *lead, c, h, w = input.shape
    n = len(lead)
    y = input.reshape(*lead, c, h // r, r, w // r, r)
    y = y.permute(*range(n), n, n + 2, n + 4, n + 1, n + 3)
    return y.reshape(*lead, c * r**2, h // r, w // r)


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(input: Tensor, groups: int) -> Tensor:
    b, c, *rest = input.shape
    return input.reshape(b, groups, c // groups, *rest).transpose(1, 2).reshape(b, c, *rest)
