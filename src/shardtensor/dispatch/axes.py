"""Operands on different axes of one mesh meet: DTensor weights, ShardTensor activations.

A DTensor beside a ShardTensor is the ShardTensor of its shards, and its gradient comes back as a
DTensor. Both are seen on the mesh of all their axes: an activation is the same on all ranks along
tensor-parallel axes that it does not know, a weight along all others. So the rules of matmul are
column- and row-parallel layers by themselves. An axis is tensor-parallel when a weight is sharded
along it that is not one of FSDP2's; along any other axis samples may differ, so ShardTensors do not
meet across it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from .. import _torch
from .._torch import dtensor
from ..cache import cached
from ..errors import UnsupportedOpError
from ..later import dt
from ..registry import rule
from ..spec import Dim, Spec
from ..tensor import ShardTensor, wrap
from ..tensor.construct import from_dtensor

NOWHERE = object()
# types of what strides, shapes and indices are made of
_NUMBERS = frozenset({int, float, bool, str, slice, type(None), type(...)})
Call = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def mesh_of(values: Iterable[Any], mesh: Any) -> Any:
    """The one mesh of all ShardTensors and `mesh`, None without any, NOWHERE if they must meet.

    They must where one is a DTensor, or they lie on several meshes.
    """
    for x in values:
        kind = x.__class__
        if kind is ShardTensor:
            if mesh is None:
                mesh = x._spec.mesh
            elif x._spec.mesh is not mesh and x._spec.mesh != mesh:
                return NOWHERE
        elif kind is dt.DTensor:
            return NOWHERE
        elif (kind is list or kind is tuple) and not _NUMBERS.issuperset(map(type, x)):
            mesh = mesh_of(x, mesh)
            if mesh is NOWHERE:
                return mesh
    return mesh


def met(call: Call, writes: bool, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """call(func, args, kwargs) with all operands on one mesh.

    writes: whether func writes to its first argument. Raises UnsupportedOpError, before anything is
    sent, for meshes that have no tensor-parallel axis to meet along.
    """
    leaves, tree = pytree.tree_flatten((args, kwargs), is_leaf=_is_operand)
    found = [x for x in leaves if _is_operand(x)]
    if (writes and isinstance(args[0], dt.DTensor)) or isinstance(kwargs.get("out"), dt.DTensor):
        raise UnsupportedOpError(
            f"{getattr(func, '__name__', func)}: writes a ShardTensor into a DTensor; use the op "
            "that returns a new tensor"
        )
    mesh = _common(found)
    lifted = [(x, _lift(x, mesh)) for x in found]
    inside = {id(x): new for x, new in lifted}
    args, kwargs = pytree.tree_unflatten([inside.get(id(x), x) for x in leaves], tree)
    if not writes or not isinstance(leaves[0], ShardTensor):
        return call(func, args, kwargs)
    target, seen = lifted[0]
    assert isinstance(seen, ShardTensor)
    spec = seen._spec
    out = call(func, args, kwargs)
    target._local = seen._local
    if seen._spec is not spec:
        target._spec = seen._spec
    return target if out is seen else out


def _is_operand(x: Any) -> bool:
    return isinstance(x, ShardTensor | dt.DTensor)


def _common(operands: list[Any]) -> DeviceMesh:
    """The mesh of all axes of the operands."""
    shards = [x for x in operands if isinstance(x, ShardTensor)]
    weights = [x for x in operands if isinstance(x, dt.DTensor) and not _is_whole(x)]
    mesh = shards[0]._spec.mesh
    for x in shards[1:]:
        mesh = _join(mesh, x._spec.mesh)
    for w in weights:
        if _torch.is_tracing():
            raise UnsupportedOpError(
                "DTensor weights that a compiled program closes over: compile the module that has "
                "them as parameters, or leave this part out of st.compile"
            )
        joined = _join(mesh, _sharding(w.device_mesh, tuple(w.placements)))
        beyond, known = _axes(joined) - _axes(mesh), tensor_axes(dtensor.root_mesh(joined))
        if not beyond <= known:
            if dtensor.is_kept_by_fsdp(w):
                raise _not_gathered()
            known.update(beyond)
        mesh = joined
    known = tensor_axes(dtensor.root_mesh(mesh))
    for x in shards:
        if not _axes(mesh) - _axes(x._spec.mesh) <= known:
            raise _different(x._spec.mesh, mesh)
    return mesh


@cached
def _sharding(mesh: DeviceMesh, placements: tuple[dt.Placement, ...]) -> DeviceMesh:
    """The axes of a mesh along which a tensor is not the same."""
    if mesh.mesh_dim_names is None:
        return mesh
    pairs = zip(mesh.mesh_dim_names, placements, strict=True)
    names = tuple(n for n, p in pairs if not p.is_replicate())
    return mesh if names == mesh.mesh_dim_names else dtensor.root_mesh(mesh)[names]


def _axes(mesh: DeviceMesh) -> set[str]:
    return set(mesh.mesh_dim_names or ())


@cached
def tensor_axes(root: DeviceMesh) -> set[str]:
    """The names of the tensor-parallel axes of a root mesh: a set that `declare` adds to."""
    return set()


def declare(mesh: DeviceMesh) -> None:
    """Make the axes of a mesh tensor-parallel: activations are the same along them."""
    tensor_axes(dtensor.root_mesh(mesh)).update(_axes(mesh))


def as_shards(x: dt.DTensor, beside: DeviceMesh | None) -> Tensor:
    """A DTensor parameter as it meets activations on a mesh; its gradient is a DTensor.

    What is the same on all ranks is a plain tensor.
    """
    made = from_dtensor(x)
    if _is_whole(x):
        return made._local
    if dtensor.is_kept_by_fsdp(x):
        raise _not_gathered()
    mesh = _sharding(x.device_mesh, tuple(x.placements))
    declare(mesh)
    mesh = mesh if beside is None else _join(beside, mesh)
    return wrap(made._local, _lifted(made._spec, mesh))


def _not_gathered() -> UnsupportedOpError:
    return UnsupportedOpError(
        "a ShardTensor meets a parameter that FSDP2 has not gathered: call the module "
        "that fully_shard was applied to, not a part of it"
    )


def is_slice(mesh: DeviceMesh, root: DeviceMesh) -> bool:
    """Whether the axes of a mesh are axes of root, with the same ranks."""
    names = mesh.mesh_dim_names
    if names is None or not set(names) <= _axes(root):
        return mesh == root
    # not by its own root: torch's caches give equal meshes of other roots
    return mesh == (root if names == root.mesh_dim_names else root[names])


@cached
def _join(a: DeviceMesh, b: DeviceMesh) -> DeviceMesh:
    """The mesh of the axes of both, which are slices of one mesh."""
    if a == b:
        return a
    for root in (dtensor.root_mesh(a), dtensor.root_mesh(b)):
        if root.mesh_dim_names and is_slice(a, root) and is_slice(b, root):
            both = tuple(n for n in root.mesh_dim_names if n in _axes(a) | _axes(b))
            same = (m for m in (a, root) if m.mesh_dim_names == both)
            return next(same, None) or root[both]
    raise _different(a, b)


def _different(a: DeviceMesh, b: DeviceMesh) -> UnsupportedOpError:
    return UnsupportedOpError(
        f"tensors on different meshes: {a} and {b}; distribute all on one mesh. Weights for tensor "
        "parallelism lie on another axis of the same mesh: mesh = init_device_mesh(..., "
        "mesh_dim_names=('domain', 'tp')), activations on mesh['domain'], weights on mesh['tp']"
    )


def _lift(x: Any, mesh: DeviceMesh) -> Tensor:
    """An operand on a mesh that has its axes and maybe more; nothing is communicated."""
    if isinstance(x, ShardTensor):
        return x if x._spec.mesh is mesh else wrap(x._local, _lifted(x._spec, mesh), x._strides)
    slot = getattr(x, "_shardtensor_slot", None)
    made = from_dtensor(x)
    if slot is not None and made._local.requires_grad:
        # its gradient is summed with others, by `parallelize`
        made._local._shardtensor_slot = slot  # type: ignore[attr-defined]
    # what is the same on all ranks is a plain tensor
    return made._local if _is_whole(x) else wrap(made._local, _lifted(made._spec, mesh))


def _is_whole(x: dt.DTensor) -> bool:
    return all(p.is_replicate() for p in x.placements)


@cached
def _lifted(spec: Spec, mesh: DeviceMesh) -> Spec:
    """The same dims on a mesh with other axes, along which nothing varies."""
    if spec.mesh == mesh:
        return spec
    assert spec.mesh.mesh_dim_names and mesh.mesh_dim_names
    names = mesh.mesh_dim_names
    at = {i: names.index(n) for i, n in enumerate(spec.mesh.mesh_dim_names) if n in names}
    if list(at.values()) != sorted(at.values()):
        raise _different(spec.mesh, mesh)
    dims = tuple(Dim(d.size, tuple(at[a] for a in d.axes), d.sizes) for d in spec.dims)
    return Spec(mesh, dims, tuple((at[a], op) for a, op in spec.partial))


def _refuse_from_local(*_: Any) -> None:
    raise UnsupportedOpError(
        "DTensor.from_local of a ShardTensor, as in the hooks of a parallel style: apply the plan "
        "with shardtensor.tensor_parallel(model, mesh, plan), which adds no hooks"
    )


dtensor.when_made_from_local(lambda function: rule(function)(_refuse_from_local))
