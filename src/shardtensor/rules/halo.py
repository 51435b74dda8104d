"""Convolution with its halo in flight, without a copy of the input.

A convolution is linear: that of the shard between zeros, which needs no neighbour, plus those of
the two halo strips between zeros, which touch the rim rows only. So the strips travel while the
shard is convolved, their part is added to the rim, and what is kept for backward is the input
itself and two strips. Backward likewise: the strips' gradients travel while those of input and
weight are computed. One exchange each way, as with a window.

It serves what `rims` says. There it takes less time than `overlapped`, which serves every stencil
but copies the interior for the kernel and adds up its gradient in a buffer: 1 to 17 % less forward
and backward, for kernels of 3 and 7 rows and 2**18 to 2**23 elements on two processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch.autograd import apply
from ..cache import cached
from ..cuts import table
from ..spec import Spec
from .overlap import Route, route, start
from .windows import Reach, Stencil, fetch


class Settings(NamedTuple):
    """The convolution of the shard between zeros."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class Rims(NamedTuple):
    """Rows of a stencil beyond this rank's shard, and own ones beyond those of its neighbours.

    above, below: how many outputs read of the rank before and the one after, or of zeros; below may
    be negative. up, down: how many they read of this one. travel: whether any rank reads another's.
    """

    above: int
    below: int
    up: int
    down: int
    travel: bool


@cached
def rims(spec: Spec, d: int, stencil: Stencil, reach: Reach) -> Rims | None:
    """The rims of this rank; None, on all ranks, where a stencil is not served.

    Served is what the kernel makes of every shard with as many rows of zeros on both sides as are
    read above: outputs of all ranks, that read rows of direct neighbours only.
    """
    dim, me, stride = spec.dims[d], spec.index[d], stencil.stride
    windows, outputs = table(reach.windows), np.diff(reach.dim.edges)
    above, below = dim.edges[:-1] - windows[:, 0], windows[:, 1] - dim.edges[1:]
    # the last: above[i + 1] = sizes[i] + above[i] - outputs[i] * stride is at most sizes[i], and
    # below[i - 1] likewise; a rank without outputs has a window that starts before all rows
    served = (above >= 0) & (below <= above) & (above < below + stride)
    served &= above <= outputs * stride
    # of zeros alone, which an empty shard's first outputs may read, kernels make nothing
    if not served.all() or 0 in dim.sizes:
        return None
    last = me + 1 == len(dim.sizes)
    return Rims(
        int(above[me]),
        int(below[me]),
        0 if me == 0 else max(0, int(below[me - 1])),
        0 if last else int(above[me + 1]),
        bool((above[1:] > 0).any() or (below[:-1] > 0).any()),
    )


def halo_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    d: int,
    spec: Spec,
    reach: Reach,
    rims: Rims,
    settings: Settings,
) -> Tensor:
    """The rows of the whole convolution that belong to this rank's shard x, (B, C, *spatial).

    d: the dim whose rows travel; reach: what is read of it.
    """
    if not rims.travel:
        return _conv(x, weight, bias, settings)
    return apply(_HaloConv, x, weight, bias, d, spec, reach, rims, settings)


def _there(d: int, spec: Spec, above: int, below: int) -> tuple[bool, bool]:
    """Whether so many rows have a neighbour above, and one below."""
    me, n = spec.index[d], len(spec.dims[d].sizes)
    return above > 0 and me > 0, below > 0 and me + 1 < n


def _swap(
    ends: Sequence[Tensor | None],
    x: Tensor,
    way: Route,
    gives: tuple[bool, bool],
    gets: tuple[bool, bool],
) -> Callable[[], list[Tensor | None]]:
    """Send one strip to each neighbour; calling what it returns gives [from above, from below]."""
    arrive = start(way, x, [e for e, t in zip(ends, gives, strict=True) if t and e is not None])

    def strips() -> list[Tensor | None]:
        came = iter(arrive())
        return [next(came) if t else None for t in gets]

    return strips


def _ends(x: Tensor, d: int, above: int, below: int) -> tuple[Tensor, Tensor]:
    return x.narrow(d, 0, max(0, above)), x.narrow(d, x.shape[d] - max(0, below), max(0, below))


