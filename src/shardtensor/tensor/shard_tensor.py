"""ShardTensor: a global view of one tensor whose shards lie on the ranks of a mesh.

A wrapper holds this rank's local tensor and a `Spec`. Torch functions on it are intercepted at
`__torch_function__`; rules turn them into local programs. Autograd records the local programs only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.distributed.device_mesh import DeviceMesh

from .. import _torch
from ..later import dt
from ..registry import handlers, methods
from ..spec import Spec
from . import layout
from .aliases import as_array, refuse_stale, stale

_COMPILE = (
    "torch.compile does not see through ShardTensors: this model runs eagerly. Use "
    "shardtensor.compile(model), or shardtensor.parallelize(model, mesh) and model.compile()"
)


def _warn(_: Any) -> None:
    warnings.warn(_COMPILE, stacklevel=2)


class ShardTensor(torch.Tensor):
    """A tensor of global shape `shape` of which this rank holds one shard, `to_local()`.

    Made by `distribute_tensor`, `ShardTensor.from_local` and by torch functions of ShardTensors.
    Attributes never communicate; `full_tensor`, `redistribute`, `item` of a sharded tensor,
    `numpy`, `tolist` and pickling do, and must be called on every rank of the mesh.
    """

    _local: Tensor
    # no __slots__: torch.utils.swap_tensors (see `dispatch.promote`) exchanges the dicts
    _spec: Spec
    # rows of which this is a part, kept as long as it
    _passed: Any
    # which rows of which tensor it is, where slices made it (see `writes.slice_of`)
    _slice: Any = None
    # the strides of the whole, where local ones need not show them
    _strides: layout.Strides | None = None
    # whether gradients of what was taken from it go past it (see `lazy`)
    _bypassed = False
    # opt_einsum (hence tensorly, hence neuraloperator) takes the first part for the array library
    __module__ = "torch.shardtensor"
    # C++ sets this on a wrapper that a Function writes to; hooks live on the local tensor
    _backward_hooks: Any = None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_dynamo_compiling():
            _torch.tell_dynamo(_warn, _COMPILE)
        if types[1:] not in ((), (Tensor,)) and methods["meet"](types):
            return NotImplemented
        try:
            return handlers[func](func, args, kwargs or {})
        except (RuntimeError, IndexError) as e:
            methods["explain"](e, func, args, kwargs)
            if isinstance(e, IndexError):
                methods["say_as_torch"](e, func, args, kwargs)
            raise
        except (LookupError, ValueError, TypeError, ArithmeticError, AttributeError) as e:
            methods["say_as_torch"](e, func, args, kwargs)
            raise

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return methods["leaf"](func, args, kwargs or {})

    # the global view ------------------------------------------------------------------------------

    @property
    def spec(self) -> Spec:
        """Mesh, placements, global shape and the sizes of all shards. Sends nothing."""
        return self._spec

    @property
    def device_mesh(self) -> DeviceMesh:
        """The mesh that the tensor lies on."""
        return self._spec.mesh

    @property
    def placements(self) -> tuple[dt.Placement, ...]:
        """Torch's placements, one for each mesh axis."""
        return self._spec.placements

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """The global shape."""
        return self._spec.shape

    @property
    def ndim(self) -> int:  # type: ignore[override]
        return len(self._spec.dims)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self._local.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._local.device

    def size(self, dim: int | None = None) -> Any:
        """The global shape, or one of its entries."""
        return self._spec.shape if dim is None else self._spec.shape[dim]

    def dim(self) -> int:
        return len(self._spec.dims)

    ndimension = dim

    def numel(self) -> int:
        return self._spec.shape.numel()

    nelement = numel

    def __len__(self) -> int:
        if not self._spec.dims:
            raise TypeError("len() of a 0-d tensor")
        return self._spec.dims[0].size

    def __iter__(self) -> Iterator[Any]:
        if not self._spec.dims:
            raise TypeError("iteration over a 0-d tensor")
        return iter(self.unbind(0))

    def stride(self, dim: int | None = None) -> Any:
        """The strides of the whole."""
        return layout.stride(self) if dim is None else layout.stride(self)[dim]

    def is_contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> bool:
        return layout.is_contiguous(self, memory_format)

    def as_subclass(self, cls: Any) -> Any:
        return methods["as_subclass"](self, cls)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        spec = self._spec
        if not spec.varying and not spec.partial:
            return f"ShardTensor({self.to_local()!r}, spec={spec})"
        return (
            f"ShardTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"spec={spec}, local_shape={tuple(spec.local_shape)})"
        )

    def _repr_html_(self) -> str:
        return self._spec._repr_html_(f"ShardTensor, {self.dtype}, {self.device}")

    # from and to local tensors --------------------------------------------------------------------

    @staticmethod
    def from_local(
        local: Tensor,
        mesh: DeviceMesh,
        placements: Sequence[dt.Placement],
        sizes: Mapping[int, Sequence[int]] | None = None,
    ) -> ShardTensor:
        """A ShardTensor of every rank's local tensor; differentiable.

        sizes: for each sharded dim the sizes of all shards, row-major over the mesh axes that shard
        it. With it nothing is communicated; without it the ranks exchange their shapes in one small
        all-gather. Raises ValueError where the shapes do not fit each other.
        """
        return methods["from_local"](local, mesh, placements, sizes)

    def to_local(self, *, grad_placements: Sequence[dt.Placement] | None = None) -> Tensor:
        """This rank's local tensor, of `spec.local_shape`; differentiable. Forward sends nothing.

        grad_placements: how its gradient lies, if not as the tensor: Partial() for each mesh axis
        along which the tensor is whole and ranks have addends of its gradient, which are summed.
        """
        if stale:
            refuse_stale(self._local)
        if torch.is_anomaly_enabled():
            methods["left"](self._local, self._spec.mesh)
        if grad_placements is None:
            return self._local
        return methods["graded"](self._local, self._spec, grad_placements)

    def full_tensor(self, *, grad_placements: Sequence[dt.Placement] | None = None) -> Tensor:
        """The whole tensor, of the global shape, as a plain one on every rank; differentiable.

        Sends an all-gather for each sharded dim and an all-reduce of addends; backward sends
        nothing but what `grad_placements` asks for, as in `to_local`.
        """
        self.to_local()
        return methods["replicate"](self).to_local(grad_placements=grad_placements)

    def redistribute(
        self,
        device_mesh: DeviceMesh | None = None,
        placements: Sequence[dt.Placement] | None = None,
        *,
        sizes: Mapping[int, Sequence[int]] | None = None,
        async_op: bool = False,
    ) -> ShardTensor:
        """The same tensor in other placements or cut to other `sizes`; differentiable.

        Raises ValueError for another mesh. Sizes default to the present ones where a dim stays
        sharded by the same axes, else to torch.chunk's. async_op: as without, waited for. What is
        sent for each dim: an all-gather to Replicate, an all-to-all to another dim, rows to their
        new ranks for other sizes; a sum for addends; nothing where all stays.
        """
        self.to_local()
        return methods["to_placements"](self, device_mesh, placements, sizes)

    def to_dtensor(self) -> Any:
        """The torch DTensor of the same shards; nothing is communicated.

        Raises UnsupportedOpError for sizes that `torch.chunk` would not give.
        """
        return methods["to_dtensor"](self)

    @staticmethod
    def from_dtensor(d: Any) -> ShardTensor:
        """The ShardTensor of a DTensor's shards, of its shape; nothing is communicated."""
        return methods["from_dtensor"](d)

    # autograd: everything lives on the local tensor ----------------------------------------------

    @property
    def requires_grad(self) -> bool:
        return self._local.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self._local.requires_grad = value

    def requires_grad_(self, requires_grad: bool = True) -> ShardTensor:
        self._local.requires_grad_(requires_grad)
        return self

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        return self._local.is_leaf

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        """The node that made this tensor; its hooks see global gradients (see `nodes`)."""
        return methods["node_of"](self)

    @property
    def grad(self) -> ShardTensor | None:
        """The gradient, sharded like the tensor itself."""
        g = self._local.grad
        if g is None:
            return None
        found: ShardTensor = methods["gradient"](g, self._spec)
        # torch lets it lie like a tensor without gaps
        if self._strides is not None and layout.is_dense(self._spec.shape, self._strides.strides):
            found._strides = self._strides
        return found

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        given = None if value is None else methods["as_gradient"](value, self._spec)
        self._local.grad = None if given is None else given._local

    @property
    def data(self) -> ShardTensor:
        return wrap(self._local.data, self._spec, self._strides)

    @data.setter
    def data(self, value: Tensor) -> None:
        methods["take_data"](self, value)

    def detach(self) -> ShardTensor:
        return wrap(self._local.detach(), self._spec, self._strides)

    def retain_grad(self) -> None:
        local = self._local
        if self._bypassed:
            methods["refuse_bypassed"](self)
        local.retain_grad()

    @property
    def retains_grad(self) -> bool:  # type: ignore[override]
        return self._local.retains_grad

    def register_hook(self, hook: Callable[[Any], Tensor | None]) -> Any:
        """Call hook with the gradient as a ShardTensor; what it returns replaces it."""
        local, spec = self._local, self._spec
        if self._bypassed:
            methods["refuse_bypassed"](self)

        def local_hook(g: Tensor | None) -> Tensor | None:
            new = hook(g if g is None else methods["gradient"](g, spec))
            return None if new is None else methods["cotangent"](new, spec)

        return local.register_hook(local_hook)

    def register_post_accumulate_grad_hook(self, hook: Callable[[Tensor], None]) -> Any:
        named = methods["named"](self)
        return self._local.register_post_accumulate_grad_hook(lambda x: hook(named(x)))

    def backward(
        self,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        if gradient is None and self.numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
        ones = gradient is None
        local = torch.ones_like(self._local) if ones else methods["cotangent"](gradient, self._spec)
        given = inputs.values() if isinstance(inputs, dict) else inputs
        given = (given,) if isinstance(given, Tensor | GradientEdge) else given
        wrt = None if given is None else [methods["engine_input"](x) for x in given]
        # local tensors all: nothing is dispatched again
        run = methods["watched"](self) if torch.is_anomaly_enabled() else torch.autograd.backward
        run(self._local, local, retain_graph, create_graph, inputs=wrt)

    # values ---------------------------------------------------------------------------------------

    def item(self) -> Any:
        """The value of a tensor of one element, the same on every rank."""
        return self.full_tensor().item()

    def tolist(self) -> Any:
        return self.full_tensor().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """The whole tensor as an array; read-only where it is not this tensor's memory."""
        whole = self.full_tensor()
        return as_array(whole, whole.numpy(force=force), self._local)

    def __array__(self, dtype: Any = None) -> Any:
        whole = self.full_tensor()
        return as_array(whole, whole.__array__(dtype), self._local)

    def __bool__(self) -> bool:
        return bool(self.full_tensor())

    def __float__(self) -> float:
        return float(self.full_tensor())

    def __int__(self) -> int:
        return int(self.full_tensor())

    def __complex__(self) -> complex:
        return complex(self.full_tensor())

    def __index__(self) -> int:
        return self.full_tensor().__index__()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.ndim == 0 else object.__format__(self, spec)

    def __copy__(self) -> ShardTensor:
        """A leaf of the same memory, as of any tensor."""
        return methods["shallow_copy"](self)

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardTensor:
        return methods["deep_copy"](self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the full value: every rank must pickle; the copy is a plain tensor."""
        return methods["pickled"](self, protocol)

    # torch.distributed.checkpoint asks a tensor for these; see `checkpoint`

    def __create_write_items__(self, fqn: str, object: Any) -> list[Any]:
        return methods["write_items"](fqn, self)

    def __create_chunk_list__(self) -> list[Any]:
        return methods["chunks"](self)

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        return self.to_local().detach()


# by place: a fifth of its time goes into names of arguments
_make, _STRIDED = _torch.make_wrapper, torch.strided


def wrap(local: Tensor, spec: Spec, strides: layout.Strides | None = None) -> ShardTensor:
    """The ShardTensor of a local tensor, whose shape must be spec.local_shape."""
    made = _make(ShardTensor, spec.shape, None, None, None, local.dtype, _STRIDED, local.device)
    made._local = local
    made._spec = spec
    if strides is not None:
        made._strides = strides
    return made
