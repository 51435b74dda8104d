"""Sharded tensors into Zarr arrays: each chunk is written by one rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate

from .. import comm
from ..comm import wire
from ..tensor import ShardTensor
from .block import chunked
from .source import need


def write_zarr(
    x: ShardTensor,
    url: str,
    name: str,
    *,
    step: int | None = None,
    chunks: Sequence[int] | None = None,
    dims: Sequence[str] | None = None,
    attrs: Mapping[str, Any] | None = None,
    zarr_format: int = 3,
) -> None:
    """Write a tensor as the array `name` of a Zarr group; every rank calls this.

    step: write row `step` of an array (steps, *x.shape), which grows as needed. chunks: of x's
    dims; default the largest shard. dims: names of all dims of the array, that of the steps first.
    The first rank makes the group (of `zarr_format`), the array and its metadata; what is there is
    written into. Rows move to ranks only so that no chunk is written by two. All ranks return when
    everything is written. Raises ValueError on every rank for an array that is there with another
    shape, dtype or other chunks, and RuntimeError where another rank could not write.
    """
    zarr = need("zarr")
    x = x.detach()
    if x.spec.partial:
        x = x.redistribute(placements=[Replicate() if p.is_partial() else p for p in x.placements])
    whole = tuple(chunks) if chunks else tuple(max(d.sizes or (d.size,)) or 1 for d in x.spec.dims)
    if len(whole) != x.ndim or min(whole, default=1) < 1:
        raise ValueError(f"chunks {whole} of a tensor of {x.ndim} dims")
    lead: tuple[int, ...] = () if step is None else (step + 1,)
    error = None
    if _first(x.device_mesh):
        try:
            _prepare(zarr, url, name, x, lead, whole, dims, attrs, zarr_format)
        except Exception as e:
            error = e
    _agree(x.device_mesh, error, f"{name} could not be made by the first rank")
    aligned: dict[int, Sequence[int]] = {
        d: chunked(0, dim.size, whole[d], len(dim.sizes))
        for d, dim in enumerate(x.spec.dims)
        if dim.axes
    }
    x = x.redistribute(placements=x.placements, sizes=aligned)
    try:
        if _owner(x) and x.to_local().numel():
            array = zarr.open_group(url, mode="r+")[name]
            at: list[Any] = [] if step is None else [step]
            at += [slice(a, a + n) for a, n in zip(x.spec.offset, x.spec.local_shape, strict=True)]
            array[tuple(at)] = _numbers(x.to_local())
    except Exception as e:
        error = e
    _agree(x.device_mesh, error, f"{name} could not be written by another rank")


def _prepare(
    zarr: Any, url: str, name: str, x: ShardTensor, lead: tuple[int, ...], chunks: tuple[int, ...],
    dims: Sequence[str] | None, attrs: Mapping[str, Any] | None, zarr_format: int,
) -> None:  # fmt: skip
    """The group, and the array with room for this step."""
    try:
        group = zarr.open_group(url, mode="r+")
    except FileNotFoundError:
        group = zarr.open_group(url, mode="a", zarr_format=zarr_format)
    shape = (*lead, *x.shape)
    chunks = (*(1 for _ in lead), *chunks)
    dtype = _numbers(x.to_local()[..., :0] if x.ndim else x.to_local()).dtype
    if name not in group:
        names = list(dims) if dims else None
        if names is not None and len(names) != len(shape):
            raise ValueError(f"dims {names} for an array of shape {shape}")
        more = dict(attrs or {})
        extra: dict[str, Any] = {}
        if names and group.metadata.zarr_format == 2:
            more["_ARRAY_DIMENSIONS"] = names
        elif names:
            extra["dimension_names"] = names
        array = group.create_array(name, shape=shape, chunks=chunks, dtype=dtype, **extra)
        array.attrs.update(more)
        return
    array = group[name]
    fits = array.shape[len(lead) :] == tuple(x.shape) and array.ndim == len(shape)
    if not fits or array.dtype != dtype or array.chunks != chunks:
        raise ValueError(
            f"{name}: {array.shape} of {array.dtype} in chunks {array.chunks} is there; to be "
            f"written is {shape} of {dtype} in chunks {chunks}"
        )
    if lead and array.shape[0] < lead[0]:
        array.resize((lead[0], *array.shape[1:]))


def _numbers(local: Tensor) -> Any:
    """As NumPy has it; bfloat16, which it has not, as float32."""
    local = local.detach().cpu()
    return (local.float() if local.dtype is torch.bfloat16 else local).numpy()


def _first(mesh: DeviceMesh) -> bool:
    return comm.rank(_everyone(mesh)) == 0


def _owner(x: ShardTensor) -> bool:
    """Whether this rank, of those that hold the same shard, writes it."""
    return all(i == 0 for a, i in enumerate(x.spec.coordinate) if a not in x.spec.varying)


def _everyone(mesh: DeviceMesh) -> str:
    return comm.group(mesh, tuple(range(mesh.ndim)))


def _agree(mesh: DeviceMesh, error: Exception | None, elsewhere: str) -> None:
    """Wait for all ranks; raise on each of them if one failed."""
    group = _everyone(mesh)
    failed = error is not None
    if comm.size(group) > 1:
        flag = torch.tensor([int(failed)], device=mesh.device_type)
        failed = bool(wire.all_reduce([flag], "max", group)[0])
    if error is not None:
        raise error
    if failed:
        raise RuntimeError(elsewhere)
