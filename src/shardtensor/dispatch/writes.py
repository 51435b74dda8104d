"""Writes: what else must learn of them, and what they must find.

A copy that stands for a view (see `aliases`) and was gathered from its base is written back to it:
every rank has the rows of its own. Any other write makes the rest of the family stale. Partial sums
are added up where they stand before they are written to.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..errors import UnsupportedOpError
from ..registry import Handler
from ..tensor import ShardTensor, layout
from ..tensor.aliases import Part, Piece, family_of, forget_dead, refuse_stale, relate
from ..tensor.redistribute import reduced
from .results import lose_result

# of an expanded tensor torch writes these all the same, and warns, or copies rows on themselves
_ONLY_WARN = ("copy_", "index_fill_", "index_put_", "masked_fill_")


def stands_for_view(copy: Tensor, base: Tensor, op: str) -> Tensor:
    """Mark the local tensor `copy` as what torch's `op` would give as a view of `base`."""
    relate(copy, base, op)
    return copy


def check_readable(args: Any, kwargs: dict[str, Any]) -> None:
    """Raise UnsupportedOpError for an operand whose memory is stale (see `aliases`)."""
    forget_dead()
    _check(args)
    _check(kwargs.values())


def _check(values: Any) -> None:
    for x in values:
        if isinstance(x, ShardTensor):
            refuse_stale(x._local)
        elif isinstance(x, list | tuple):
            _check(x)


def check_writable(x: ShardTensor, op: str) -> None:
    """Raise UnsupportedOpError for partial sums, whose addends no elementwise write may change."""
    if x._spec.partial:
        raise UnsupportedOpError(f"{op} on {x._spec}: redistribute to Replicate or Shard first")


def _settle(x: ShardTensor, op: str) -> None:
    """Add up the partial sums of a tensor that is about to be written to, where it stands."""
    if x._local.is_leaf and x._local.requires_grad:
        if not torch.is_grad_enabled():
            raise UnsupportedOpError(
                f"{op} of a leaf on {x._spec}: redistribute to Replicate or Shard before it "
                "requires a gradient"
            )
        raise RuntimeError(
            "a leaf Variable that requires grad is being used in an in-place operation."
        )
    # the sum keeps its history where torch is told not to record the write
    with torch.set_grad_enabled(torch.is_grad_enabled() or x._local.requires_grad):
        whole = reduced(x)
        # torch lets nobody write to one of several results of a Function
        local = whole._local.clone() if whole._local.requires_grad else whole._local
    relate(local, x._local)
    lose_result(x)
    x._local, x._spec = local, whole._spec


# copies that are written back ---------------------------------------------------------------------

_current = threading.local()


class _Back:
    """How a gathered copy is written back to its base."""

    def __init__(
        self, rows: Tensor, of: ShardTensor, write: Callable[[Tensor, Tensor], None]
    ) -> None:
        base = of._local
        # of the base, or of what that is written back to
        self.overlaps = _overlaps(of, _torch.storage(of._local))
        # weak: the storage must not keep alive a graph that may hold the storage; the root, since
        # base may be a passing view
        root = base if base._base is None else base._base
        self.root = weakref.ref(root)
        self.view = _geometry(base)
        self.write = write
        self.geometry = _geometry(rows)
        self.rows = weakref.ref(rows if rows._base is None else rows._base)

    def base(self) -> Tensor | None:
        """The local tensor that the rows belong to, None if it is gone."""
        root = self.root()
        # which may have been turned in place
        return None if root is None else _seen_so(root, self.view)

    def run(self, local: Tensor, base: Tensor) -> None:
        """Write the rows of which local is a view to base; differentiably where autograd saw it."""
        root = local._base if local._base is not None else local
        same = _torch.storage(root)._cdata == _torch.storage(local)._cdata
        if same and root.requires_grad:
            self.write(base, _seen_so(root, self.geometry))
        else:
            hidden = self._is_hidden(local)
            self.write(
                base.data if hidden else base.detach(), _seen_so(local.detach(), self.geometry)
            )

    def _is_hidden(self, local: Tensor) -> bool:
        """Whether local is `.data`, of whose writes autograd does not learn."""
        rows = self.rows()
        if rows is None or local.is_inference():
            return False
        before = rows._version
        torch.autograd.graph.increment_version(local)
        return rows._version == before


# shape, strides, offset, dtype, whether it is conjugated lazily
Geometry = tuple[tuple[int, ...], tuple[int, ...], int, torch.dtype, bool]


def _geometry(x: Tensor) -> Geometry:
    return tuple(x.shape), x.stride(), int(x.storage_offset()), x.dtype, x.is_conj()


