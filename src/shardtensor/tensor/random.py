"""Random numbers: independent from shard to shard, equal on all replicas of a shard.

Every draw takes one seed from torch's default CPU generator, whatever the shard sizes, so ranks
that seed alike stay in step, and a checkpoint's recomputation, which restores that generator, draws
the same numbers. The seed and the shard's number make the generator of the local draw.

Under `match_single_device` a draw gives each element the number that it has on one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import _torch, comm
from .._torch import probe
from ..cache import capturing
from ..comm import wire
from ..errors import RankError, UnsupportedOpError
from ..settings import current, setting
from ..spec import Spec
from . import layout
from .tape import tape

# fill(out, generator) fills a tensor in place
Fill = Callable[[Tensor, torch.Generator | None], object]
# an odd constant spreads shard numbers over the seed's bits (Knuth's multiplicative hash)
_SPREAD = 0x9E3779B97F4A7C15
_PIECE = 2**18


@contextmanager
def match_single_device() -> Iterator[None]:
    """Draw what one device draws: dropout, rand_like, randn_like, normal_, uniform_, bernoulli, ...

    Bit-equal to plain PyTorch after the same torch.manual_seed, for any number of ranks and any
    shards, and the generator is left as one device leaves it. Torch's CPU generator can only be
    read from its start, so each rank draws all numbers, a piece at a time, and keeps its own:
    time as on one device, memory of the shard. Nothing is sent, but for the order of the dims in
    memory where a shard has less than two rows to show it; where every shard has, the strides of
    the shards decide.

    What cannot be drawn in pieces (dropout inside attention, rrelu, multinomial, poisson) runs on
    gathered operands. Raises UnsupportedOpError for all draws on CUDA devices.
    """
    with setting("matching", True), layout.following():
        yield


def matching() -> bool:
    """Whether a block of match_single_device surrounds the call."""
    return bool(current("matching", False))


def generator_for(
    spec: Spec, device: torch.device, generator: torch.Generator | None = None
) -> torch.Generator:
    """The generator of this rank's shard for one draw of a tensor with this spec."""
    if matching():
        raise UnsupportedOpError(
            f"a draw for {spec} that match_single_device cannot repeat: leave the block around it, "
            "or draw on a plain tensor and distribute it"
        )
    if spec.alone and not current("any draw", False):
        raise RankError(f"a draw for {spec} would be the same in all parts, which do not meet")
    if tape() is not None:
        raise UnsupportedOpError(
            f"a draw for {spec} that depends on values cannot be compiled: leave it out of "
            "st.compile"
        )
    if capturing(device):
        raise UnsupportedOpError(
            f"a draw for {spec} (dropout, noise) while a CUDA graph is captured: its seed is a "
            "number of the host, so every replay would draw the same. Draw before, into a tensor "
            "that the graph reads; leave it out of the graph; or take st.compile, whose draws are "
            "made anew before each call"
        )
    source = None if generator is None or generator.device.type != "cpu" else generator
    seed = torch.randint(2**62, (1,), generator=source)
    alike = tuple(a for a in range(spec.mesh.ndim) if a not in spec.varying)
    name = comm.group(spec.mesh, alike)
    if comm.size(name) > 1:
        # replicas may have seeded differently, and must draw the same
        seed = wire.agreed_number(seed, device, name)
    number = 0
    for axis in spec.varying:
        number = number * spec.mesh.size(axis) + spec.coordinate[axis]
    made = torch.Generator(device)
    # a plan's numbers mean nothing
    first = 0 if probe.is_fake(seed) else int(seed)
    made.manual_seed((first + number * _SPREAD) % 2**63)
    return made


