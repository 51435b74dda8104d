"""Convolutions and transposed convolutions: fetch the input rows that my output rows need.

Sharded spatial dims: one window (halo) exchange each, then torch's own op with no padding in these
dims. The output is cut where the input is, so a rank's share of the work stays its share.
Sharded batch: local. Sharded channels: the input is swapped, so that rows or samples are cut, here
and in the result; where the weight is large beside it each rank convolves its channels and the sums
are scattered over the output channels; groups that lie on one rank each stay local; else channels
are gathered.
Weight and bias are whole on each rank, and their gradients are summed over the shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import comm
from ...cache import cached
from ...registry import rule
from ...spec import Dim, Spec, whole_dims
from ...tensor import ShardTensor, wrap
from ...tensor.redistribute import beside, fit, to_dims
from ..empty import cut as first_rows
from ..empty import some
from ..operands import lifted
from ..overlap import pays
from ..sliding import Plan, Reads, fetched, plan, slide, whole
from ..windows import Ints, Reach, Stencil, checked, each, spread, trim
from .channels import Channels, by_rows, channels_of, columns
from .halo import Halo, Settings, cropped, halo_conv, laid
from .halo_transposed import laid_transposed

FORWARD = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
# types of settings by which a plan is found as they are
_KINDS = frozenset({int, tuple, str})
TRANSPOSED = {1: torch.conv_transpose1d, 2: torch.conv_transpose2d, 3: torch.conv_transpose3d}


class Local(NamedTuple):
    """The local program of one rank along the spatial dims.

    plan: what it reads. dims: the spatial dims of the output.
    padding, output_padding: what the local op gets.
    crops: (dim, start, length) of the rows to keep of what the op makes.
    halo: of `halo_conv`, where it serves a sharded dim; rest: what is read in the others.
    """

    plan: Plan
    dims: tuple[Dim, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...] = ()
    crops: tuple[tuple[int, int, int], ...] = ()
    halo: Halo | None = None
    rest: Reads = ()


class Program(NamedTuple):
    """A convolution of a tensor that lies so, by a weight that lies so.

    at: the dim of the channels. spec: in which the input is wanted. weight, bias: the dims in which
    they are, None: whole. varying: the mesh axes along which ranks differ, group: the ranks along
    them, None without any. out: of the result.
    """

    local: Local
    channels: Channels
    at: int
    spec: Spec
    weight: tuple[Dim, ...] | None
    bias: tuple[Dim, ...] | None
    varying: tuple[int, ...]
    out: Spec
    group: str | None


@rule("conv1d", "conv2d", "conv3d")
def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> ShardTensor:
    x = lifted(input, weight, bias)
    known = weight._spec if isinstance(weight, ShardTensor) else weight.shape
    settings: Any = stride, padding, dilation
    if not _KINDS.issuperset(map(type, settings)):
        settings = [(v,) if isinstance(v, int) else tuple(v) for v in settings]
    stride_, padding_, dilation_ = settings
    program = _conv(x._spec, known, stride_, padding_, dilation_, groups)
    dims = by_rows(x._spec, known, program.channels) if program.channels.partial else None
    if dims is not None:
        return conv(to_dims(x, dims), weight, bias, stride, padding, dilation, groups)
    return _run(x, weight, bias, program, stride, dilation, False)


@cached
def _conv(
    spec: Spec, weight: Spec | torch.Size, stride: Ints, padding: Ints | str, dilation: Ints,
    groups: int,
) -> Program:  # fmt: skip
    shape = weight.shape if isinstance(weight, Spec) else weight
    n = len(shape) - 2
    _check(spec, n, "conv")
    if isinstance(padding, str) and padding not in ("same", "valid"):
        raise RuntimeError(f"Invalid padding string: '{padding}'")
    across = padding if isinstance(padding, str) else each(padding, n)
    local = _forward(spec, tuple(shape[2:]), each(stride, n), across, each(dilation, n))
    channels = columns(weight, spec, n, groups) or channels_of(spec, n, shape[0], groups, False)
    return _program(spec, shape, local, channels)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> ShardTensor:
    """The rows that reach this rank's rows of the result, the stock op, a crop."""
    x = lifted(input, weight, bias)
    n = weight.ndim - 2
    given: Any = stride, padding, output_padding, dilation
    stride_, padding_, more, dilation_ = [v if type(v) is int else each(v, n) for v in given]
    program = _conv_transpose(x._spec, weight.shape, stride_, padding_, more, dilation_, groups)
    channels = program.channels
    known = weight._spec if isinstance(weight, ShardTensor) else weight.shape
    dims = by_rows(x._spec, known, channels) if channels.partial else None
    if dims is not None:
        return conv_transpose(
            to_dims(x, dims), weight, bias, stride, padding, output_padding, groups, dilation
        )
    return _run(x, weight, bias, program, stride, dilation, True)


