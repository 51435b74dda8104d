"""Sharded tensors into Zarr arrays: each chunk is written by one rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from operator import index
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import comm
from ..caller import described
from ..comm import wire
from ..tensor import ShardTensor
from ..tensor.redistribute import reduced
from .chunks import chunked
from .failing import reason
from .target import Target
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
    need("zarr")
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
    to = Target(
        fspath(url), name, step, tuple(x.shape), _dtype(x), chunks, _largest(x), dims, attrs or {},
        coords or {}, zarr_format,
    )  # fmt: skip
    x, mesh = reduced(x.detach()), x.device_mesh
    with ExitStack() as held:
        first = _first(mesh)
        unit = _alike(mesh, to, (lambda: to.make(held)) if first else None)
        x = x.redistribute(placements=x.placements, sizes=_aligned(x, unit))
        own = _owner(x) and x.to_local().numel()
        _together(
            mesh, f"{name} could not be written by another rank",
            (lambda: to.write(x.spec.offset, _numbers(x.to_local()))) if own else None,
        )  # fmt: skip
        _together(
            mesh, f"{name} could not be completed by the first rank",
            (lambda: to.complete(unit[0])) if first else None,
        )  # fmt: skip


def _alike(mesh: DeviceMesh, to: Target, make: Callable[[], list[int]] | None) -> list[int]:
    """The rows of all dims that one rank writes together, told by who makes the array."""
    # where ranks write, which has to be one place
    where = to.number()
    told = [*[1] * (len(to.shape) + 1), where, -where]
    *unit, most, least = _together(
        mesh, f"{to.name} could not be made by the first rank",
        None if make is None else lambda: [*make(), where, -where], told,
    )  # fmt: skip
    if most != -least:
        raise ValueError(f"{to.name}: ranks part: give all the same name, step, chunks and dims")
    return unit


def _aligned(x: ShardTensor, unit: Sequence[int]) -> dict[int, Sequence[int]]:
    """Sizes of shards of which none begins within what one rank writes together."""
    return {
        d: chunked(0, dim.size, unit[1 + d], len(dim.sizes))
        for d, dim in enumerate(x.spec.dims)
        if dim.axes
    }


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


def _together(
    mesh: DeviceMesh, elsewhere: str, run: Callable[[], object] | None, told: Sequence[int] = ()
) -> list[int]:
    """Call run where there is one and wait for all ranks; raise on each of them if one failed.

    The largest of what they told: in place of `told` what run gives, if that is numbers.
    """
    error, group = None, _everyone(mesh)
    try:
        found = run() if run is not None else None
        told = found if isinstance(found, list) else told
    except Exception as e:
        error = e
    numbers = torch.tensor([int(error is not None), *told], device=mesh.device_type)
    if comm.size(group) > 1:
        (numbers,) = wire.all_reduce([numbers], "max", group)
    failed, *most = numbers.tolist()
    if failed:
        said = "" if error is None else described(error)
        why = reason(said, mesh.device_type, group)
    if error is not None:
        raise error
    if failed:
        raise RuntimeError(f"{elsewhere}: {why}")
    return most
