"""Convolution with its halo in flight, without a copy of the input.

A convolution is linear: that of the shard between zeros, which needs no neighbour, plus those of
the two halo strips between zeros, which touch the rim rows only. So the strips travel while the
shard is convolved, their part is added to the rim, and what is kept for backward is the input
itself and two strips. Backward likewise: the strips' gradients travel while those of input and
weight are computed. One exchange each way, as with a window.

It serves what `width` says. There it takes less time than `overlapped`, which serves every stencil
but copies the interior for the kernel and adds up its gradient in a buffer: 1 to 17 % less forward
and backward, for kernels of 3 and 7 rows and 2**18 to 2**23 elements on two processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch.autograd import apply
from ..spec import Dim, Spec
from .overlap import Route, route, start
from .windows import Reach, Stencil, fetch


class Settings(NamedTuple):
    """The convolution of the shard between zeros."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def width(dim: Dim, stencil: Stencil) -> int:
    """The rows of each strip; 0 where a stencil is not served.

    Served are as many rows out as in, by kernels that reach as far ahead as back (stride 1), which
    read rows of the direct neighbours only.
    """
    before = stencil.before
    after = before if stencil.after is None else stencil.after
    same = stencil.stride == 1 and before == after == stencil.extent - 1 - before
    return before if same and min(dim.sizes) >= before else 0


def halo_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    d: int,
    spec: Spec,
    reach: Reach,
    settings: Settings,
) -> Tensor:
    """The rows of the whole convolution that belong to this rank's shard x, (B, C, *spatial).

    d: the dim whose rows travel; reach: what is read of it.
    """
    return apply(_HaloConv, x, weight, bias, d, spec, reach, settings)


def _there(d: int, spec: Spec) -> tuple[bool, bool]:
    """Whether there is a neighbour above, and one below."""
    return spec.index[d] > 0, spec.index[d] + 1 < len(spec.dims[d].sizes)


def _swap(
    ends: Sequence[Tensor | None], x: Tensor, way: Route, there: tuple[bool, bool]
) -> Callable[[], list[Tensor | None]]:
    """Send one strip to each neighbour; calling what it returns gives [from above, from below]."""
    arrive = start(way, x, [e for e, t in zip(ends, there, strict=True) if t and e is not None])

    def strips() -> list[Tensor | None]:
        came = iter(arrive())
        return [next(came) if t else None for t in there]

    return strips


def _ends(x: Tensor, d: int, rows: int) -> tuple[Tensor, Tensor]:
    return x.narrow(d, 0, rows), x.narrow(d, x.shape[d] - rows, rows)


def _padded(strip: Tensor, d: int, above: bool) -> Tensor:
    """A strip beside the zeros that stand for the shard: as many rows of output as it has."""
    pads = [0] * (2 * (strip.ndim - d))
    pads[-1 if above else -2] = 2 * strip.shape[d]
    return F.pad(strip, pads)


def _strip_settings(settings: Settings, d: int) -> Settings:
    padding = list(settings.padding)
    padding[d - 2] = 0
    return settings._replace(padding=tuple(padding))


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    fn = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
    return fn(x, weight, bias, *settings)


class _HaloConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        d: int,
        spec: Spec,
        reach: Reach,
        settings: Settings,
    ) -> Tensor:
        """The shard between zeros while the strips travel; their part is added to the rim."""
        _, way, _ = route(spec, d, reach)
        rows = spec.offset[d] - reach.windows[spec.index[d]][0]
        arrive = _swap(_ends(x, d, rows), x, way, _there(d, spec))
        y = _conv(x, weight, bias, settings)
        strips = arrive()
        for strip, rim, above in zip(strips, _ends(y, d, rows), (True, False), strict=True):
            if strip is not None:
                inner = _strip_settings(settings, d)
                rim.add_(_conv(_padded(strip, d, above), weight, None, inner))
        ctx.save_for_backward(x, weight, bias, *strips)
        ctx.plan, ctx.settings = (d, spec, reach, way, rows), settings
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        """The strips' gradients travel while those of input and weight are computed."""
        x, weight, bias, *strips = ctx.saved_tensors
        (d, spec, reach, way, rows), settings = ctx.plan, ctx.settings
        needs, inner = ctx.needs_input_grad[:3], _strip_settings(settings, d)
        if torch.is_grad_enabled():
            # other names: one of them may have been computed from another
            x, weight = x.view_as(x), weight.view_as(weight)
            bias = None if bias is None else bias.view_as(bias)
            wanted = [t for t, need in zip((x, weight, bias), needs, strict=True) if need]
            # from one haloed copy: differentiable any number of times
            y = _conv(fetch(x, d, spec, reach), weight, bias, inner)
            found = iter(torch.autograd.grad(y, wanted, g, create_graph=True))
            return *(next(found) if need else None for need in needs), *[None] * 4
        outward: list[Tensor | None] = [None, None]
        weights = []
        for i, (strip, rim) in enumerate(zip(strips, _ends(g, d, rows), strict=True)):
            if strip is not None:
                whole = _padded(strip, d, i == 0)
                gx, gw, _ = _gradients(rim, whole, weight, None, inner, (needs[0], needs[1], False))
                outward[i] = None if gx is None else _ends(gx, d, rows)[i]
                weights.append(gw)
        if needs[0]:
            arrive = _swap(outward, x, way.back(), _there(d, spec))
        gx, gw, gb = _gradients(g, x, weight, bias, settings, needs)
        if needs[0]:
            for back, rim in zip(arrive(), _ends(gx, d, rows), strict=True):
                if back is not None:
                    rim.add_(back)
        for more in weights if needs[1] else ():
            gw = gw + more
        return gx, gw, gb, *[None] * 4


def _gradients(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings, needs: Any
) -> tuple[Any, Any, Any]:
    stride, padding, dilation, groups = settings
    sizes = None if bias is None else list(bias.shape)
    zeros = [0] * len(stride)
    return torch.ops.aten.convolution_backward(
        g, x, weight, sizes, stride, padding, dilation, False, zeros, groups, list(needs)
    )
