"""How the channels of a convolution are cut: of its input, its weight and its result."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch

from ...cache import cached
from ...spec import Dim, Spec


class Channels(NamedTuple):
    """What happens to the channels.

    input: the dim in which the input is wanted. weight: how weight's first two dims are cut.
    bias: how it is cut. output: the dim of the output. groups: those of this rank.
    partial: whether ranks hold addends of all output channels before these are cut.
    """

    input: Dim
    weight: tuple[Dim, Dim]
    output: Dim
    groups: int
    partial: bool


@cached
def channels_of(spec: Spec, n: int, out: int, groups: int, transposed: bool) -> Channels:
    size, axes, sizes = dim = spec.dims[-n - 1]
    each, out_each = size // groups, out // groups
    if not dim.is_cut or min(sizes) == 0 or (groups > 1 and any(s % each for s in sizes)):
        weight = (Dim(size), Dim(out_each)) if transposed else (Dim(out), Dim(each))
        return Channels(Dim(size), weight, Dim(out), groups, False)
    if groups == 1:
        cut = Dim.chunked(out, axes, spec.mesh)
        weight = (dim, Dim(out)) if transposed else (Dim(out), dim)
        return Channels(dim, weight, cut, 1, True)
    cut = Dim(out, axes, tuple(s // each * out_each for s in sizes))
    weight = (dim, Dim(out_each)) if transposed else (cut, Dim(each))
    return Channels(dim, weight, cut, sizes[spec.index[-n - 1]] // each, False)


def columns(weight: Spec | torch.Size, spec: Spec, n: int, groups: int) -> Channels | None:
    """Output channels sharded as the weight's are, along mesh axes that do not shard the input."""
    out = weight.dims[0] if isinstance(weight, Spec) else Dim(0)
    size = spec.dims[-n - 1].size
    if not out.axes or groups > 1 or not set(out.axes).isdisjoint(spec.varying):
        return None
    return Channels(Dim(size), (out, Dim(size)), out, 1, False)


@cached
def by_rows(spec: Spec, weight: Spec | torch.Size, channels: Channels) -> tuple[Dim, ...] | None:
    """Dims of an input whose channels were cut, and whose samples or rows are instead; or None.

    Of cut channels every rank has addends of the whole result, which are summed. To swap the input
    is less to hold and to send, unless it is small beside the weight: its gradient is summed then.
    """
    if isinstance(weight, Spec):
        if weight.varying or weight.partial:
            return None
        weight = weight.shape
    n = len(weight) - 2
    at = len(spec.dims) - n - 1
    size, axes, _ = spec.dims[at]
    ranks = prod(spec.mesh.size(a) for a in axes)
    # rows enough for a halo to be small beside them
    least = {d: ranks * (4 * k if k > 1 else 1) for d, k in enumerate(weight[2:], at + 1)}
    free = [d for d, dim in enumerate(spec.dims) if d != at and not dim.axes]
    free = [d for d in free if spec.dims[d].size >= least.get(d, ranks)]
    to = max(free, key=lambda d: spec.dims[d].size, default=None)
    if to is None or spec.partial:
        return None
    rows, out = spec.shape.numel() // size, channels.output.size
    if rows * size + weight.numel() * ranks >= rows * out * ranks:
        return None
    dims = list(spec.dims)
    dims[at], dims[to] = Dim(size), Dim.chunked(dims[to].size, axes, spec.mesh)
    return tuple(dims)