def _padded(strip: Tensor, d: int, above: bool, rows: int) -> Tensor:
    """A strip beside the zeros that stand for the shard: so many rows."""
    pads = [0] * (2 * (strip.ndim - d))
    pads[-1 if above else -2] = rows - strip.shape[d]
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
        own: Rims,
        settings: Settings,
    ) -> Tensor:
        """The shard between zeros while the strips travel; their part is added to the rim."""
        _, way, _ = route(spec, d, reach)
        gives = _there(d, spec, own.up, own.down)
        gets = _there(d, spec, own.above, own.below)
        arrive = _swap(_ends(x, d, own.up, own.down), x, way, gives, gets)
        y = _conv(x, weight, bias, settings)
        strips = arrive()
        inner, outputs = _strip_settings(settings, d), _outputs(own, settings, d)
        for i, (strip, rim) in enumerate(zip(strips, _ends(y, d, *outputs), strict=True)):
            if strip is not None:
                rows = _rows(outputs[i], weight, settings, d)
                rim.add_(_conv(_padded(strip, d, i == 0, rows), weight, None, inner))
        ctx.save_for_backward(x, weight, bias, *strips)
        ctx.plan, ctx.settings = (d, spec, reach, way, own, gives, gets), settings
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        """The strips' gradients travel while those of input and weight are computed."""
        x, weight, bias, *strips = ctx.saved_tensors
        (d, spec, reach, way, own, gives, gets), settings = ctx.plan, ctx.settings
        needs, inner = ctx.needs_input_grad[:3], _strip_settings(settings, d)
        if torch.is_grad_enabled():
            # other names: one of them may have been computed from another
            x, weight = x.view_as(x), weight.view_as(weight)
            bias = None if bias is None else bias.view_as(bias)
            wanted = [t for t, need in zip((x, weight, bias), needs, strict=True) if need]
            # from one haloed copy: differentiable any number of times
            y = _conv(fetch(x, d, spec, reach), weight, bias, inner)
            found = iter(torch.autograd.grad(y, wanted, g, create_graph=True))
            return *(next(found) if need else None for need in needs), *[None] * 5
        outputs = _outputs(own, settings, d)
        rims = _ends(g, d, *outputs)

        def of_strip(i: int, of: int) -> Tensor | None:
            """What a strip finds: its own gradient, or that of the weight."""
            strip = strips[i]
            if strip is None or not needs[of]:
                return None
            whole = _padded(strip, d, i == 0, _rows(outputs[i], weight, settings, d))
            asked = of == 0, of == 1, False
            return _gradients(rims[i], whole, weight, None, inner, asked)[of]

        if needs[0]:
            outward = [of_strip(i, 0) for i in (0, 1)]
            for i, gx in enumerate(outward):
                outward[i] = None if gx is None else _ends(gx, d, own.above, own.below)[i]
            arrive = _swap(outward, x, way.back(), gets, gives)
        gx, gw, gb = _gradients(g, x, weight, bias, settings, needs)
        if needs[0]:
            for back, rim in zip(arrive(), _ends(gx, d, own.up, own.down), strict=True):
                if back is not None:
                    rim.add_(back)
        for i in (0, 1):
            # one at a time
            more = of_strip(i, 1)
            gw = gw if more is None else gw.add_(more)
            del more
        return gx, gw, gb, *[None] * 5


def _outputs(own: Rims, settings: Settings, d: int) -> tuple[int, int]:
    """How many outputs read rows above the shard, and below it."""
    stride = settings.stride[d - 2]
    return -(-own.above // stride), -(-own.below // stride)


def _rows(outputs: int, weight: Tensor, settings: Settings, d: int) -> int:
    """What so many outputs read along dim d."""
    span = settings.dilation[d - 2] * (weight.shape[d] - 1)
    return (outputs - 1) * settings.stride[d - 2] + span + 1


def _gradients(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings, needs: Any
) -> tuple[Any, Any, Any]:
    stride, padding, dilation, groups = settings
    sizes = None if bias is None else list(bias.shape)
    zeros = [0] * len(stride)
    return torch.ops.aten.convolution_backward(
        g, x, weight, sizes, stride, padding, dilation, False, zeros, groups, list(needs)
    )
