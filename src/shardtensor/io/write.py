"""Sharded tensors into Zarr arrays: each chunk is written by one rank."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from operator import index
from os import PathLike, fspath
from pathlib import Path
from struct import pack
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import comm
from ..caller import described
from ..comm import wire
from ..tensor import ShardTensor
from ..tensor.redistribute import reduced
from . import staged
from .chunks import chunked
from .coords import Coordinate, consolidate, grows_with, plain_attrs
from .failing import reason
from .source import dims_of
from .where import need


def write_zarr(
    x: ShardTensor,
    url: str | PathLike[str],
    name: str,
    *,
    step: int | None = None,
    chunks: Sequence[int] | None = None,
    dims: Sequence[str] | None = None,
    attrs: Mapping[str, Any] | None = None,
    coords: Mapping[str, Any] | None = None,
    zarr_format: int = 3,
) -> None:
    """Write a tensor as the array `name` of a Zarr group; every rank calls this.

    step: write row `step` of an array (steps, *x.shape), which grows as needed. chunks: of x's
    dims; default those of the array that is there, else the largest shard. dims: names of all dims
    of the array, that of the steps first. coords: for some dims their values, numbers or
    datetime64, or (values, attributes); for the dim of the steps the value of this step. The first
    rank makes the group (of `zarr_format`), the array, coordinates and metadata, which are
    consolidated; what is there is written into. Rows are sent to other ranks only so that no chunk,
    and no shard of Zarr 3, is written by two. On a file system the array changes when all ranks
    have written, see `staged`, and writers of other arrays of the store take turns; object stores
    are written in place. All ranks return when everything is written. Raises ValueError on every
    rank for an array or a coordinate that is there with another shape, dtype, other chunks or
    values, or that somebody else is writing, RuntimeError where another rank could not write, and
    TypeError for a plain tensor.
    """
    zarr = need("zarr")
    if not isinstance(x, ShardTensor):
        raise TypeError(
            f"write_zarr of a {type(x).__name__}, which has no mesh: where every rank has it "
            "whole, give ShardTensor.from_local(x, mesh, [Replicate()])"
        )
    step = None if step is None else index(step)
    if not name or {"", ".", ".."} & set(name.split("/")) or (step is not None and step < 0):
        raise ValueError(
            f"write_zarr: name {name!r}, step {step}; a name stays in the store (no '..', no empty "
            "part), and steps count from 0"
        )
    if zarr_format not in (2, 3):
        raise ValueError(f"zarr_format {zarr_format!r}: 2 or 3")
    url = fspath(url)
    _dtype(x)
    x = reduced(x.detach())
    if chunks is not None and (len(chunks) != x.ndim or min(chunks, default=1) < 1):
        raise ValueError(
            f"chunks {tuple(chunks)} of a tensor of {x.ndim} dims: one size of 1 or more for each"
        )
    shape = (*(() if step is None else (step + 1,)), *x.shape)
    if dims is not None and len(dims) != len(shape):
        raise ValueError(f"dims {list(dims)} for an array of shape {shape}")
    if len({d for d in dims or () if d and isinstance(d, str)}) != len(dims or ()):
        raise ValueError(f"dims {list(dims or ())}: a name for each, no two alike")
    own = name.rpartition("/")[2]
    axes = [Coordinate(k, v, dims or (), shape, step, own) for k, v in (coords or {}).items()]
    mesh, first = x.device_mesh, _first(x.device_mesh)
    part = staged.place(url, name)
    with ExitStack() as held:
        error, unit = None, [1] * (x.ndim + 1)
        # where ranks write, which has to be one place
        where = crc32(repr((name, step, chunks and tuple(chunks), dims and tuple(dims))).encode())
        if first:
            try:
                if part is not None:
                    held.enter_context(staged.alone(part))
                with staged.in_turn(url, part):
                    unit = _prepare(
                        zarr, url, name, part, x, step, chunks, dims, attrs, axes, zarr_format
                    )
            except Exception as e:
                error = e
        *unit, most, least = _agree(
            mesh, error, f"{name} could not be made by the first rank", [*unit, where, -where]
        )
        if most != -least:
            raise ValueError(f"{name}: ranks part: give all the same name, step, chunks and dims")
        aligned: dict[int, Sequence[int]] = {
            d: chunked(0, dim.size, unit[1 + d], len(dim.sizes))
            for d, dim in enumerate(x.spec.dims)
            if dim.axes
        }
        x = x.redistribute(placements=x.placements, sizes=aligned)
        try:
            if _owner(x) and x.to_local().numel():
                array = zarr.open_group(part or url, mode="r+", use_consolidated=False)[name]
                at: list[Any] = [] if step is None else [step]
                at += [
                    slice(a, a + n) for a, n in zip(x.spec.offset, x.spec.local_shape, strict=True)
                ]
                array[tuple(at)] = _numbers(x.to_local())
        except Exception as e:
            error = e
        _agree(mesh, error, f"{name} could not be written by another rank")
        if first:
            try:
                with staged.in_turn(url, part):
                    beside = _beside(zarr.open_group(url, mode="r+", use_consolidated=False), name)
                    for axis in axes:
                        # another array's writer may have made it since
                        axis.check(beside)
                    if part is not None:
                        row = None if step is None else step // unit[0]
                        staged.commit(part, name, _array_folder(url, name), row)
                    for axis in axes:
                        axis.write(beside)
                    consolidate(zarr, url)
            except Exception as e:
                error = e
        _agree(mesh, error, f"{name} could not be completed by the first rank")


def _array_folder(url: str, name: str) -> Path:
    return Path(os.path.abspath(url.removeprefix("file://"))) / name


def _prepare(
    zarr: Any,
    url: str,
    name: str,
    part: Path | None,
    x: ShardTensor,
    step: int | None,
    chunks: Sequence[int] | None,
    dims: Sequence[str] | None,
    attrs: Mapping[str, Any] | None,
    axes: Sequence[Coordinate],
    zarr_format: int,
) -> list[int]:
    """The group, and where it is written the array with room for this step.

    Returns the rows of all dims, that of the steps first, that only one rank may write together.
    """
    if part is not None:
        staged.settle(part)
    try:
        group = zarr.open_group(url, mode="r+", use_consolidated=False)
    except FileNotFoundError:
        group = zarr.open_group(url, mode="a", zarr_format=zarr_format)
    for axis in axes:
        axis.check(_beside(group, name))
    if step is not None:
        named = dims_of(group[name], "zarr") if name in group and not dims else dims
        grows_with(_beside(group, name), named, step, axes)
    lead: tuple[int, ...] = () if step is None else (step + 1,)
    shape = (*lead, *x.shape)
    dtype = _dtype(x)
    there = name in group
    if there:
        array = group[name]
        if not hasattr(array, "shards"):
            raise ValueError(f"{name}: a group is there; give the array another name")
        _check(name, array, shape, dtype, chunks, len(lead))
    if part is not None:
        version = group.metadata.zarr_format
        _beside(group, name)
        group = zarr.open_group(part, mode="w", zarr_format=version)
        if there:
            unit = (array.shards or array.chunks)[0] if lead else 1
            staged.clone(
                _array_folder(url, name), part / name, None if step is None else step // unit
            )
            array = group[name]
    if there:
        if lead and array.shape[0] < lead[0]:
            array.resize((lead[0], *array.shape[1:]))
    else:
        array = _made(group, name, shape, dtype, chunks or _largest(x), dims, attrs)
    found = [int(n) for n in array.shards or array.chunks]
    return found if lead else [1, *found]


def _beside(group: Any, name: str) -> Any:
    """The group of which the array is."""
    path = name.rpartition("/")[0]
    try:
        return group.require_group(path) if path else group
    except TypeError as e:
        raise ValueError(f"{name}: {path} is no group but an array: give another name") from e


def _check(
    name: str,
    array: Any,
    shape: tuple[int, ...],
    dtype: Any,
    chunks: Sequence[int] | None,
    lead: int,
) -> None:
    """Raise ValueError for an array that the tensor does not fit into."""
    told = f" in chunks {(*array.chunks[:lead], *chunks)}" if chunks is not None else ""
    fits = array.shape[lead:] == shape[lead:] and array.ndim == len(shape)
    alike = chunks is None or tuple(chunks) == array.chunks[lead:]
    if not fits or array.dtype != dtype or not alike:
        raise ValueError(
            f"{name}: {array.shape} of {array.dtype} in chunks {array.chunks} is there; to be "
            f"written is {shape} of {dtype}{told}"
        )


def _made(
    group: Any,
    name: str,
    shape: tuple[int, ...],
    dtype: Any,
    chunks: Sequence[int],
    dims: Sequence[str] | None,
    attrs: Mapping[str, Any] | None,
) -> Any:
    """A new array of a Zarr group, with names of dims where its format keeps them."""
    names = list(dims) if dims else None
    more = plain_attrs(attrs or {})
    extra: dict[str, Any] = {}
    if group.metadata.zarr_format == 2:
        # xarray takes a fill value of 0 for a mask of all zeros
        extra["fill_value"] = None
        if names:
            more["_ARRAY_DIMENSIONS"] = names
    else:
        if names:
            extra["dimension_names"] = names
        fill = more.get("_FillValue")
        if fill is not None and np.dtype(dtype).kind == "f":
            # as xarray has it there
            more["_FillValue"] = b64encode(pack("<d", fill)).decode()
    chunks = (*(1 for _ in shape[len(chunks) :]), *chunks)
    array = group.create_array(name, shape=shape, chunks=chunks, dtype=dtype, **extra)
    array.attrs.update(more)
    return array


def _largest(x: ShardTensor) -> tuple[int, ...]:
    return tuple(max(d.sizes or (d.size,)) or 1 for d in x.spec.dims)


def _numbers(local: Tensor) -> Any:
    """As NumPy has it; bfloat16, which it has not, as float32."""
    local = local.detach().cpu().resolve_conj().resolve_neg()
    return (local.float() if local.dtype is torch.bfloat16 else local).numpy()


def _dtype(x: Tensor) -> Any:
    try:
        return _numbers(torch.empty(0, dtype=x.dtype)).dtype
    except TypeError:
        raise ValueError(f"write_zarr of {x.dtype}, which Zarr has not: give x.float()") from None


def _first(mesh: DeviceMesh) -> bool:
    return comm.rank(_everyone(mesh)) == 0


def _owner(x: ShardTensor) -> bool:
    """Whether this rank, of those that hold the same shard, writes it."""
    return all(i == 0 for a, i in enumerate(x.spec.coordinate) if a not in x.spec.varying)


def _everyone(mesh: DeviceMesh) -> str:
    return comm.group(mesh, tuple(range(mesh.ndim)))


def _agree(
    mesh: DeviceMesh, error: Exception | None, elsewhere: str, told: Sequence[int] = ()
) -> list[int]:
    """Wait for all ranks; raise on each of them if one failed. The largest of what they told."""
    group = _everyone(mesh)
    numbers = torch.tensor([int(error is not None), *told], device=mesh.device_type)
    if comm.size(group) > 1:
        (numbers,) = wire.all_reduce([numbers], "max", group)
    failed, *found = numbers.tolist()
    if failed:
        said = "" if error is None else described(error)
        why = reason(said, mesh.device_type, group)
    if error is not None:
        raise error
    if failed:
        raise RuntimeError(f"{elsewhere}: {why}")
    return found