def _seen_so(x: Tensor, geometry: Geometry) -> Tensor:
    """The memory of x as a tensor of another geometry; differentiable, of complex numbers too."""
    if _geometry(x) == geometry:
        return x
    shape, stride, offset, dtype, conj = geometry
    if x.dtype is dtype:
        y = x.as_strided(shape, stride, offset)
        return y if y.is_conj() == conj else y.conj()
    if x.is_conj():
        x = x.conj()
    if x.is_complex() and dtype is x.dtype.to_real():
        return layout.real_view(x).as_strided(shape, stride, offset)
    if dtype.is_complex and dtype.to_real() is x.dtype:
        parts = x.as_strided((*shape, 2), (*(2 * s for s in stride), 1), 2 * offset)
        y = torch.view_as_complex(parts)
        return y.conj() if conj else y
    most = max(dtype.itemsize, x.dtype.itemsize)
    items = _torch.storage(x).nbytes() // most * (most // x.dtype.itemsize)
    return x.as_strided((items,), (1,), 0).view(dtype).as_strided(shape, stride, offset)


def part_of(x: ShardTensor, ranges: dict[int, tuple[int, int]]) -> Part:
    """Some rows of some dims of x, whatever the order of its dims."""
    shape, stride, offset = x._local.shape, x._local.stride(), x._local.storage_offset()
    dims = list(zip(x._spec.dims, stride, shape, strict=True))
    order = sorted(range(len(dims)), key=dims.__getitem__)
    # along an expanded dim all rows are the same memory
    rows = {i: ranges[d] for i, d in enumerate(order) if d in ranges and stride[d]}
    return (tuple(dims[d] for d in order), offset), rows


def slice_of(x: ShardTensor, part: dict[int, tuple[tuple[int, int], int]]) -> tuple[Any, ...]:
    """What some rows of x are rows of: (tensor, its spec, {dim: ((start, stop), step)}).

    part: which rows of x. The tensor is None where it has no name.
    """
    if x._slice is None:
        return x, x._spec, part
    root, spec, ranges = x._slice
    ranges = dict(ranges)
    for d, ((start, stop), step) in part.items():
        (first, _), by = ranges.get(d, ((0, 0), 1))
        ranges[d] = ((first + start * by, first + stop * by), step * by)
    return root, spec, ranges


def _apart(x: ShardTensor, other: ShardTensor) -> bool | None:
    """Whether two slices of a tensor share no element; False if all, None if some or not known."""
    if x._slice is None or other._slice is None:
        return None
    (root, spec, a), (other_root, other_spec, b) = x._slice, other._slice
    if root is None or root is not other_root or not spec == other_spec == root._spec:
        return None
    if layout.overlaps(root):
        return None
    if a == b:
        return False
    for d in a.keys() & b:
        ((start, stop), step), ((begin, end), by) = a[d], b[d]
        if stop <= begin or end <= start or (step == by and (start - begin) % step):
            return True
    return None


def stands_for_rows(
    rows: Tensor,
    base: ShardTensor,
    op: str,
    write: Callable[[Tensor, Tensor], None],
    ranges: dict[int, tuple[int, int]] | None = None,
) -> Piece | None:
    """Mark the local tensor `rows`, whole on every rank, as a view of `base` by torch's `op`.

    write(local base, rows) puts changed rows back. ranges: which rows of base they are.
    """
    piece = relate(rows, base._local, op)
    if piece is None:
        return None
    piece.part = None if ranges is None else part_of(base, ranges)
    if not (_torch.is_tracing() or base._local.is_inference()):
        back = _Back(rows, base, write)
        _torch.storage(rows)._shardtensor_back = back  # type: ignore[attr-defined]
    return piece


