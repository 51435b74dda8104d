"""Convolution with its halo in flight, without a copy of the input.

A convolution is linear: that of the shard between zeros, which needs no neighbour, plus those of
the two halo strips between zeros, which touch the rim rows only. So the strips travel while the
shard is convolved, their part, by those rows of the kernel that meet them, is added to the rim, and
what is kept for backward is the input itself and two strips. Backward likewise: the strips'
gradients travel while those of input and weight are computed. One exchange each way, as with a
window.

Along several dims strips travel in turn, and are added to the rims in turn; those of a later dim
have at their ends what came along the dims before: the corners.

It serves what `rims` says. There it takes less time than `overlapped`, which serves every stencil
but copies the interior for the kernel and adds up its gradient in a buffer: 1 to 17 % less forward
and backward, for kernels of 3 and 7 rows and 2**18 to 2**23 elements on two processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..._torch import Function, kernels
from ...cache import cached
from ...comm.formats import compact
from ...cuts import table
from ...spec import Spec
from ..overlap import Box, among_zeros, route
from ..sliding import Reads
from ..strips import Owed, Side, beside, end, ends, returned, sent
from ..windows import Reach, Stencil, fetch

# bytes of a kernel up to which what strips find for it is kept, so that a kernel finds both
SMALL_KERNEL = 2**20


class Settings(NamedTuple):
    """A convolution, of the shard between zeros, say.

    more, crops: of a transposed one the output padding, None: of the usual one, and (dim, first,
    length) of the rows of its result that count.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    more: tuple[int, ...] | None = None
    crops: Box = ()


class Strip(NamedTuple):
    """A strip beside the shard, and what of the convolution meets it.

    below: behind the shard, not before it. rows: of the strip. outputs: how many of this end read
    it. first, taps: the rows of the kernel that do. read: what these outputs read by them, of the
    strip and of zeros.
    """

    below: bool
    rows: int
    outputs: int
    first: int
    taps: int
    read: int
    inner: Settings


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
    return Rims(*beside(above, below, me))


class Halo(NamedTuple):
    """A convolution with strips, of a shard of a spec, of which `reaches` are read.

    settings: of the shard. sides: one for each dim in which ranks read others' rows, in order.
    joined: of the shard with all that is read beside it.
    """

    spec: Spec
    reaches: tuple[tuple[int, Reach], ...]
    settings: Settings
    sides: tuple[Side, ...]
    joined: Settings

    def grouped(self, groups: int) -> Halo:
        """That of a convolution of channels in groups."""
        settings, joined = (s._replace(groups=groups) for s in (self.settings, self.joined))
        sides = [
            side._replace(strips=tuple(
                [s._replace(inner=s.inner._replace(groups=groups)) for s in side.strips]
            ))
            for side in self.sides
        ]  # fmt: skip
        return self._replace(settings=settings, sides=tuple(sides), joined=joined)


def laid(
    spec: Spec, reads: Reads, kernel: Sequence[int], settings: Settings
) -> tuple[Halo | None, Reads]:
    """(how a convolution by a kernel of such a shape runs on this rank, what is read otherwise).

    None where no dim is served. settings: with the padding of whole dims.
    """
    padding, served, rest = list(settings.padding), [], []
    for d, stencil, reach in reads:
        own = None if stencil is None else rims(spec, d, stencil, reach)
        if own is None:
            rest.append((d, stencil, reach))
        else:
            padding[d - 2] = own.above
            served.append((d, reach, own))
    if not served:
        return None, reads
    settings = settings._replace(padding=tuple(padding))
    reaches, sides = [], []
    for d, reach, own in served:
        if not own.travel:
            continue
        padding[d - 2] = 0
        me, last = spec.index[d], len(spec.dims[d].sizes) - 1
        _, way, _ = route(spec, d, reach)
        # whether there is a neighbour, and what it has is read
        comes = own.above > 0 and me > 0, own.below > 0 and me < last
        inner = settings._replace(padding=tuple(padding))
        strips = [
            _strip(bool(i), rows, d - 2, kernel[d - 2], inner)
            for i, rows in enumerate((own.above, own.below))
            if comes[i]
        ]
        reaches.append((d, reach))
        sides.append(Side(d, way, way.back(), ends(own.up, own.down), own.above,
                          max(0, own.below), tuple(strips)))  # fmt: skip
    joined = settings._replace(padding=tuple(padding))
    return Halo(spec, tuple(reaches), settings, tuple(sides), joined), tuple(rest)


