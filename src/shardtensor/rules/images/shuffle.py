"""Shuffles of pixels and channels: torch's own on shards that hold whole blocks of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...cache import cached
from ...registry import rule
from ...spec import Dim
from ...tensor import ShardTensor, layout, wrap
from ...tensor.redistribute import reduced, to_dims


@cached
def _in_blocks(dim: Dim, n: int) -> Dim:
    """The dim with the n rows of each block on one rank."""
    return dim.cut_at([-(-e // n) * n for e in dim.offsets]) if dim.axes else dim


def _on_shards(x: ShardTensor, fn: Callable[[Tensor], Tensor], dims: Sequence[Dim]) -> ShardTensor:
    """fn of each shard, in the memory format that torch gives it."""
    spec, local = x._spec.with_dims(dims), x._local
    # torch's own gradient of what is empty has the wrong shape
    return wrap(fn(local) if local.numel() else local.reshape(spec.local_shape), spec)


@rule("pixel_shuffle")
def pixel_shuffle(input: ShardTensor, upscale_factor: int) -> ShardTensor:
    """(..., C r^2, H, W) to (..., C, H r, W r)."""
    r, x = upscale_factor, reduced(input)
    if r < 1:
        raise RuntimeError(f"pixel_shuffle expects a positive upscale_factor, but got {r}")
    *lead, c, rows, columns = x._spec.dims
    if c.size % r**2:
        raise RuntimeError(f"pixel_shuffle expects a multiple of {r**2} channels, but got {c.size}")
    channels = _in_blocks(c, r**2)
    dims = (*lead, channels.scaled(1, r**2), rows.scaled(r), columns.scaled(r))
    x = to_dims(x, (*lead, channels, rows, columns))
    return _on_shards(x, lambda own: F.pixel_shuffle(own, r), dims)


@rule("pixel_unshuffle")
def pixel_unshuffle(input: ShardTensor, downscale_factor: int) -> ShardTensor:
    """(..., C, H r, W r) to (..., C r^2, H, W)."""
    r, x = downscale_factor, reduced(input)
    if r < 1:
        raise RuntimeError(f"pixel_unshuffle expects a positive downscale_factor, but got {r}")
    *lead, channels, h, w = x._spec.dims
    if h.size % r or w.size % r:
        raise RuntimeError(
            f"pixel_unshuffle expects multiples of {r}, but got {h.size} rows of {w.size}"
        )
    rows, columns = _in_blocks(h, r), _in_blocks(w, r)
    dims = (*lead, channels.scaled(r**2), rows.scaled(1, r), columns.scaled(1, r))
    x = to_dims(x, (*lead, channels, rows, columns))
    return _on_shards(x, lambda own: F.pixel_unshuffle(own, r), dims)


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(input: ShardTensor, groups: int) -> Tensor:
    x = reduced(input)
    if x.ndim < 3 or groups < 1 or x.shape[1] % groups:
        # shards without elements would not say so
        raise RuntimeError(
            f"channel_shuffle expects more than 2 dims and groups of equal size, but got {groups} "
            f"groups of {tuple(x.shape)}"
        )
    b, c, *rest = x.shape
    if not x._spec.dims[1].axes:
        return _on_shards(x, lambda own: torch.channel_shuffle(own, groups), x._spec.dims)
    y = x.reshape(b, groups, c // groups, *rest).transpose(1, 2).contiguous().reshape(b, c, *rest)
    return layout.like_image(y, x)