@cached
def _conv_transpose(
    spec: Spec, weight: torch.Size, stride: Ints, padding: Ints, output_padding: Ints,
    dilation: Ints, groups: int,
) -> Program:  # fmt: skip
    n = len(weight) - 2
    _check(spec, n, "conv_transpose")
    given = [each(v, n) for v in (stride, padding, output_padding, dilation)]
    local = _transposed(spec, tuple(weight[2:]), *given)
    channels = channels_of(spec, n, weight[1] * groups, groups, True)
    return _program(spec, weight, local, channels)


@rule("convolution", "_convolution")
def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    *backend_flags: bool,
) -> ShardTensor:
    if transposed:
        return conv_transpose(
            input, weight, bias, stride, padding, output_padding, groups, dilation
        )
    return conv(input, weight, bias, stride, padding, dilation, groups)


def _check(spec: Spec, n: int, name: str) -> None:
    if len(spec.dims) - n not in (1, 2):
        raise RuntimeError(
            f"Expected {n + 1}D (unbatched) or {n + 2}D (batched) input to {name}{n}d, but got "
            f"input of size: {list(spec.shape)}"
        )


# plans -------------------------------------------------------------------------------------------


@cached
def _forward(
    spec: Spec,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
) -> Local:
    """What a convolution fetches in each dim, and what the stock op gets."""
    lead = len(spec.dims) - len(kernel)
    if padding == "same" and max(stride) > 1:
        raise RuntimeError("padding='same' is not supported for strided convolutions")
    stencils = []
    for i, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        span, size = d * (k - 1), spec.dims[lead + i].size
        before = span // 2 if padding == "same" else 0 if isinstance(padding, str) else padding[i]
        behind = span - before if padding == "same" else before
        stencils.append((lead + i, checked(Stencil(k, s, before, d, behind))))
        if size + before + behind <= span:
            raise RuntimeError(
                f"conv{len(kernel)}d: Kernel size {span + 1} can't be greater than the padded "
                f"input: dim {lead + i} has size {size}, padding {before} and {behind}"
            )
    lies = plan(spec, tuple(stencils))
    halo, rest = None, lies.reaches
    if lies.reaches and lead == 2 and not lies.uneven:
        halo, rest = laid(spec, lies.reaches, kernel, Settings(stride, lies.left, dilation, 1))
    return Local(lies, tuple(dim for _, dim in lies.dims), lies.left, halo=halo, rest=rest)


