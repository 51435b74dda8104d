"""Indexing: slices stay where they are; one row of a sharded dim is gathered from its owner."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import comm
from ..errors import UnsupportedOpError
from ..fallback import fall_back
from ..redistribute import fit, reduced, replicate
from ..registry import rule
from ..spec import Dim, Spec
from ..tensor import ShardTensor, wrap
from ..views import check_writable, stands_for_view
from .pointwise import function_rule
from .shape import _index, whole_in


def sliced(x: ShardTensor, d: int, start: int, stop: int, step: int = 1) -> ShardTensor:
    """Rows start, start + step, ... below stop of dim d: every rank keeps what it has of them."""
    spec = x._spec
    dim = spec.dims[d]
    count = max(0, -(-(stop - start) // step))
    if not dim.axes:
        new = Dim(count)
        local = slice(start, start + count * step, step)
    else:
        # the number of picked rows before each edge of the shards
        picked = [min(count, max(0, -(-(o - start) // step))) for o in dim.offsets]
        new = Dim(count, dim.axes, tuple(b - a for a, b in pairwise(picked)))
        i = spec.index[d]
        first = start + picked[i] * step - dim.offsets[i]
        local = slice(first, first + new.sizes[i] * step, step) if new.sizes[i] else slice(0, 0)
    dims = (*spec.dims[:d], new, *spec.dims[d + 1 :])
    out = x._local[(slice(None),) * d + (local,)]
    return wrap(out, Spec(spec.mesh, dims, spec.partial))


def selected(x: ShardTensor, d: int, index: int) -> ShardTensor:
    """One row of dim d, alike on all ranks that shard it."""
    n = x.shape[d]
    if not -n <= index < n:
        raise IndexError(f"index {index} is out of bounds for dimension {d} with size {n}")
    index %= n
    spec = x._spec
    dims = (*spec.dims[:d], *spec.dims[d + 1 :])
    out = Spec(spec.mesh, dims, spec.partial)
    dim = spec.dims[d]
    if not dim.axes:
        return wrap(x._local.select(d, index), out)
    row = sliced(x, d, index, index + 1)
    sizes = row._spec.dims[d].sizes
    local = comm.gather(row._local, d, sizes, comm.group(spec.mesh, dim.axes)).select(d, 0)
    if len(sizes) > 1:
        stands_for_view(local, x._local, "select")
    return wrap(local, out)


def _range(start: Any, stop: Any, step: int, n: int) -> tuple[int, int]:
    first, last, _ = slice(_int(start), _int(stop), step).indices(n)
    return first, max(first, last)


def _int(x: Any) -> int | None:
    return None if x is None else int(x)


@rule("select")
def select(input: ShardTensor, dim: int, index: int) -> ShardTensor:
    return selected(input, _index(dim, input.ndim), int(index))


@rule("slice")
def slice_(
    input: ShardTensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> ShardTensor:
    d = _index(dim, input.ndim)
    return sliced(input, d, *_range(start, end, step, input.shape[d]), step)


@rule("narrow")
def narrow(input: ShardTensor, dim: int, start: Any, length: int) -> ShardTensor:
    d = _index(dim, input.ndim)
    first = int(start)
    first = first + input.shape[d] if first < 0 else first
    if first + length > input.shape[d]:
        raise RuntimeError(f"start ({first}) + length ({length}) exceeds {input.shape[d]}")
    return sliced(input, d, first, first + length)


@rule("narrow_copy")
def narrow_copy(input: ShardTensor, dim: int, start: int, length: int) -> Tensor:
    return narrow(input, dim, start, length).clone()


@rule("unbind")
def unbind(input: ShardTensor, dim: int = 0) -> tuple[ShardTensor, ...]:
    d = _index(dim, input.ndim)
    x = whole_in(input, [d], "unbind")
    dims = (*x._spec.dims[:d], *x._spec.dims[d + 1 :])
    spec = Spec(x._spec.mesh, dims, x._spec.partial)
    return tuple(wrap(row, spec) for row in x._local.unbind(d))


@rule("split", "split_with_sizes")
def split(
    tensor: ShardTensor, split_size: Any = None, dim: int = 0, *, split_sizes: Any = None,
    split_size_or_sections: Any = None,
) -> tuple[ShardTensor, ...]:  # fmt: skip
    given = next(s for s in (split_size, split_sizes, split_size_or_sections) if s is not None)
    d = _index(dim, tensor.ndim)
    n = tensor.shape[d]
    sizes = list(given) if isinstance(given, list | tuple) else _even(n, int(given))
    if sum(sizes) != n:
        raise RuntimeError(f"split_with_sizes expects sizes that add up to {n}, not {sizes}")
    return _parts(tensor, d, sizes)


def _even(n: int, size: int) -> list[int]:
    return [min(size, n - i) for i in range(0, n, size)] or [0]


def _parts(x: ShardTensor, d: int, sizes: Sequence[int]) -> tuple[ShardTensor, ...]:
    parts, at = [], 0
    for n in sizes:
        parts.append(sliced(x, d, at, at + n))
        at += n
    return tuple(parts)


@rule("chunk")
def chunk(input: ShardTensor, chunks: int, dim: int = 0) -> tuple[ShardTensor, ...]:
    d = _index(dim, input.ndim)
    n = input.shape[d]
    if n == 0:
        return _parts(input, d, [0] * chunks)
    return _parts(input, d, _even(n, -(-n // chunks)))


# x[...] ------------------------------------------------------------------------------------------


def _entries(index: Any, ndim: int) -> list[Any] | None:
    """The index as one entry per dim and None, the ellipsis spelled out; None if it cannot be."""
    entries = list(index) if isinstance(index, tuple) else [index]
    used = 0
    for e in entries:
        if isinstance(e, Tensor) and e.dtype in (torch.bool, torch.uint8):
            used += e.ndim
        elif e is not None and e is not Ellipsis and not isinstance(e, bool):
            used += 1
    if any(isinstance(e, bool) for e in entries):
        return None
    where = next((i for i, e in enumerate(entries) if e is Ellipsis), len(entries))
    spelled = entries[:where] + [slice(None)] * (ndim - used) + entries[where + 1 :]
    if used > ndim:
        raise IndexError(f"too many indices for tensor of dimension {ndim}")
    return [
        int(e) if isinstance(e, Tensor) and e.ndim == 0 and _is_integer(e) else e for e in spelled
    ]


def _is_integer(e: Tensor) -> bool:
    return not e.is_floating_point() and not e.is_complex() and e.dtype is not torch.bool


def _basic(x: ShardTensor, entries: list[Any]) -> tuple[ShardTensor, dict[int, Any]]:
    """Slices, integers and None applied; what remains: {dim of the result: tensor or list}."""
    d, rest = 0, {}
    for e in entries:
        if e is None:
            spec = x._spec
            dims = (*spec.dims[:d], Dim(1), *spec.dims[d:])
            x = wrap(x._local.unsqueeze(d), Spec(spec.mesh, dims, spec.partial))
            d += 1
        elif isinstance(e, slice):
            step = 1 if e.step is None else int(e.step)
            if e != slice(None):
                x = sliced(x, d, *_range(e.start, e.stop, step, x.shape[d]), step)
            d += 1
        elif isinstance(e, Tensor | list | tuple | range):
            rest[d] = e
            d += 1
        else:
            x = selected(x, d, e.__index__())
    return x, rest


@function_rule("getitem")
def getitem(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, index = args
    if not isinstance(x, ShardTensor):
        return _lookup(func, x, index)
    entries = _entries(index, x.ndim)
    tensors = [] if entries is None else [e for e in entries if isinstance(e, Tensor | list)]
    if entries is None or any(not _plain_integers(e) for e in tensors):
        return fall_back(func, args, kwargs)
    y, rest = _basic(x, entries)
    return _picked(y, rest) if rest else y


def _plain_integers(e: Any) -> bool:
    if isinstance(e, list):
        e = torch.tensor(e)
    return not isinstance(e, ShardTensor) and _is_integer(e) and e.dtype is not torch.uint8


def _picked(x: ShardTensor, rest: dict[int, Any]) -> ShardTensor:
    """Plain integer tensors into dims that every rank has whole."""
    x = whole_in(reduced(x), list(rest), "advanced indexing")
    at = sorted(rest)
    tensors = {d: torch.as_tensor(rest[d], device=x.device) for d in at}
    shape = torch.broadcast_shapes(*(t.shape for t in tensors.values()))
    kept = [dim for d, dim in enumerate(x._spec.dims) if d not in rest]
    front = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    dims = kept[:front] + [Dim(n) for n in shape] + kept[front:]
    index = tuple(tensors.get(d, slice(None)) for d in range(x.ndim))
    return wrap(x._local[index], x._spec.with_dims(dims))


def _lookup(func: Any, table: Tensor, index: Any) -> Any:
    """Rows of a plain table at the entries of a sharded integer tensor."""
    if isinstance(index, ShardTensor) and _is_integer(index) and index.dtype is not torch.uint8:
        spec = index._spec
        rows, local = fit(spec.mesh, spec.varying, (table, None), (index, spec.dims))
        assert rows is not None and local is not None
        return wrap(rows[local], spec.with_dims([*spec.dims, *(Dim(n) for n in table.shape[1:])]))
    return fall_back(func, (table, index), {})


@function_rule("setitem")
def setitem(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Assignment by slices, integers and boolean masks of one value."""
    x, index, value = args
    if not isinstance(x, ShardTensor):
        # a plain tensor is whole on every rank, so it takes whole values
        fall_back(func, args, kwargs)
        return
    check_writable(x, "x[...] = ")
    one = not isinstance(value, Tensor) or value.ndim == 0
    if isinstance(index, Tensor) and index.dtype is torch.bool and one:
        mask = index.reshape(*index.shape, *[1] * (x.ndim - index.ndim))
        x.masked_fill_(mask, value)
        return
    entries = _entries(index, x.ndim)
    if entries is None or any(isinstance(e, Tensor | list) for e in entries):
        _set_rows(x, entries, value, one)
        return
    single = [isinstance(e, int) for e in entries if e is not None]
    ranges = [slice(e, e + 1 or None) if isinstance(e, int) else e for e in entries]
    if None in ranges:
        raise UnsupportedOpError("x[None, ...] = value: leave None out of the index")
    part, _ = _basic(x, ranges)
    if not one:
        value = _with_dims_of_one(value, single)
    part.copy_(torch.as_tensor(value, dtype=x.dtype) if not isinstance(value, Tensor) else value)