def _strip(below: bool, rows: int, i: int, kernel: int, inner: Settings) -> Strip:
    stride, dilation = inner.stride[i], inner.dilation[i]
    outputs, taps = -(-rows // stride), min(kernel, -(-rows // dilation))
    read = (outputs - 1) * stride + (taps - 1) * dilation + 1
    return Strip(below, rows, outputs, kernel - taps if below else 0, taps, read, inner)


def halo_conv(x: Tensor, weight: Tensor, bias: Tensor | None, halo: Halo) -> Tensor:
    """The rows of the whole convolution that belong to this rank's shard x, (B, C, *spatial)."""
    if not halo.sides:
        return _conv(x, weight, bias, halo.settings)
    return _HaloConv.apply(x, weight, bias, halo)


def _fitted(x: Tensor, d: int, rows: int, below: bool) -> Tensor:
    """So many rows of x, or x and zeros, at that end which the shard is not at."""
    more = rows - x.shape[d]
    if more <= 0:
        return end(x, d, rows, below) if more else x
    pads = [0] * (2 * (x.ndim - d))
    pads[-2 if below else -1] = more
    return F.pad(x, pads)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    stride, padding, dilation, groups, more, crops = settings
    if more is None:
        return _FORWARD[weight.ndim - 3](x, weight, bias, stride, padding, dilation, groups)
    y = _TRANSPOSED[weight.ndim - 3](x, weight, bias, stride, padding, more, groups, dilation)
    return cropped(y, crops)


def cropped(y: Tensor, crops: Box) -> Tensor:
    """A part of y in its memory format, not as a view: what follows may want to view it."""
    part = y
    for d, first, length in crops:
        part = part if length == part.shape[d] else part.narrow(d, first, length)
    return compact(part, y)


_FORWARD = F.conv1d, F.conv2d, F.conv3d
_TRANSPOSED = F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d


class _HaloConv(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, halo: Halo) -> Tensor:
        """The shard between zeros while the last strips travel; their part is added to the rim."""
        ctx.materialize_grads = False
        sides = halo.sides
        y, came = sent(x, sides, lambda: _conv(x, weight, bias, halo.settings))
        for side, strips in zip(sides, came, strict=True):
            for s, strip in zip(side.strips, strips, strict=True):
                taps = weight.narrow(side.d, s.first, s.taps)
                part = _conv(_fitted(strip, side.d, s.read, s.below), taps, None, s.inner)
                end(y, side.d, s.outputs, s.below).add_(part)
        ctx.save_for_backward(x, weight, bias, *chain.from_iterable(came))
        ctx.halo = halo
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
        """The strips' gradients travel while those of input and weight are computed."""
        if g is None:
            return (None,) * 4
        x, weight, bias, *strips = ctx.saved_tensors
        halo: Halo = ctx.halo
        sides, needs = halo.sides, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            # other names: one of them may have been computed from another
            x, weight = x.view_as(x), weight.view_as(weight)
            bias = None if bias is None else bias.view_as(bias)
            wanted = [t for t, need in zip((x, weight, bias), needs, strict=True) if need]
            # from one haloed copy: differentiable any number of times
            rows = x
            for d, reach in halo.reaches:
                rows = fetch(rows, d, halo.spec, reach)
            y = _conv(rows, weight, bias, halo.joined)
            found = iter(torch.autograd.grad(y, wanted, g, create_graph=True))
            return *(next(found) if need else None for need in needs), None

        def of_strip(side: Side, s: Strip, strip: Tensor, *asked: bool) -> tuple[Any, Any]:
            """What a strip finds: its own gradient, and that of the kernel's rows that meet it."""
            d = side.d
            read, rim = _fitted(strip, d, s.read, s.below), end(g, d, s.outputs, s.below)
            taps = weight.narrow(d, s.first, s.taps)
            gs, gt, _ = _gradients(rim, read, taps, None, s.inner, (*asked, False))
            return None if gs is None else _fitted(gs, d, s.rows, s.below), gt

        came = iter(strips)
        # those of a large kernel are found one at a time, not kept while that of the shard is found
        both = needs[0] and needs[1] and weight.nbytes <= SMALL_KERNEL
        outward, of_taps = list[list[Tensor]](), list[Tensor | None]()
        for side in sides if needs[0] else ():
            out = []
            for s, strip in zip(side.strips, came, strict=False):
                gs, gt = of_strip(side, s, strip, True, both)
                out.append(gs)
                of_taps.append(gt)
            outward.append(out)
        owed: list[Owed] = []

        def of_shard() -> tuple[Any, Any, Any]:
            return _gradients(g, x, weight, bias, halo.settings, needs)

        if needs[0]:
            (gx, gw, gb), owed = returned(x, sides, outward, of_shard)
        else:
            gx, gw, gb = of_shard()
        for d, rows, below, back in owed:
            end(gx, d, rows, below).add_(back)
        came, kept = iter(strips), iter(of_taps)
        for side in sides if needs[1] else ():
            for s, strip in zip(side.strips, came, strict=False):
                taps = gw.narrow(side.d, s.first, s.taps)
                taps.add_(next(kept) if both else of_strip(side, s, strip, False, True)[1])
        return gx, gw, gb, None


def _gradients(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings, needs: Any
) -> tuple[Any, Any, Any]:
    stride, padding, dilation, groups, more, crops = settings
    sizes = None if bias is None else list(bias.shape)
    if crops and more is not None:
        full = list(g.shape)
        for d, _, _ in crops:
            i = d - 2
            span = dilation[i] * (weight.shape[d] - 1)
            full[d] = (x.shape[d] - 1) * stride[i] - 2 * padding[i] + span + more[i] + 1
        g = among_zeros(g, crops, full)
    zeros = [0] * len(stride)
    return kernels.convolution_backward(
        g, x, weight, sizes, stride, padding, dilation, more is not None, more or zeros, groups,
        list(needs),
    )  # fmt: skip
