"""ShardTensors from plain tensors, local tensors and DTensors, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import _torch, comm
from ..comm import counters, groups, together, wire
from ..comm.formats import memory_format
from ..cuts import Cut, cut
from ..errors import UnsupportedOpError
from ..later import dt
from ..registry import method
from ..spec import Spec
from . import layout
from .shard_tensor import ShardTensor, wrap

_MOST_DIMS = 14
_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
DTYPES = sorted((d for d in vars(torch).values() if isinstance(d, torch.dtype)), key=str)


def distribute_tensor(
    tensor: Tensor,
    device_mesh: DeviceMesh,
    placements: Sequence[dt.Placement] | None = None,
    *,
    src_data_rank: int | None = 0,
    sizes: Mapping[int, Sequence[int]] | None = None,
) -> ShardTensor:
    """A leaf ShardTensor of a plain tensor that has the same shape and dtype on every rank.

    src_data_rank: the mesh rank whose values count; it sends each other rank its slice only. What
    the others hold is lost: under `guard` it must be the same, or one value throughout. None:
    every rank slices its own copy and nothing is sent.
    sizes: for a sharded dim the sizes of all shards (default: torch.chunk's).
    Raises ValueError where placements, sizes and shape do not fit, TypeError for what is no tensor
    and no mesh, UnsupportedOpError for a tensor with a tangent.
    """
    _check(tensor, device_mesh, "distribute_tensor")
    if isinstance(tensor, ShardTensor):
        raise ValueError("distribute_tensor of a ShardTensor: use x.redistribute")
    if src_data_rank is not None and not 0 <= src_data_rank < device_mesh.size():
        raise ValueError(
            f"src_data_rank {src_data_rank}: a rank of the mesh, 0 to {device_mesh.size() - 1}, or "
            "None where every rank has the values"
        )
    if placements is None:
        placements = [dt.Replicate()] * device_mesh.ndim
    spec = Spec.of(device_mesh, placements, tensor.shape, sizes)
    if spec.partial:
        raise ValueError("distribute_tensor to Partial: use ShardTensor.from_local")
    if _torch.has_tangent(tensor):
        raise UnsupportedOpError(
            "distribute_tensor of a tensor with a tangent, which a leaf has not: distribute both "
            "outside of torch.func and forward mode, or take ShardTensor.from_local"
        )
    name = comm.group(device_mesh, tuple(range(device_mesh.ndim)))
    source = tensor.detach()
    if counters.records and src_data_rank is None:
        counters.called("distribute_tensor", (source, device_mesh))
    if src_data_rank is None or comm.size(name) == 1:
        form = memory_format(source)
        local = _slice(source, spec, spec.coordinate).clone(memory_format=form)
    else:
        form = _same_everywhere(source, name)[src_data_rank]
        if counters.records:
            told = {"src_data_rank": src_data_rank}
            counters.called("distribute_tensor", (source, device_mesh), told)
        local = _scatter(source, spec, src_data_rank, name).contiguous(memory_format=form)
    # torch.func lets nobody ask
    whole = wrap(local.requires_grad_() if tensor.requires_grad else local, spec)
    if spec.thin and form is not torch.contiguous_format:
        whole._strides = layout.Strides.of(spec.shape, layout.in_format(spec.shape, form))
    return whole


def _check(tensor: Any, mesh: Any, what: str) -> None:
    """Raise TypeError or ValueError for what cannot lie on a mesh."""
    groups.renew()
    together.begin()
    if isinstance(tensor, Mapping | list | tuple) and _has_tensor(tensor):
        kind = type(tensor).__name__
        raise TypeError(f"{what} of a {kind}: call it for each tensor, with the dims that each has")
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what} of a {type(tensor).__name__}: make it a torch.Tensor first")
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"{what} on a {type(mesh).__name__}: give a DeviceMesh, as shardtensor.init returns"
        )
    if isinstance(tensor, dt.DTensor):
        raise ValueError(f"{what} of a DTensor: use ShardTensor.from_dtensor")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{what} of a sparse tensor: use tensor.to_dense()")
    if tensor.device.type != mesh.device_type:
        raise ValueError(
            f"{what} of a tensor on {tensor.device} and a mesh of {mesh.device_type} devices: use "
            f"tensor.to({mesh.device_type!r})"
        )


def _has_tensor(tree: Any) -> bool:
    values = tree.values() if isinstance(tree, Mapping) else tree
    return any(isinstance(x, Tensor) for x in values)


def _same_everywhere(x: Tensor, name: str) -> list[torch.memory_format]:
    """The memory format of every rank's tensor.

    Raises ValueError on every rank unless all have the same shape and dtype.
    """
    table = facts(x, name)
    if (table[:, :-1] == table[0, :-1]).all():
        return [_FORMATS[k] for k in table[:, -1].tolist()]
    raise ValueError(
        "distribute_tensor: ranks have different tensors, "
        + ", ".join(f"{list(k[2 : 2 + k[0]])} {DTYPES[k[1]]}" for k in table.tolist())
        + "; every rank gives the whole tensor's shape and dtype (torch.zeros where it has no "
        "values), or its own part to ShardTensor.from_local"
    )


def facts(x: Tensor | None, name: str, device: torch.device | None = None) -> Any:
    """Dims, number of dtype, shape, zeros and format of every rank's tensor, by one all-gather.

    None, which needs a device, has -1 dims.
    """
    if x is None:
        return wire.all_gather_table([-1] + [0] * (_MOST_DIMS + 2), device or "cpu", name)
    if x.ndim > _MOST_DIMS:
        raise ValueError(f"a tensor of {x.ndim} dims; at most {_MOST_DIMS}")
    own = [x.ndim, DTYPES.index(x.dtype), *x.shape]
    own += [0] * (_MOST_DIMS + 2 - len(own))
    return wire.all_gather_table([*own, _FORMATS.index(memory_format(x))], x.device, name)


def _coordinates(mesh: DeviceMesh) -> list[tuple[int, ...]]:
    return list(product(*map(range, mesh.shape)))


def _slice(x: Tensor, spec: Spec, coordinate: Sequence[int]) -> Tensor:
    for d, (dim, i) in enumerate(zip(spec.dims, spec.index_at(coordinate), strict=True)):
        if dim.axes:
            x = x.narrow(d, dim.offsets[i], dim.sizes[i])
    return x


def _scatter(x: Tensor, spec: Spec, source: int, name: str) -> Tensor:
    me = comm.rank(name)
    if me != source:
        shapes = {source: [spec.local_shape]}
        return wire.exchange({}, shapes, x, name, "scatter")[source][0]
    own = _slice(x, spec, spec.coordinate).clone(memory_format=torch.contiguous_format)
    places = _coordinates(spec.mesh)
    chunks = {r: [_slice(x, spec, p)] for r, p in enumerate(places) if r != me}
    wire.exchange(chunks, {}, x, name, "scatter")
    return own


@method
def from_local(
    local: Tensor,
    mesh: DeviceMesh,
    placements: Sequence[dt.Placement],
    sizes: Mapping[int, Sequence[int]] | None = None,
) -> ShardTensor:
    """`ShardTensor.from_local`."""
    _check(local, mesh, "from_local")
    if isinstance(local, ShardTensor):
        raise ValueError("from_local takes this rank's plain local tensor, not a ShardTensor")
    # a spec of the right axes, with sizes still unknown
    unknown = Spec.of(mesh, placements, [0] * local.ndim)
    if sizes is None:
        learned = _learn_sizes(local, unknown)
    else:
        for d in sizes:
            if not -local.ndim <= d < local.ndim:
                raise ValueError(f"sizes for dim {d} of a tensor of {local.ndim} dims")
        learned = {d % local.ndim: cut(s) for d, s in sizes.items()}
        missing = [d for d, dim in enumerate(unknown.dims) if dim.axes and d not in learned]
        if missing:
            raise ValueError(f"sizes must name every sharded dim; dims {missing} are missing")
    shape = [learned[d].offsets[-1] if d in learned else n for d, n in enumerate(local.shape)]
    spec = Spec.of(mesh, placements, shape, learned)
    if spec.local_shape != local.shape:
        raise ValueError(
            f"local shape {tuple(local.shape)} where sizes say {tuple(spec.local_shape)}"
        )
    if counters.records and not spec.varying and not spec.partial:
        counters.called("from_local", (local, mesh))
    return wrap(local, spec)


def _learn_sizes(local: Tensor, unknown: Spec) -> dict[int, Cut]:
    """All shard sizes, by one all-gather of every rank's shape."""
    mesh = unknown.mesh
    known = facts(local, comm.group(mesh, tuple(range(mesh.ndim))))
    if (known[:, :2] != known[0, :2]).any():
        raise ValueError(
            "from_local: ranks hold different dims or dtypes: "
            + ", ".join(f"{k[0]}-d {DTYPES[k[1]]}" for k in known.tolist())
        )
    learned: dict[int, Cut] = {}
    for d, dim in enumerate(unknown.dims):
        seen = known[:, 2 + d].reshape(mesh.shape)
        # (shards of the dim, ranks that hold the same one)
        first = (*dim.axes, *(a for a in range(mesh.ndim) if a not in dim.axes))
        held = seen.transpose(first).reshape(max(1, len(dim.sizes)), -1)
        if (held != held[:, :1]).any():
            raise ValueError(
                f"from_local: ranks that hold the same shard of dim {d} differ in its size: "
                f"{sorted(set(seen.ravel().tolist()))}"
            )
        if dim.axes:
            learned[d] = cut(held[:, 0].tolist())
    return learned


@method
def graded(local: Tensor, spec: Spec, grad_placements: Sequence[dt.Placement]) -> Tensor:
    """The local tensor of spec for uses that make its gradient lie as grad_placements."""
    own, given = spec.cotangent.placements, tuple(grad_placements)
    sums = [a for a, (p, g) in enumerate(zip(own, given, strict=False)) if p != g]
    if len(given) != len(own) or any(
        not (own[a].is_replicate() and given[a] == dt.Partial()) for a in sums
    ):
        raise ValueError(
            f"grad_placements {given} for a tensor whose gradient lies as {own}: give these, or "
            "Partial() in place of a Replicate()"
        )
    return comm.vary([local], comm.group(spec.mesh, tuple(sums)))[0] if sums else local


@method
def to_dtensor(x: ShardTensor) -> dt.DTensor:
    """`ShardTensor.to_dtensor`."""
    spec = x._spec
    chunk = Spec.of(spec.mesh, spec.placements, spec.shape)
    if chunk.dims != spec.dims:
        raise UnsupportedOpError(
            f"to_dtensor: DTensor knows only torch.chunk's sizes {chunk.sizes}, not {spec.sizes}; "
            "x.redistribute(placements=x.placements, sizes=...) to those first"
        )
    stride = torch.empty(spec.shape, device="meta").stride()
    return dt.DTensor.from_local(
        x._local, spec.mesh, spec.placements, run_check=False, shape=spec.shape, stride=stride
    )


@method
def from_dtensor(d: dt.DTensor) -> ShardTensor:
    """`ShardTensor.from_dtensor`."""
    for p in d.placements:
        # subclasses of these mean something else: rows that are to be masked, interleaved shards
        if type(p) not in (dt.Shard, dt.Replicate, dt.Partial):
            raise UnsupportedOpError(
                f"a DTensor placed as {p!r}: redistribute it to Shard, Replicate or Partial first; "
                "parameters of FSDP2 are gathered by the module that fully_shard was applied to"
            )
    groups.renew()
    spec = Spec.of(d.device_mesh, d.placements, d.shape)
    grads = [dt.Replicate() if p.is_partial() else p for p in spec.placements]
    return wrap(d.to_local(grad_placements=grads), spec)
