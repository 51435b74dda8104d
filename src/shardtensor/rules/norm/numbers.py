"""A few numbers between kernels, in float64: numpy's on CPUs, where torch's cost three times that.

`Numbers` are an array or, on other devices, a tensor; what is written with operators, `sum`, `mean`
and `reshape` runs on both. They have no gradients. Those of fake tensors, of which a plan is made,
are zeros: as many kernels run as of real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import _torch
from ..._torch import probe
from ...cache import cached
from ...comm import groups, wire
from ...comm.pack import unpacked
from ...cuts import Cut, cut
from .moments import accumulated

Numbers = Any
# for every rank the (start, stop) that it has of each dim
Blocks = tuple[tuple[tuple[int, int], ...], ...]
_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


def _zeros(x: Tensor) -> Any:
    """The memory of a tensor that has none, which nobody else sees."""
    return np.zeros(tuple(x.shape), _DTYPES[x.dtype])


# by types of tensors how numpy reads their memory, and writes to it
READ: dict[type, Callable[[Tensor], Any]] = {
    Tensor: Tensor.numpy, torch.nn.Parameter: Tensor.numpy, probe.FakeTensor: _zeros
}  # fmt: skip


def on_host(x: Tensor) -> bool:
    """Whether numpy can read its memory, or would, if it had some."""
    return x.device.type == "cpu" and type(x) in READ


class _Lent:
    """A tensor whose memory numpy has; `numpy()` would let nobody resize it, as FSDP2 does."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __dlpack__(self, max_version: Any = None, **asked: Any) -> Any:
        # numpy takes what has no version for read-only
        return _torch.lent(self.x) if max_version is None else _torch.lent_to_write(self.x)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def numbers_of(x: Tensor) -> Numbers:
    """The values of a tensor."""
    # as `on_host`
    if type(x) not in READ or x.device.type != "cpu":
        return x.detach().double()
    if type(x) is probe.FakeTensor:
        return np.zeros(tuple(x.shape))
    # the memory of what is negated lazily has the other sign
    lent = _Lent(x.detach().float() if x.dtype.itemsize == 2 else x.resolve_neg())
    return np.from_dlpack(lent).astype(np.float64)


def fresh(*xs: Tensor) -> list[Numbers]:
    """`numbers_of` each of tensors that kernels have just made, which nobody else has."""
    found = []
    for x in xs:
        # as `on_host`
        if type(x) in READ and x.dtype in _DTYPES and x.device.type == "cpu":
            found.append(READ[type(x)](x).astype(np.float64))
        else:
            found.append(numbers_of(x))
    return found


def rounded(values: Numbers, like: Tensor) -> Numbers:
    """What is left of numbers in the dtype in which `like` accumulates."""
    dtype = accumulated(like.dtype)
    if isinstance(values, Tensor):
        return values.to(dtype).double()
    return values.astype(_DTYPES[dtype]).astype(np.float64)


def tensor_of(values: Numbers, dtype: torch.dtype) -> Tensor:
    """A tensor of numbers."""
    if isinstance(values, Tensor):
        return values.to(dtype)
    if dtype not in _DTYPES:
        return tensor_of(values, torch.float64).to(dtype)
    if not probe.dispatch_modes():
        # as in `tensors`
        return torch.from_numpy(values.astype(_DTYPES[dtype]))
    out = torch.empty(values.shape, dtype=dtype)
    READ[type(out)](out)[...] = values
    return out


def move(x: Tensor, values: Numbers, by: float) -> None:
    """Bring x, which has no gradient, a part of the way to values."""
    # as `on_host`
    here = type(x) in READ and x.dtype in _DTYPES and x.device.type == "cpu"
    if isinstance(values, Tensor) or not here:
        x.detach().lerp_(torch.as_tensor(values, dtype=x.dtype, device=x.device), by)
        return
    into: Any = _zeros(x) if type(x) is probe.FakeTensor else np.from_dlpack(_Lent(x))
    if not into.flags.writeable:
        x.detach().lerp_(torch.as_tensor(values, dtype=x.dtype), by)
        return
    into += by * (values - into)


def track(running: Sequence[Tensor | None], stats: Numbers, n: int, momentum: float) -> None:
    """Move running statistics towards the mean and variance of n elements."""
    mean, var = stats
    for r, value in zip(running, (mean, var * (n / (n - 1)) if n > 1 else var), strict=True):
        if isinstance(r, Tensor):
            move(r, value, momentum)


def tensors(like: Tensor, n: int, *values: Numbers) -> list[Tensor]:
    """Vectors of n numbers, some given as one number, in the dtype in which `like` accumulates."""
    dtype = accumulated(like.dtype)
    if like.device.type == "cpu" and type(like) in READ:
        if probe.dispatch_modes():
            out = torch.empty((len(values), n), dtype=dtype)
            rows = READ[type(out)](out)
        else:
            # nobody is to resize them; in place of a call of `numpy`, which takes longer
            rows = np.empty((len(values), n), _DTYPES[dtype])
            out = torch.from_numpy(rows)
        for i, value in enumerate(values):
            rows[i] = value
        return list(out.unbind())
    given = [v.expand(n) if isinstance(v, Tensor) else like.new_full((n,), v) for v in values]
    return [v.to(dtype) for v in given]