def draw(
    spec: Spec,
    dtype: torch.dtype,
    device: torch.device,
    fill: Fill,
    generator: torch.Generator | None = None,
    *,
    normal: bool = False,
    order: Sequence[int] = (),
) -> Tensor:
    """This rank's local tensor of a random one. normal: fill is `normal_`.

    order: the dims as one device has them in memory, outermost first; rows first by default.
    """
    rows = tuple(range(len(spec.dims)))
    order = tuple(order) or rows
    noted = tape()
    if noted is not None:
        dense = layout.dense([spec.local_shape[d] for d in order])
        strides = [dense[order.index(d)] for d in rows]
        return noted.add(
            lambda: draw(spec, dtype, device, fill, generator, normal=normal, order=order),
            spec.local_shape, strides, dtype, device,
        )  # fmt: skip
    if matching():
        if order == rows:
            return _matched(spec, dtype, device, fill, generator, normal)
        turned = spec.with_dims([spec.dims[d] for d in order])
        apart = _one_by_one(fill) if normal else fill
        local = _matched(turned, dtype, device, apart, generator, False)
        return local.permute([order.index(d) for d in rows])
    out = torch.empty(spec.local_shape, dtype=dtype, device=device)
    fill(out, generator_for(spec, device, generator))
    return out


def refill(x: Tensor, spec: Spec, fill: Fill, generator: torch.Generator | None) -> None:
    """Fill this rank's shard in place from its own stream."""
    noted = tape()
    if noted is None:
        fill(x, generator_for(spec, x.device, generator))
        return
    facts = x.shape, x.stride(), x.dtype, x.device

    def draw() -> Tensor:
        out = torch.empty_strided(*facts[:2], dtype=facts[2], device=facts[3])
        fill(out, generator_for(spec, facts[3], generator))
        return out

    x.copy_(noted.add(draw, *facts))


def _one_by_one(fill: Fill) -> Fill:
    """The fill of a tensor that is not contiguous, for which torch draws each number by itself."""

    def run(out: Tensor, generator: torch.Generator | None) -> None:
        apart = torch.empty(*out.shape, 2, dtype=out.dtype)[..., 0]
        fill(apart, generator)
        out.copy_(apart)

    return run


def memory_order(x: Any) -> tuple[int, ...]:
    """The dims of the whole in memory, outermost first, in what empty_like makes of it.

    Sends a few numbers where a shard has less than two rows, whose strides may tell nothing.
    """
    spec, rows = x._spec, tuple(range(x.ndim))
    if len([d for d in spec.dims if d.size > 1]) < 2:
        return rows
    if x._strides is None and spec.thin:
        if tape() is not None:
            raise UnsupportedOpError(
                f"a draw like {spec} that match_single_device repeats, while it is compiled: some "
                "rank has less than two rows, and does not know how the whole lies in memory; "
                "draw like a tensor with more rows, or leave it out of st.compile"
            )
        mine = _told_order(x)
    else:
        mine = _order(spec.shape, layout.stride(x))
    # one row more or less in between changes nothing
    long = [d for d in mine if spec.dims[d].size > 1]
    return rows if long == sorted(long) else tuple(mine)


def _order(shape: Sequence[int], strides: tuple[int, ...]) -> list[int]:
    span = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    if span != prod(shape) or 0 in strides:
        strides = layout.kept(tuple(shape), strides)
    # of equal strides the dim with more rows lies further out
    return sorted(range(len(shape)), key=lambda d: (-strides[d], -shape[d], d))


def _told_order(x: Any) -> Sequence[int]:
    """The order that those see who have two rows of every dim; rows first if nobody has."""
    spec, rows = x._spec, range(x.ndim)
    if any(d.axes and d.size > 1 and max(d.sizes) < 2 for d in spec.dims):
        return rows
    sure = all(n >= min(2, d.size) for n, d in zip(x._local.shape, spec.dims, strict=True))
    mine = _order(x._local.shape, x._local.stride()) if sure else rows
    name = comm.group(spec.mesh, spec.varying)
    told = wire.all_gather_numbers([int(sure), *mine], x.device, name)
    return max(told, key=lambda t: t[0])[1:]