def _with_dims_of_one(value: Tensor, single: list[bool]) -> Tensor:
    """A value for x[i, :, j] shaped for x[i:i+1, :, j:j+1]."""
    missing = sum(not s for s in single) - value.ndim
    for d, is_int in enumerate(single):
        if missing > 0 and not is_int:
            missing -= 1
        elif is_int and missing <= 0:
            lead = sum(1 for s in single[:d]) - (len(single) - value.ndim - sum(single[d:]))
            value = value.unsqueeze(max(0, lead))
    return value


def _set_rows(x: ShardTensor, entries: list[Any] | None, value: Any, one: bool) -> None:
    whole = entries is not None and all(
        not x._spec.dims[d].axes if _plain_rows(e) else e == slice(None)
        for d, e in enumerate(entries)
    )
    if not whole or not one or entries is None:
        raise UnsupportedOpError(
            f"assignment at tensor indices to {x._spec}: use torch.where, index_add or scatter"
        )
    x._local[tuple(entries)] = value


def _plain_rows(e: Any) -> bool:
    return isinstance(e, Tensor | list) and _plain_integers(e)


@rule("index_select")
def index_select(input: Tensor, dim: int, index: Tensor) -> Tensor:
    d = _index(dim, input.ndim)
    if isinstance(index, ShardTensor):
        index = replicate(index)._local
    if not isinstance(input, ShardTensor):
        return torch.index_select(input, d, index)
    x = whole_in(reduced(input), [d], "index_select")
    dims = [Dim(index.numel()) if i == d else n for i, n in enumerate(x._spec.dims)]
    return wrap(x._local.index_select(d, index), x._spec.with_dims(dims))
