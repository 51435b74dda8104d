"""Differentiable, traceable collectives: what rules call.

Each function takes local tensors and the name of a group (`group(mesh, axes)`); sizes are those of
all shards of the dim, so that no call has to ask another rank. The table of adjoints is in `ops`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import _torch
from ..cuts import cut
from ..errors import UnsupportedOpError
from . import deferred, groups, observers, ops, sums, together, wire
from .addends import addend_op, alike_op
from .define import run
from .exchanges import Exchange, Kept, exchange, whole
from .groups import along, check_values, group, knows_values, rank, size, spreads
from .rows import exchange_rows, put_op, requests, spread, take_op

__all__ = [
    "addend",
    "alike",
    "along",
    "asked",
    "check_values",
    "counts",
    "faults",
    "gather",
    "group",
    "knows_values",
    "planned",
    "put",
    "rank",
    "reduce",
    "reduce_scatter",
    "ring",
    "size",
    "split",
    "spread",
    "spreads",
    "swap",
    "take",
    "vary",
    "window",
    "window_add",
    "windowed",
]


def vary(xs: Sequence[Tensor], group: str, mesh: DeviceMesh | None = None) -> list[Tensor]:
    """Replicated tensors for use beside shards: the same values; gradients are summed over ranks.

    xs: of any shapes. Forward sends nothing; the gradients of one call travel in one all-reduce per
    dtype. mesh: on which the shards lie.
    Raises ValueError for a parameter whose gradient is summed over ranks outside of it.
    """
    found = list(xs)
    learning = torch.is_grad_enabled()
    under = _torch.functorch_level() is not None or _torch.dual_level() >= 0
    by_dtype: dict[torch.dtype, list[int]] = {}
    waiting: list[int] = []
    slots: list[deferred.Slot] = []
    for i, x in enumerate(found):
        if not (x.requires_grad or (under and _torch.differentiated(x))):
            continue
        slot = getattr(x, deferred.SLOT, None)
        if slot is not None:
            alike = slot.group == group
            if mesh is not None and not alike:
                deferred.check_mesh(slot, group, mesh)
            free = under and slot.declines
            traced = _torch.is_tracing() and type(slot) is not deferred.Twin
            if alike and learning and not (free or traced):
                waiting.append(i)
                slots.append(slot)
                continue
        by_dtype.setdefault(x.dtype, []).append(i)
    if waiting:
        if len(waiting) == 1:
            values: Sequence[Tensor | None] = (slots[0].use(found[waiting[0]]),)
        else:
            given = found if len(waiting) == len(found) else [found[i] for i in waiting]
            values = deferred.use_all(slots, given)
        for i, value in zip(waiting, values, strict=True):
            if value is not None:
                found[i] = value
            else:
                by_dtype.setdefault(found[i].dtype, []).append(i)
    if not (by_dtype and learning) or group == groups.ALONE or observers.alone():
        return found
    for picked in by_dtype.values():
        given = found if len(picked) == len(found) else [found[i] for i in picked]
        varied = together.vary(given, group)
        if varied is None:
            varied = sums.vary(given, group)
        for i, x in zip(picked, varied, strict=True):
            found[i] = x
    return found


def reduce(x: Tensor, group: str, op: str = "sum") -> Tensor:
    """The reduction of every rank's addend by "sum", "max", "min" or "product", in its shape.

    One all-reduce; backward sends nothing. Only the sum has a gradient.
    """
    return x if size(group) == 1 else sums.reduce([x], op, group)[0]


def addend(x: Tensor, group: str) -> Tensor:
    """This rank's addend of a replicated value: all of it on the first rank, zeros on others.

    In the shape of x. Nothing is sent, in backward neither.
    """
    return x if size(group) == 1 else run(addend_op, x, group)


def alike(x: Tensor, group: str) -> Tensor:
    """The cotangent of addends, which every rank has, as one replicated value of x's shape.

    Nothing is sent: its own gradient counts on the first rank only.
    """
    return run(alike_op, x, group) if size(group) > 1 and _torch.differentiated(x) else x


def gather(x: Tensor, dim: int, sizes: Sequence[int], group: str) -> Tensor:
    """The whole tensor, sum(sizes) rows along dim, from its shards of `sizes`.

    One all-gather of uneven shards; backward sends nothing, as each rank takes its own rows.
    """
    return x if len(sizes) == 1 else ops.gather(x, dim, cut(sizes), group)


def split(x: Tensor, dim: int, sizes: Sequence[int], group: str, read: bool = False) -> Tensor:
    """This rank's shard, sizes[rank] rows along dim, of a replicated tensor.

    Forward sends nothing, backward is an all-gather. The gradient of a parameter that is summed
    with others (see `vary`) is gathered with others. read: nothing else is done with the shard,
    which may then be a view of such a parameter, or of what has no gradient; else it has memory of
    its own.
    """
    if len(sizes) == 1:
        return x
    slot = getattr(x, deferred.SLOT, None)
    learns = x.requires_grad and torch.is_grad_enabled()
    if slot is not None and slot.group == group and learns:
        traced = _torch.is_tracing() and type(slot) is not deferred.Twin
        traced |= slot.declines and _torch.transforming()
        own: Tensor | None = None if traced else slot.cut(x, dim, cut(sizes), read)
        if own is not None:
            return own
    followed = learns or _torch.transforming() or _torch.is_tracing()
    if observers.alone() or (read and not followed):
        return deferred.rows(x, dim, cut(sizes), group, read)
    return ops.split(x, dim, cut(sizes), group)


def planned(
    sizes: Sequence[int], windows: Sequence[tuple[int, int]], group: str, *, wrap: bool = False
) -> Exchange:
    """How `window` moves rows, for `windowed`: what is asked often keeps it. Sends nothing."""
    if observers.alone():
        # others never run: they ask for nothing, and nothing comes back from them in backward
        n = len(windows) // len(sizes)
        mine = rank(group) * n
        windows = [w if mine <= i < mine + n else (0, 0) for i, w in enumerate(windows)]
    if type(windows) is not Kept:
        windows = tuple(windows)
    return exchange(cut(sizes), windows, wrap, rank(group))


def window(
    x: Tensor,
    dim: int,
    sizes: Sequence[int],
    windows: Sequence[tuple[int, int]],
    group: str,
    *,
    wrap: bool = False,
    fill: float = 0.0,
) -> Tensor:
    """The global rows [start, stop) of windows[rank], from shards of `sizes` along dim.

    Ranges may overlap, reach over several ranks or be empty. Rows outside the global range are
    periodic images with `wrap`, else `fill`. windows may also list several ranges for each rank,
    as many for all, rank by rank: a rank gets its own, one after the other. Sends only what others
    need; no message where no rank needs another's rows. Windows that are the same at every call
    are found at once as a `spec.Kept`, other sequences once all their numbers were compared.
    """
    return windowed(x, dim, planned(sizes, windows, group, wrap=wrap), group, fill)


def windowed(x: Tensor, dim: int, plan: Exchange, group: str, fill: float = 0.0) -> Tensor:
    """`window` by its plan, of x cut along dim as the plan has it; what that sends."""
    return x if plan.identity else ops.window(x, dim, plan, fill, group)


def window_add(
    x: Tensor,
    dim: int,
    sizes: Sequence[int],
    windows: Sequence[tuple[int, int]],
    group: str,
) -> Tensor:
    """This rank's shard of the sum of all windows, each rank's own being x: window's adjoint.

    x: stop - start rows of windows[rank] along dim; what comes has sizes[rank]. Rows are sent to
    the ranks that hold them; backward is a `window`. What lies outside the global range is dropped.
    """
    plan = planned(sizes, windows, group)
    return x if plan.identity else ops.window_add(x, dim, plan, group)


def reduce_scatter(x: Tensor, dim: int, sizes: Sequence[int], group: str) -> Tensor:
    """This rank's shard, sizes[rank] rows along dim, of the sum of every rank's addend.

    Each rank sends every other one its rows of the addend; backward is an all-gather.
    """
    return window_add(x, dim, sizes, whole(cut(sizes)), group)


def swap(
    x: Tensor,
    old: int,
    new: int,
    old_sizes: Sequence[int],
    new_sizes: Sequence[int],
    group: str,
    among: tuple[int, ...] = (),
) -> Tensor:
    """A tensor sharded along dim `old` as one sharded along dim `new`, of `new_sizes`.

    x: old_sizes[rank] rows along `old`, all along `new`. One all-to-all, backward another.
    among: the ranks of the group, ascending, that share the tensor out; the others have tensors of
    their own, and every rank calls this.
    """
    if len(old_sizes) == 1:
        return x
    return ops.swap(x, old, new, cut(old_sizes), cut(new_sizes), among, group)


def ring(
    x: Tensor, dim: int, sizes: Sequence[int], group: str, *, held: int = 0, shift: int = 1
) -> Tensor:
    """The block that the rank `shift` places before this one holds.

    Rank r holds block r - held of `sizes` along dim before the call, and r - held - shift after.
    One message to one rank; the gradient goes back.
    """
    return x if len(sizes) == 1 else ops.ring(x, dim, cut(sizes), held, shift, group)


def counts(n: int, like: Tensor, group: str) -> tuple[int, ...]:
    """A number of every rank, where sizes depend on values; waits for the device.

    One small all-gather. like: a tensor, of any shape, on the device to communicate from. Raises
    UnsupportedOpError while a graph is traced, which could not hold for other values.
    """
    if size(group) == 1:
        return (n,)
    groups.check_values(group)
    if _torch.is_tracing():
        raise UnsupportedOpError(
            "a result whose size depends on values cannot be compiled: leave it out of st.compile"
        )
    return tuple(c for (c,) in wire.all_gather_numbers([n], like.device, group))


def faults(n: int, like: Tensor, group: str) -> tuple[int, ...]:
    """As `counts` a number of every rank, but one that is 0 unless all are to raise.

    In a rehearsal, where nothing else depends on it, that of others is 0. One small all-gather.
    like: a tensor, of any shape, on the device to communicate from. Raises UnsupportedOpError while
    a graph is traced, where the ranks' values are known.
    """
    if size(group) == 1 or groups.knows_values(group):
        return counts(n, like, group)
    wire.all_gather_numbers([n], like.device, group)
    return (n,)


def take(x: Tensor, index: Tensor, sizes: Sequence[int], group: str) -> Tensor:
    """Rows (n, ...) of a tensor sharded along dim 0, by global index (n,), each rank its own.

    Sends int64 indices to the ranks that hold the rows, and those back; backward is a `put`.
    """
    return x[index] if len(sizes) == 1 else run(take_op, x, index, sizes, group)


def put(rows: Tensor, index: Tensor, sizes: Sequence[int], group: str) -> Tensor:
    """Rows (n, ...) added at global indices (n,) of a tensor of zeros sharded along dim 0.

    Sends indices and rows to the ranks that hold them; backward is a `take`.
    """
    if len(sizes) == 1:
        return rows.new_zeros([sizes[0], *rows.shape[1:]]).index_add(0, index, rows)
    return run(put_op, rows, index, sizes, group)


def asked(
    index: Tensor, sizes: Sequence[int], entries: Sequence[int], group: str
) -> tuple[Tensor, Tensor]:
    """What all ranks' indices name of this rank's rows: (row, number of the index entry).

    index: of shape (entries[rank],): global rows, each rank its own; rows come back local, entries
    are numbered over all ranks in order, so that `take` fetches what belongs to them. Two
    exchanges, of the rows and of the numbers.
    """
    order, per_owner, per_rank, rows = requests(index, sizes, group)
    numbers = order + sum(entries[: rank(group)])
    return rows, exchange_rows(numbers, per_owner, per_rank, group, "take")