def writing(handler: Handler, name: str, into_others: Handler) -> Handler:
    """The handler of an in-place op after which no other place of the target's memory is taken for
    current; a gathered copy is written back. into_others: of targets that are no ShardTensors."""

    def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Write, after checks of x and its aliases; then its family learns of it."""
        if not args or not isinstance(args[0], ShardTensor):
            # no name for args[0] here: `adopt` counts references to it
            return into_others(func, args, kwargs)
        x = args[0]
        if x._spec.partial:
            _settle(x, name)
        memory = _torch.storage(x._local)
        family, cdata = getattr(memory, "_shardtensor_family", None), memory._cdata
        inside = family is None or getattr(_current, "storage", None) == cdata
        piece = None if inside or family is None else family.pieces.get(cdata)
        if family is not None and not inside:
            family.refuse_arrays(name)
        if piece is not None:
            piece.refuse_leaf(_wants_gradient(args) or _wants_gradient(kwargs.values()))
        if name not in ("setitem", "fill_", "zero_"):
            # which writes to a part of x in turn
            _check_overlap(x, memory, (*args[1:], *kwargs.values()), name)
        # who may take over the memory counts references to it
        del memory
        before = getattr(_current, "storage", None)
        try:
            if inside or family is None:
                return handler(func, args, kwargs)
            _current.storage = cdata
            out = handler(func, args, kwargs)
        except RuntimeError as e:
            _refuse_view(e, func, x)
            raise
        finally:
            _current.storage = before
        family.wrote(_written_back(x._local), name, _touched(piece, x, name, args))
        return out

    return run


# several views of one op, and what a user's Function gives: torch refuses writes to them, too
_TORCHS = ("Unbind", "Split", "Unsafe", "_Pass", "_Continue")


def _refuse_view(error: RuntimeError, func: Any, x: ShardTensor) -> None:
    """Raise UnsupportedOpError where autograd cannot follow a write here, which torch refused."""
    mine = "is a view and is being modified inplace" in str(error)
    if mine and not type(x._local.grad_fn).__name__.startswith(_TORCHS):
        raise UnsupportedOpError(
            f"{func.__name__} on {x._spec}, a result that is a view of what was sent between "
            "ranks: .clone() it first"
        ) from error


# ops whose gradients need no operand
_LINEAR = {"add_", "sub_", "copy_"}


def reshaped_in_place(x: ShardTensor, op: str) -> None:
    """Let the family of x learn of a view in place, which torch counts as a write."""
    family = family_of(x._local)
    if family is None:
        return
    tracked = torch.is_grad_enabled() and x.requires_grad
    current = _written_back(x._local) if tracked else {_torch.storage(x._local)._cdata}
    family.reshaped(current, op, tracked)


def _overlaps(x: ShardTensor, memory: torch.UntypedStorage) -> bool:
    """Whether elements of x, or of what its memory is written back to, share memory."""
    back: _Back | None = getattr(memory, "_shardtensor_back", None)
    return layout.overlaps(x) or (back is not None and back.overlaps)


def refuse_overlap(x: ShardTensor, name: str) -> None:
    """Raise UnsupportedOpError for a write to a tensor whose elements share memory."""
    if x.numel() and _overlaps(x, _torch.storage(x._local)):
        raise UnsupportedOpError(
            f"{name} on {x._spec}, whose elements share memory (unfold, expand): write to the "
            "tensor that it is a view of, or to a .clone()"
        )


def _check_overlap(x: ShardTensor, memory: torch.UntypedStorage, others: Any, name: str) -> None:
    """Raise where elements of x share memory, as torch does, or may with those of an operand.

    By specs and by strides of dims that are whole on each rank: an empty shard raises as well.
    """
    if _overlaps(x, memory):
        if layout.expanded(x) and x.numel() and name not in _ONLY_WARN:
            raise RuntimeError(
                "unsupported operation: more than one element of the written-to tensor refers to a "
                "single memory location. Please clone() the tensor before performing the operation."
            )
        refuse_overlap(x, name)
    for other in others:
        if not isinstance(other, ShardTensor):
            continue
        a, b = x._local, other._local
        if a is b or memory._cdata != _torch.storage(b)._cdata:
            continue
        if not (x.numel() and other.numel()):
            continue
        known = _apart(x, other)
        # what moves between ranks is a copy, whose version does not tell autograd of the write
        if known is False or (known and (name in _LINEAR or not _wants_gradient((x, other)))):
            continue
        # other rows of a dim that one rank has, of which the others know nothing
        lonely = any(d.is_cut and d.sizes.count(0) == len(d.sizes) - 1 for d in x._spec.dims)
        own = a.stride()
        alike = x._spec == other._spec and own == b.stride() and not lonely
        apart = int(b.storage_offset() - a.storage_offset())
        if alike and (apart == 0 or not _reached(x, own, abs(apart))):
            continue
        raise UnsupportedOpError(
            f"{name} on {x._spec} with an operand on {other._spec} that shares memory with it: "
            ".clone() the operand first"
        )


def _reached(x: ShardTensor, strides: tuple[int, ...], apart: int) -> bool:
    """Whether some rows of a whole dim lie that far apart."""
    dims = zip(x._spec.dims, strides, strict=True)
    return any(not d.axes and s and apart % s == 0 and apart // s < d.size for d, s in dims)


def _wants_gradient(values: Any) -> bool:
    return any(isinstance(v, Tensor) and v.requires_grad for v in values)


def _written_back(local: Tensor) -> set[int]:
    """Write a gathered copy back to its base, and that to its own; what is current then."""
    current = {_torch.storage(local)._cdata}
    while True:
        back: _Back | None = getattr(_torch.storage(local), "_shardtensor_back", None)
        base = None if back is None else back.base()
        if back is None or base is None:
            return current
        back.run(local, base)
        local = base
        current.add(_torch.storage(local)._cdata)


def _touched(piece: Piece | None, x: ShardTensor, name: str, args: tuple[Any, ...]) -> Part | None:
    """Which rows of the base a write changed, None if that is not known."""
    if piece is not None and piece.part is not None:
        return piece.part
    if name != "setitem":
        return None
    ranges = {}
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    for d, e in enumerate(index):
        if isinstance(e, slice):
            start, stop, step = e.indices(x.shape[d])
            if step < 1:
                break
        elif type(e) is int:
            start = e % x.shape[d]
            stop = start + 1
        else:
            break
        ranges[d] = (start, stop)
    return part_of(x, ranges)