@cached
def _transposed(
    spec: Spec,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Local:
    """What a transposed convolution fetches in each dim, what the op gets, the crop."""
    lead = len(spec.dims) - len(kernel)
    reads: list[tuple[int, Stencil | None, Reach]] = []
    pads, more, crops, dims = [], [], [], []
    every = zip(kernel, stride, padding, output_padding, dilation, strict=True)
    for i, (k, s, p, o, d) in enumerate(every, lead):
        stencil = checked(Stencil(k, s, p, d))
        dim, span = spec.dims[i], stencil.extent - 1
        out = (dim.size - 1) * s - 2 * p + span + o + 1
        if out <= 0 or o >= max(s, d):
            raise RuntimeError(
                f"conv_transpose{len(kernel)}d: output size {out}, output padding {o} in dim {i}; "
                "the former must be positive, the latter smaller than stride or dilation"
            )
        if not dim.is_cut:
            dims.append(whole(dim, out))
            pads.append(p)
            more.append(o)
            continue
        reach, firsts = spread(dim, stencil, out, spec.alone)
        start, stop = reach.windows[spec.index[i]]
        first, length = firsts[spec.index[i]], reach.dim.sizes[spec.index[i]]
        surplus = (stop - start - 1) * s + span + 1 - length
        # the op's own padding takes `first` rows off both ends, its output_padding gives some back:
        # less than a stride, as of the last input row's span + 1 rows all but so many are wanted
        if first <= span and surplus <= 2 * first:
            pads.append(first)
            more.append(2 * first - surplus)
        else:
            behind = surplus - first
            even = min(first, max(behind, 0))
            pads.append(even)
            more.append(max(0, -behind))
            crops.append((i, first - even, length))
        reads.append((i, stencil, reach))
        dims.append(reach.dim)
    reaches: Reads = tuple([(d, None, reach) for d, _, reach in reads])
    lies = Plan(tuple(enumerate(dims, lead)), reaches, tuple(pads))
    halo: Halo | None = None
    rest: Reads = reaches
    if reads and lead == 2:
        joined = Settings(stride, lies.left, dilation, 1, tuple(more), tuple(crops))
        halo, rest = laid_transposed(spec, tuple(reads), joined)
    return Local(lies, tuple(dims), lies.left, tuple(more), tuple(crops), halo, rest)


def _program(spec: Spec, weight: torch.Size, local: Local, channels: Channels) -> Program:
    n = len(weight) - 2
    if local.halo is not None:
        # kernels take no weight without output channels
        some_empty = 0 in channels.output.sizes
        halo = None if some_empty else local.halo.grouped(channels.groups)
        local = local._replace(halo=halo)
    at = len(spec.dims) - n - 1
    moved = spec
    if channels.input != spec.dims[at]:
        moved = spec.replace({at: channels.input}).cotangent
    cut = bias = None
    if channels.output.axes:
        cut, bias = (*channels.weight, *whole_dims(weight[2:])), (channels.output,)
    varying = tuple(sorted({*moved.varying, *channels.output.axes}))
    out = moved.with_dims([*moved.dims[:at], channels.output, *local.dims])
    group = comm.group(spec.mesh, varying) if varying else None
    return Program(local, channels, at, moved, cut, bias, varying, out, group)


# the local program -------------------------------------------------------------------------------


def _run(
    x: ShardTensor,
    weight: Tensor,
    bias: Tensor | None,
    program: Program,
    stride: Ints,
    dilation: Ints,
    transposed: bool,
) -> ShardTensor:
    """The convolution on this rank's rows, while its halo travels where that pays."""
    here, channels, at, spec, cut, bias_cut, varying, out, group = program
    if spec is not x._spec:
        x = to_dims(x, spec.dims)
    whole: Any = beside(spec, group, weight, bias) if cut is None else None
    if whole is not None:
        local, (w, b) = x._local, whole
    else:
        local, w, b = fit(spec.mesh, varying, (x, spec.dims), (weight, cut), (bias, bias_cut))
    inner = None if channels.partial else b
    y = _convolved(local, spec, w, inner, here, channels, stride, dilation, transposed)
    if channels.partial:
        dim = channels.output
        y = comm.reduce_scatter(y, at, dim.sizes, comm.group(spec.mesh, dim.axes))
        y = y if b is None else y + b.to(y.dtype).view(-1, *[1] * (w.ndim - 2))
    # of no samples of no rows one row was taken
    return wrap(first_rows(y, out.local_shape) if 0 in spec.shape else y, out)


def _convolved(
    local: Tensor,
    spec: Spec,
    w: Tensor,
    b: Tensor | None,
    program: Local,
    channels: Channels,
    stride: Ints,
    dilation: Ints,
    transposed: bool,
) -> Tensor:
    """torch's own op on this rank's windows of its local tensor."""
    n, groups = w.ndim - 2, channels.groups

    def op(rows: Tensor) -> Tensor:
        more: tuple[Any, ...]
        if transposed:
            more = (stride, program.padding, program.output_padding, groups, dilation)
        else:
            more = (stride, program.padding, dilation, groups)
        run = (TRANSPOSED if transposed else FORWARD)[n]
        if rows.numel() and w.numel():
            y = run(rows, w, b, *more)
        else:
            y = run(some(rows), some(w), b if b is None else some(b), *more)
        # neither samples nor output channels where this rank has none
        y = y if rows.ndim == n + 1 or rows.shape[0] else y.narrow(0, 0, 0)
        y = y if w.shape[int(transposed)] else y.narrow(-n - 1, 0, 0)
        return cropped(y, program.crops) if program.crops else y

    lies = program.plan
    if not lies.reaches and not lies.uneven:
        return op(local)
    local = _autocast(local)
    if program.halo is None or channels.partial or not pays(spec):
        return slide(local, spec, lies, op)
    rows = fetched(local, spec, program.rest)
    y = halo_conv(rows, _autocast(w), b if b is None else _autocast(b), program.halo)
    for other, _, needed in program.rest:
        y = trim(y, other, spec, needed)
    return y


def _autocast(x: Tensor) -> Tensor:
    """x as autocast would cast it for the op: before rows are sent, not after."""
    kind = x.device.type
    if x.dtype is torch.float32 and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x