def gathered(values: Sequence[Numbers], group: str) -> Numbers:
    """Every rank's vectors, (ranks, len(values), n), in one message."""
    flat, own = _message(values, torch.float64)
    found = wire.of_all(flat, group)
    if isinstance(own, Tensor):
        every: Numbers = torch.cat(list(found)).double()
    else:
        every = np.empty((len(found), len(own)))
        for i, x in enumerate(found):
            every[i] = own if x is flat else READ[type(x)](x)
    return every.reshape(len(found), len(values), len(values[0]))


def summed(like: Tensor, values: Sequence[Numbers], group: str, *, wide: bool = False) -> Numbers:
    """The sums over ranks of vectors, (len(values), n), in one message; wide: in float64."""
    flat, _ = _message(values, torch.float64 if wide else accumulated(like.dtype))
    return _added(wire.addends(flat, group)).reshape(len(values), len(values[0]))


def summed_beside(
    like: Tensor, values: Sequence[Numbers], own: Sequence[Tensor], blocks: Blocks, group: str
) -> tuple[list[Numbers], list[Tensor]]:
    """`summed`, and tensors of which each rank has its block, whole, in the same message."""
    shape = [max(b for _, b in ends) for ends in zip(*blocks, strict=True)]
    dtype = accumulated(like.dtype)
    wholes = [x.new_empty(shape, dtype=dtype) for x in own]
    parts = [numbers_of(x.reshape(-1)) for x in own]
    first, each = sum(len(v) for v in values), [prod(b - a for a, b in of) for of in blocks]
    flat, _ = _message([*values, *parts], dtype)
    lies, most = _cut_of(blocks), max(each)
    if wire.direct(flat, first + len(own) * most, len(blocks)):
        found = wire.all_gather(flat, [[first + len(own) * n] for n in each], group)
        sums = _added([f[:first] for f in found])
        for f, n, block in zip(found, each, blocks, strict=True):
            for i, whole in enumerate(wholes):
                _put(whole, block, f[first + i * n : first + (i + 1) * n])
    elif lies is not None and len(each) * (first + len(own) * most) < 2 * len(own) * prod(shape):
        parts = [_lengthened(p, most) for p in parts]
        flat, _ = _message([*values, *parts], dtype)
        rows = wire.all_gather_rows(flat, [len(flat)] * len(each), len(flat), group)
        sums = _added([rows[:, :first].sum(0)])
        for whole, part in zip(wholes, rows[:, first:].split(most, 1), strict=True):
            unpacked(part, whole, *lies)
    else:
        # between zeros, whose sum is all of it
        mine = slices(blocks[groups.rank(group)])
        for i, whole in enumerate(wholes):
            full = np.zeros(shape) if on_host(whole) else torch.zeros_like(whole)
            full[mine] = parts[i].reshape(own[i].shape)
            parts[i] = full.reshape(-1)
        flat, _ = _message([*values, *parts], dtype)
        (total,) = wire.all_reduce([flat], "sum", group)
        sums, every = _added([total[:first]]), ((0, n) for n in shape)
        block = tuple(every)
        for i, whole in enumerate(wholes):
            n = whole.numel()
            _put(whole, block, total[first + i * n : first + (i + 1) * n])
    return list(sums.reshape(len(values), -1)), wholes


@cached
def _cut_of(blocks: Blocks) -> tuple[int, Cut] | None:
    """The dim, and its sizes, whose rows the ranks have one after the other; None: another way."""
    own = [d for d, spans in enumerate(zip(*blocks, strict=True)) if len(set(spans)) > 1]
    if len(own) != 1:
        return None
    spans = [block[own[0]] for block in blocks]
    in_order = all(a == b for (_, a), (b, _) in pairwise(spans))
    return (own[0], cut([b - a for a, b in spans])) if in_order else None


def _lengthened(values: Numbers, n: int) -> Numbers:
    """n numbers, the last of which are zeros."""
    if len(values) == n:
        return values
    if isinstance(values, Tensor):
        return torch.cat([values, values.new_zeros(n - len(values))])
    return np.concatenate([values, np.zeros(n - len(values))])


def slices(block: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    """The index of a block of a tensor."""
    return tuple([slice(a, b) for a, b in block])


def _put(whole: Tensor, block: Sequence[tuple[int, int]], flat: Tensor) -> None:
    shape = [b - a for a, b in block]
    if on_host(whole):
        READ[type(whole)](whole)[slices(block)] = READ[type(flat)](flat).reshape(shape)
    else:
        whole[slices(block)] = flat.view(shape).to(whole.dtype)


def _message(values: Sequence[Numbers], dtype: torch.dtype) -> tuple[Tensor, Numbers]:
    """Vectors one after the other, and their numbers."""
    if isinstance(values[0], Tensor):
        flat = torch.cat(list(values)).to(dtype)
        return flat, flat
    n, at = sum(map(len, values)), 0
    if probe.dispatch_modes():
        flat = torch.empty(n, dtype=dtype)
        own = READ[type(flat)](flat)
    else:
        own = np.empty(n, _DTYPES[dtype])
        flat = torch.from_numpy(own)
    for v in values:
        own[at : at + len(v)] = v
        at += len(v)
    return flat, own


def _added(found: Sequence[Tensor]) -> Numbers:
    """Their sum, in the order of the ranks, so that all get the same bits."""
    first = found[0]
    # as `on_host`
    if type(first) not in READ or first.device.type != "cpu":
        return torch.stack(list(found)).double().sum(0) if len(found) > 1 else first.double()
    total = READ[type(first)](first).astype(np.float64)
    for f in found[1:]:
        total += READ[type(f)](f)
    return total