def _matched(
    spec: Spec,
    dtype: torch.dtype,
    device: torch.device,
    fill: Fill,
    generator: torch.Generator | None,
    normal: bool,
) -> Tensor:
    """This rank's part of one device's draw of the whole, made in pieces."""
    if _torch.is_tracing() or device.type != "cpu" or not _in_pieces(fill, dtype):
        raise UnsupportedOpError(
            f"match_single_device: {dtype} numbers of this kind on {device.type}, or while a graph "
            "is traced, cannot be drawn in pieces; leave the block around the draw"
        )
    out = torch.empty(spec.local_shape, dtype=dtype)
    flat, (starts, length) = out.view(-1), _runs(spec)
    ends = starts + length
    for begin, piece in _pieces(spec.shape.numel(), dtype, fill, generator, normal):
        first = int(torch.searchsorted(ends, begin, right=True))
        last = int(torch.searchsorted(starts, begin + len(piece)))
        if first >= last:
            continue
        if first + 1 == last:
            a, b = max(int(starts[first]), begin), min(int(ends[first]), begin + len(piece))
            at = first * length - int(starts[first])
            flat[at + a : at + b] = piece[a - begin : b - begin]
            continue
        # rows of the shard that overlap the piece, and their elements' places in both
        place = (starts[first:last, None] + torch.arange(length)).reshape(-1) - begin
        here = (place >= 0) & (place < len(piece))
        flat[first * length : last * length][here] = piece[place[here]]
    return out


def _pieces(
    n: int, dtype: torch.dtype, fill: Fill, generator: torch.Generator | None, normal: bool
) -> Iterator[tuple[int, Tensor]]:
    """(first element, numbers) of a draw of n elements, in order; a later one overwrites.

    Torch makes 16 normal numbers at a time, if there are as many, from 16 uniform ones. Where a
    rest of less than 16 remains, the last 16 elements are drawn anew; in single and double
    precision the rest's uniform numbers have been drawn by then, and count for nothing.
    """
    whole = n - n % 16 if normal and n >= 16 else n
    for begin in range(0, whole, _PIECE):
        piece = torch.empty(min(_PIECE, whole - begin), dtype=dtype)
        fill(piece, generator)
        yield begin, piece
    if whole < n:
        if dtype in (torch.float32, torch.float64):
            torch.empty(n - whole, dtype=dtype).uniform_(generator=generator)
        piece = torch.empty(16, dtype=dtype)
        fill(piece, generator)
        yield n - 16, piece


def _in_pieces(fill: Fill, dtype: torch.dtype) -> bool:
    """Whether this torch draws the same numbers in two pieces as in one."""
    a, b = torch.Generator(), torch.Generator()
    a.manual_seed(1)
    b.manual_seed(1)
    whole, halves = torch.empty(64, dtype=dtype), torch.empty(2, 32, dtype=dtype)
    fill(whole, a)
    fill(halves[0], b)
    fill(halves[1], b)
    return bool(torch.equal(whole, halves.view(-1)) and torch.equal(a.get_state(), b.get_state()))


def _runs(spec: Spec) -> tuple[Tensor, int]:
    """The shard's elements in the whole tensor, row-major: starts of runs of one length."""
    cut = [d for d, dim in enumerate(spec.dims) if dim.axes]
    inner = cut[-1] if cut else 0
    local, shape = spec.local_shape, spec.shape
    starts = torch.zeros(1, dtype=torch.int64)
    for d in range(inner + 1 if cut else 0):
        stride = prod(shape[d + 1 :])
        offset = spec.offset[d]
        rows = torch.arange(offset, offset + (local[d] if d < inner else 1))
        starts = (starts[:, None] + rows * stride).reshape(-1)
    length = prod(local[inner:]) if cut else shape.numel()
    return (starts, length) if prod(local) else (starts[:0], 1)
