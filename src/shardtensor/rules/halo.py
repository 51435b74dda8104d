"""Convolution with its halo in flight, without a copy of the input.

A convolution is linear: that of the shard between zeros, which needs no neighbour, plus those of
the two halo strips between zeros, which touch the rim rows only. So the strips travel while the
shard is convolved, their part is added to the rim, and what is kept for backward is the input
itself and two strips. Backward likewise: the strips' gradients travel while those of input and
weight are computed. One exchange each way, as with a window.

For stride 1 and as many rows out as in along the sharded dim, halos from the direct neighbours.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import comm
from ..comm import wire


class Halo(NamedTuple):
    """One sharded dim of a convolution. dim: of the local tensor. width: rows of each strip."""

    dim: int
    width: int
    sizes: tuple[int, ...]
    group: str


class Settings(NamedTuple):
    """The convolution of the shard between zeros."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def halo_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, halo: Halo, settings: Settings
) -> Tensor:
    """The rows of the whole convolution that belong to this rank's shard x, (B, C, *spatial)."""
    return _HaloConv.apply(x, weight, bias, halo, settings)


def _swap_strips(top: Tensor | None, bottom: Tensor | None, like: Tensor, halo: Halo) -> Any:
    """Send one strip to each neighbour; calling what it returns gives (from above, from below)."""
    me, n = comm.rank(halo.group), len(halo.sizes)
    sends: dict[int, list[Tensor]] = {}
    shapes: dict[int, list[list[int]]] = {}
    shape = list(like.shape)
    shape[halo.dim] = halo.width
    for other, strip in ((me - 1, top), (me + 1, bottom)):
        if 0 <= other < n:
            assert strip is not None
            sends[other], shapes[other] = [strip], [shape]
    arrived = wire.start_exchange(sends, shapes, like, halo.group, "halo")

    def strips() -> tuple[Tensor | None, Tensor | None]:
        found = arrived()
        return (found[me - 1][0] if me else None, found[me + 1][0] if me + 1 < n else None)

    return strips


def _ends(x: Tensor, halo: Halo) -> tuple[Tensor, Tensor]:
    n = x.shape[halo.dim]
    width = halo.width
    return x.narrow(halo.dim, 0, width), x.narrow(halo.dim, n - width, width)


def _padded(strip: Tensor, halo: Halo, above: bool) -> Tensor:
    """A strip beside the zeros that stand for the shard: rows that make `width` rows of output."""
    pads = [0] * (2 * (strip.ndim - halo.dim))
    pads[-1 if above else -2] = 2 * halo.width
    return F.pad(strip, pads)


def _strip_settings(settings: Settings, halo: Halo) -> Settings:
    padding = list(settings.padding)
    padding[halo.dim - 2] = 0
    return settings._replace(padding=tuple(padding))


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    fn = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
    return fn(x, weight, bias, *settings)


def _plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, halo: Halo, settings: Settings
) -> Tensor:
    """The same from one haloed copy: differentiable any number of times."""
    ends = accumulate(halo.sizes, initial=0)
    windows = [(a - halo.width, b + halo.width) for a, b in pairwise(ends)]
    whole = comm.window(x, halo.dim, halo.sizes, windows, halo.group)
    return _conv(whole, weight, bias, _strip_settings(settings, halo))


class _HaloConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, halo: Halo, settings: Settings
    ) -> Tensor:
        arrive = _swap_strips(*_ends(x, halo), x, halo)
        y = _conv(x, weight, bias, settings)
        strips = arrive()
        for strip, rim, above in zip(strips, _ends(y, halo), (True, False), strict=True):
            if strip is not None:
                inner = _strip_settings(settings, halo)
                rim.add_(_conv(_padded(strip, halo, above), weight, None, inner))
        ctx.save_for_backward(x, weight, bias, *strips)
        ctx.halo, ctx.settings = halo, settings
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, weight, bias, *strips = ctx.saved_tensors
        halo, settings = ctx.halo, ctx.settings
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            # other names: one of them may have been computed from another
            x, weight = x.view_as(x), weight.view_as(weight)
            bias = None if bias is None else bias.view_as(bias)
            wanted = [t for t, need in zip((x, weight, bias), needs, strict=True) if need]
            y = _plain(x, weight, bias, halo, settings)
            found = iter(torch.autograd.grad(y, wanted, g, create_graph=True))
            return *(next(found) if need else None for need in needs), None, None
        inner = _strip_settings(settings, halo)
        outward: list[Tensor | None] = [None, None]
        weights = []
        for i, (strip, rim) in enumerate(zip(strips, _ends(g, halo), strict=True)):
            if strip is not None:
                whole = _padded(strip, halo, i == 0)
                gx, gw, _ = _gradients(rim, whole, weight, None, inner, (needs[0], needs[1], False))
                outward[i] = None if gx is None else _ends(gx, halo)[i]
                weights.append(gw)
        if needs[0]:
            arrive = _swap_strips(outward[0], outward[1], x, halo)
        gx, gw, gb = _gradients(g, x, weight, bias, settings, needs)
        if needs[0]:
            for back, rim in zip(arrive(), _ends(gx, halo), strict=True):
                if back is not None:
                    rim.add_(back)
        for more in weights if needs[1] else ():
            gw = gw + more
        return gx, gw, gb, None, None


def _gradients(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings, needs: Any
) -> tuple[Any, Any, Any]:
    stride, padding, dilation, groups = settings
    sizes = None if bias is None else list(bias.shape)
    zeros = [0] * len(stride)
    return torch.ops.aten.convolution_backward(
        g, x, weight, sizes, stride, padding, dilation, False, zeros, groups, list(needs)
    )
