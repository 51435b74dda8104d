"""Padding and cropping: the new rows go to the first and the last shard, so nothing else moves.

The rows of a shard stay where they are, but where a constant would give an end more than twice its
share of the result, which is cut evenly then. So other constant padding sends nothing; reflect and
replicate send rows only where the first or last shard is narrower than its padding reaches;
circular exchanges the two ends. What is left is torch's own padding of the local tensor, one copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ... import comm
from ...cache import cached
from ...cuts import Kept
from ...errors import UnsupportedOpError
from ...registry import rule
from ...spec import Dim, Spec
from ...tensor import ShardTensor, layout, wrap
from ...tensor.redistribute import reduced
from ..empty import stock
from ..views.slices import sliced


class Plan(NamedTuple):
    """One rank's part of a padding.

    out: the spec of the result. windows: for dims where shards need other rows than their own, the
    rows of every rank. amounts: what F.pad adds to the local tensor. keep: (dim, start, length) of
    the rows to keep of that.
    """

    out: Spec
    windows: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]
    amounts: tuple[int, ...]
    keep: tuple[tuple[int, int, int], ...]


# how many dims a tensor has whose edges are repeated or reflected, by the numbers given
_BATCHED = {2: (2, 3), 4: (3, 4), 6: (4, 5)}


@rule(F.pad, "pad")
def pad(
    input: ShardTensor,
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
) -> ShardTensor:
    """F.pad in every mode; a negative number of rows crops."""
    if isinstance(value, complex):
        raise TypeError("pad(): argument 'value' (position 4) must be float, not complex")
    if mode != "constant" and input.ndim not in _BATCHED.get(len(pad), ()):
        raise NotImplementedError(
            f"pad: {mode} padding of the last {len(pad) // 2} dims of {input.ndim}: only of the "
            "last 1 to 3, with one or two dims before them"
        )
    return padded(input, pad, mode, value)


def padded(
    input: ShardTensor, amounts: Sequence[int], mode: str, value: float | None = None
) -> ShardTensor:
    """Padding in any dims: repeated rows come from the rank that has them."""
    x = reduced(input)
    pad = tuple(map(index, amounts))
    if value and mode != "constant":
        raise RuntimeError(f'Padding mode "{mode}" doesn\'t take in value argument')
    if value and any(pad):
        # a value that the dtype cannot hold is an error on ranks that pad nothing, too
        torch.constant_pad_nd(x._local.new_zeros(1), (0, 1), value)
    if len(pad) % 2 or len(pad) > 2 * x.ndim:
        raise RuntimeError(f"pad: {pad} for a tensor of {x.ndim} dims: two numbers for each dim")
    if mode in ("reflect", "replicate") and 0 in x.shape[x.ndim > len(pad) // 2 + 1 :]:
        raise RuntimeError(f"pad: {mode} padding of {list(x.shape)}, which has nothing to repeat")
    if mode == "circular" and min(pad, default=0) < 0:
        x, pad = _cropped(x, pad)
    fill = value or 0.0
    # a window fills with what a float holds
    held = not isinstance(fill, complex) and float(fill) == fill
    plan = _plan(x._spec, pad, mode, mode == "constant" and held)
    local = x._local
    for d, windows in plan.windows:
        dim = x._spec.dims[d]
        group = comm.along(x._spec, d)
        if mode == "circular":
            local = comm.window(local, d, dim.sizes, windows, group, wrap=True)
        else:
            filled = float(fill) if held else 0.0
            local = comm.window(local, d, dim.sizes, windows, group, fill=filled)
    if mode == "constant":
        # F.pad itself takes no complex value
        local = torch.constant_pad_nd(local, plan.amounts, value or 0.0)
        if max(pad, default=0) > 0:
            # a rank that pads nothing has its rows as they lay
            local = local.contiguous(memory_format=layout.image_format(x))
    elif mode != "circular" or local is x._local or any(plan.amounts):
        shape = list(local.shape)
        for d, (low, high) in _ends(plan.amounts, x.ndim):
            shape[d] += low + high
        local = stock(lambda z: F.pad(z, plan.amounts, mode), shape, local)
    for d, start, length in plan.keep:
        local = local.narrow(d, start, length).contiguous()
    out = wrap(local, plan.out)
    # the other kernels of CUDA give rows first
    keeps = mode == "constant" or (mode != "circular" and local.device.type == "cpu")
    return layout.like_image(out, x) if keeps else out


@rule("constant_pad_nd")
def constant_pad(input: ShardTensor, pad: Sequence[int], value: float = 0.0) -> ShardTensor:
    return padded(input, pad, "constant", value)


@rule("reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
def reflection_pad(input: ShardTensor, padding: Sequence[int]) -> ShardTensor:
    return padded(input, padding, "reflect")


@rule("replication_pad1d", "replication_pad2d", "replication_pad3d")
def replication_pad(input: ShardTensor, padding: Sequence[int]) -> ShardTensor:
    return padded(input, padding, "replicate")


def _cropped(x: ShardTensor, pad: tuple[int, ...]) -> tuple[ShardTensor, tuple[int, ...]]:
    """The negative part of pad done: torch repeats what cropping leaves."""
    for d, (low, high) in _ends(pad, x.ndim):
        if min(low, high) < 0:
            if x.shape[d] + low + high < 0:
                raise RuntimeError(f"pad: {low, high} rows for a dim of size {x.shape[d]}: too few")
            x = sliced(x, d, max(0, -low), x.shape[d] - max(0, -high))
    rest = tuple(max(0, n) for n in pad)
    for d, (low, high) in _ends(pad, x.ndim):
        n, most = x.shape[d], max(0, low, high)
        if most > n and (not n or min(low, high) < 0):
            raise UnsupportedOpError(
                f"pad: {pad} in mode circular leave too few rows to repeat, and torch fills the "
                "rest with whatever is in memory"
            )
    return x, rest


def _ends(pad: Sequence[int], ndim: int) -> list[tuple[int, tuple[int, int]]]:
    """(dim, (rows before, rows behind)), from the last dim on."""
    return [(ndim - 1 - i, (pad[2 * i], pad[2 * i + 1])) for i in range(len(pad) // 2)]


@cached
def _plan(spec: Spec, pad: tuple[int, ...], mode: str, moves: bool) -> Plan:
    """Which rows each cut dim fetches, what the stock op pads, and what is cut off again.

    moves: whether rows of a constant may come in place of those that a rank gives away.
    """
    dims = list(spec.dims)
    fetched: list[tuple[int, tuple[tuple[int, int], ...]]] = []
    amounts: list[int] = []
    keep: list[tuple[int, int, int]] = []
    for d, (low, high) in _ends(pad, len(dims)):
        dim = dims[d]
        size = dim.size + low + high
        _check(dim.size, low, high, mode, alone=len(pad) == 2)
        if not dim.is_cut or not (low or high):
            amounts += (low, high)
            dims[d] = dim.cut_at([0, size]) if low or high else dim
            continue
        inner = [min(max(o + low, 0), size) for o in dim.offsets[1:-1]]
        if spec.alone:
            # the shard that lies at a border has what comes there, not the empty one before it
            inner = [i if 0 < o < dim.size else (o > 0) * size
                     for i, o in zip(inner, dim.offsets[1:-1], strict=True)]  # fmt: skip
        dims[d] = dim.cut_at([0, *inner, size])
        even = Dim.chunked(size, dim.axes, spec.mesh)
        if moves and not spec.alone and dims[d].is_crowded and not dim.is_crowded:
            dims[d] = even
            fetched.append((d, tuple((a - low, b - low) for a, b in even.spans)))
            amounts += (0, 0)
            continue
        rows = [(a - low, b - low) for a, b in dims[d].spans]
        me = spec.index[d]
        a, b = rows[me]
        if mode == "circular":
            fetched.append((d, tuple(rows)))
            amounts += (0, 0)
            continue
        if mode == "constant":
            start, stop = dim.spans[me]
            amounts += (start - a, b - stop) if a < b else (start - stop, 0)
            continue
        windows = Kept(_sources(a, b, dim.size, mode) for a, b in rows)
        fetched.append((d, windows))
        before, behind = (max(0, -a), max(0, b - dim.size)) if a < b else (0, 0)
        amounts += (before, behind)
        start = windows[me][0] - before
        if a < b and (start, windows[me][1] + behind) != (a, b):
            keep.append((d, a - start, b - a))
    if mode in ("reflect", "replicate") and not any(dims[d].size for d, _ in _ends(pad, len(dims))):
        raise RuntimeError(f"pad: {pad} rows in mode {mode} leave nothing of {spec}")
    return Plan(spec.with_dims(dims), tuple(fetched), tuple(amounts), tuple(keep))


def _check(n: int, low: int, high: int, mode: str, alone: bool) -> None:
    """Raise where torch does; alone: whether no other dim is padded, of which rows are left."""
    most = {"reflect": n - 1, "circular": n}.get(mode)
    least = int(alone and mode in ("reflect", "replicate"))
    if most is not None and max(low, high) > most:
        raise RuntimeError(f"pad: {low, high} rows in mode {mode} for a dim of size {n}: too many")
    if n + low + high < least or (mode == "constant" and min(low, high) < -n):
        raise RuntimeError(f"pad: {low, high} rows for a dim of size {n} leave too few")


def _sources(a: int, b: int, n: int, mode: str) -> tuple[int, int]:
    """The rows [start, stop) of n from which local padding makes rows [a, b), some outside."""
    if a >= b:
        return 0, 0
    start, stop = min(max(a, 0), n), max(min(b, n), 0)
    if a < 0:
        start, stop = 0, max(stop, 1 - a if mode == "reflect" else 1)
    if b > n:
        start, stop = min(start, 2 * n - 1 - b if mode == "reflect" else n - 1), n
    return start, stop
