"""ShardTensor, its spec and `scatter_tensor`, by PhysicsNeMo's signatures."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.utils import _pytree as pytree

from ... import comm, tensor
from ...dispatch.rule import rule
from ...errors import UnsupportedOpError
from ...spec import Spec as ShardTensorSpec
from ...tensor import construct
from ...tensor.redistribute import like
from ...tensor.shard_tensor import wrap

Handler = Callable[..., Any]


class TensorPromotionMode(enum.Enum):
    """How a plain tensor meets sharded ones; here always as a replicated one, silently."""

    DISABLED = "disabled"
    WARN = "warn"
    SILENT = "silent"


class _Names(type):
    """What is asked of the class is asked of the library's own."""

    def __instancecheck__(cls, x: Any) -> bool:
        return isinstance(x, tensor.ShardTensor)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, tensor.ShardTensor)

    def __getattr__(cls, name: str) -> Any:
        return getattr(tensor.ShardTensor, name)


class ShardTensor(metaclass=_Names):
    """The class under PhysicsNeMo's name and with its arguments; instances are the library's."""

    def __new__(  # type: ignore[misc]
        cls, local_tensor: Tensor, spec: ShardTensorSpec, *, requires_grad: bool = False
    ) -> tensor.ShardTensor:
        return wrap(local_tensor.detach().requires_grad_(requires_grad), spec)

    @staticmethod
    def from_local(
        local_tensor: Tensor,
        device_mesh: DeviceMesh | None = None,
        placements: Sequence[Placement] | None = None,
        sharding_shapes: str | Mapping[int, Sequence[Sequence[int]]] = "infer",
        global_shape: Sequence[int] | None = None,
    ) -> tensor.ShardTensor:
        """A ShardTensor of every rank's local tensor; differentiable.

        sharding_shapes: "infer" asks all ranks, "chunk" takes torch.chunk's parts of
        `global_shape`, else the shapes of all shards along each axis of the mesh. Raises ValueError
        where these do not fit.
        """
        if device_mesh is None:
            raise ValueError("from_local without device_mesh: give the mesh")
        given = [Replicate()] * device_mesh.ndim if placements is None else list(placements)
        sizes: Mapping[int, Sequence[int]] | None = None
        if sharding_shapes == "infer":
            pass
        elif sharding_shapes == "chunk":
            if global_shape is None:
                raise ValueError("sharding_shapes='chunk' needs global_shape")
            sizes = {**ShardTensorSpec.of(device_mesh, given, global_shape).sizes}
        elif isinstance(sharding_shapes, Mapping):
            sizes = _sizes(sharding_shapes, given, local_tensor.ndim)
        else:
            raise ValueError(
                f"sharding_shapes is {sharding_shapes!r}: 'infer', 'chunk' or shapes by mesh axis"
            )
        return construct.from_local(local_tensor, device_mesh, given, sizes)

    @classmethod
    def patches_enabled(cls) -> bool:
        """True: rules are always on."""
        return True

    @classmethod
    def get_promotion_mode(cls) -> TensorPromotionMode:
        return TensorPromotionMode.SILENT

    @classmethod
    def set_promotion_mode(cls, mode: TensorPromotionMode) -> None:
        """Nothing. Raises UnsupportedOpError for DISABLED: plain tensors are always promoted."""
        if mode is TensorPromotionMode.DISABLED:
            raise UnsupportedOpError(
                "TensorPromotionMode.DISABLED: a plain tensor beside sharded ones always counts as "
                "replicated; leave the mode as it is"
            )

    @classmethod
    @contextmanager
    def promotion_mode(cls, mode: TensorPromotionMode) -> Iterator[None]:
        cls.set_promotion_mode(mode)
        yield

    @classmethod
    def register_function_handler(cls, func: Callable[..., Any], handler: Handler) -> None:
        """handler(func, types, args, kwargs) is what happens to calls with ShardTensors.

        It gets plain tensors of one dim or more as replicated ShardTensors. What it does to local
        tensors is recorded by autograd: it needs no backward. See `shardtensor.rule`.
        """

        @rule(func)
        def run(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = _promoted(args, kwargs)
            return handler(func, (tensor.ShardTensor,), args, kwargs)

    @classmethod
    def register_named_function_handler(cls, func_name: str, handler: Handler) -> None:
        """`register_function_handler` for a custom op by its name, "library.op.default"."""
        found: Any = torch.ops
        for part in func_name.split("."):
            found = getattr(found, part)
        cls.register_function_handler(found, handler)

    @classmethod
    def register_dispatch_handler(cls, op: Any, handler: Handler) -> None:
        """handler(*args, **kwargs) is what happens to an aten op, its function and its method."""
        packet = getattr(op, "overloadpacket", op)
        key = packet.__name__ if op.namespace == "aten" else op

        @rule(key)
        def run(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = _promoted(args, kwargs)
            return handler(*args, **kwargs)


def _sizes(
    shapes: Mapping[int, Sequence[Sequence[int]]], placements: Sequence[Placement], ndim: int
) -> dict[int, Sequence[int]]:
    """Sizes of all shards by tensor dim from their shapes by mesh axis."""
    sizes: dict[int, Sequence[int]] = {}
    for axis, p in enumerate(placements):
        if not p.is_shard():
            continue
        d = p.dim % ndim  # type: ignore[attr-defined]
        if d in sizes:
            raise ValueError(
                f"sharding_shapes for dim {d}, which two axes of the mesh shard: use 'infer'"
            )
        if axis not in shapes:
            raise ValueError(f"sharding_shapes has none for axis {axis}, which shards dim {d}")
        sizes[d] = [int(shape[d]) for shape in shapes[axis]]
    return sizes


def _promoted(args: Any, kwargs: Any) -> Any:
    """Arguments with plain tensors as replicated ShardTensors on the mesh of the others."""
    leaves = pytree.tree_leaves((args, kwargs))
    mesh = next(x.spec.mesh for x in leaves if isinstance(x, tensor.ShardTensor))

    def promote(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, tensor.ShardTensor | DTensor) or not x.ndim:
            return x
        return like(x, ShardTensorSpec.whole(mesh, x.shape))

    return pytree.tree_map(promote, (args, kwargs))


def scatter_tensor(
    tensor: Tensor | None,
    global_src: int,
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    global_shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    requires_grad: bool = False,
) -> Any:
    """A leaf ShardTensor of a tensor that one rank has; the others may give None.

    global_src: that rank's number in the world. Each rank is sent its part only. Raises ValueError
    on every rank for a source outside of the mesh or without a tensor, and for a shape or dtype
    that is not the source's.
    """
    ranks = mesh.mesh.flatten().tolist()
    if isinstance(global_src, bool) or global_src not in ranks:
        raise ValueError(f"global_src {global_src!r}: a rank of the world in {mesh}")
    source, device = ranks.index(global_src), torch.device(mesh.device_type)
    group = comm.group(mesh, tuple(range(mesh.ndim)))
    # of NumPy, for instance: all ranks are told
    tensor = tensor if isinstance(tensor, Tensor) else None
    ndim, kind, *shape = construct.facts(tensor, group, device)[source, :-1].tolist()
    if ndim < 0:
        raise ValueError(f"scatter_tensor: rank {global_src}, the source, gave no torch.Tensor")
    shape, found = shape[:ndim], construct.DTYPES[kind]
    for given, own, what in (
        (None if global_shape is None else list(global_shape), shape, "global_shape"),
        (dtype, found, "dtype"),
    ):
        if given is not None and given != own:
            raise ValueError(f"scatter_tensor: {what} {given} where the source's is {own}")
    if comm.rank(group) != source or tensor is None:
        # of one element in memory
        tensor = torch.zeros((), dtype=found, device=device).expand(shape)
    whole = construct.distribute_tensor(
        tensor.detach(), mesh, list(placements), src_data_rank=source
    )
    return whole.requires_grad_(requires_grad)


def offsets(self: tensor.ShardTensor, mesh_dim: int | None = None) -> Any:
    """Where this rank's shard begins along each axis of the mesh, or along one."""
    return self.spec.offsets(mesh_dim)  # type: ignore[attr-defined]


def spec_offsets(self: ShardTensorSpec, mesh_dim: int | None = None) -> Any:
    """Where this rank's shard begins along each axis of the mesh, or along one."""
    begins = self.offset
    found = [
        begins[p.dim] if p.is_shard() else 0  # type: ignore[attr-defined]
        for p in self.placements
    ]
    return found if mesh_dim is None else found[mesh_dim]


def sharding_shapes(self: ShardTensorSpec, mesh_dim: int | None = None) -> Any:
    """The shapes of the shards along each axis of the mesh that shards, or along one."""
    found = {}
    for axis, p in enumerate(self.placements):
        if p.is_shard():
            places = [list(self.coordinate) for _ in range(self.mesh.size(axis))]
            for i, place in enumerate(places):
                place[axis] = i
            found[axis] = tuple(self.local_shape_at(place) for place in places)
    return found if mesh_dim is None else found[mesh_dim]


tensor.ShardTensor.offsets = offsets  # type: ignore[attr-defined]
ShardTensorSpec.offsets = spec_offsets  # type: ignore[attr-defined]
ShardTensorSpec.sharding_shapes = sharding_shapes  # type: ignore[attr-defined]
