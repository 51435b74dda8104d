"""What begins a large tensor where plain ones are given: see `made`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from math import prod
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import settings
from .._torch import probe
from ..rules.fourier import modes
from ..rules.index.index import spelled
from ..spec import Dim, Spec, whole_dims
from ..tensor import ShardTensor, wrap
from ..tensor.redistribute import like

# a result that is so many times what it is made of is not what came in, in another order
TIMES = 4
# a dim of so many rows a rank is cut evenly enough
ROWS = 32


class Where(NamedTuple):
    """On which axes of which mesh tensors are made sharded, and from how many bytes on."""

    mesh: Any
    axes: tuple[int, ...]
    least: float

    @classmethod
    def of(cls, inputs: Sequence[Any], least: float) -> Where | None:
        """Where a model's inputs are sharded, but for their batch; None: nowhere."""
        for x in inputs:
            if isinstance(x, ShardTensor):
                axes = sorted(a for d in x._spec.dims[1:] for a in d.axes)
                return cls(x._spec.mesh, tuple(axes), least) if axes else None
        return None

    @property
    def ranks(self) -> int:
        return prod(self.mesh.size(a) for a in self.axes)

    def takes(self, *found: Tensor) -> bool:
        """Whether all are plain tensors where the mesh is."""
        plain = all(type(x) in PLAIN or probe.is_fake(x) for x in found)
        return plain and all(x.device.type == self.mesh.device_type for x in found)

    def spec(self, shape: Sequence[int], but: int | None = None) -> tuple[int, Spec] | None:
        """The largest dim, not that one, and the spec that cuts it; None where it is too small."""
        free = (d for d in range(len(shape)) if d != but)
        d = max(free, key=lambda d: shape[d], default=None)
        return None if d is None or shape[d] < self.ranks else (d, self._cut_along(shape, d))

    def cut(self, x: Tensor, d: int) -> ShardTensor:
        """This rank's rows of a plain tensor, for an op that reads them."""
        return like(x, self._cut_along(x.shape, d), read=True)

    def _cut_along(self, shape: Sequence[int], d: int) -> Spec:
        whole = Spec(self.mesh, whole_dims(shape))
        return whole.replace({d: Dim.chunked(shape[d], self.axes, self.mesh)})

    def grows(self, shape: Sequence[int], itemsize: int, *of: Tensor) -> bool:
        """Whether a result is large, and much larger than the memory of what it is made of."""
        nbytes = prod(shape) * itemsize
        return nbytes >= self.least and nbytes >= TIMES * sum(
            x.untyped_storage().nbytes() for x in of
        )

    def begins(
        self, shape: Sequence[int], itemsize: int, *of: Tensor, but: int | None = None
    ) -> tuple[int, Spec] | None:
        """`spec` where a result `grows` and the model asks for it; None: it stays plain."""
        found = self.spec(shape, but) if self.grows(shape, itemsize, *of) else None
        return None if found is None or _ours() else found


PLAIN = {Tensor, nn.Parameter}
Begin = Callable[[Where, Any, tuple[Any, ...], dict[str, Any]], Any]
# what is called -> what begins a tensor there
BEGINS: dict[Any, Begin] = {}
# what leads here from a model's call
_HERE = {__name__, f"{__package__}.made"}


def _begin(*functions: Any) -> Callable[[Begin], Begin]:
    """Register what begins a tensor where one of these functions is called on plain tensors.

    It gives a ShardTensor, or NotImplemented where the plain result is wanted.
    """

    def register(fn: Begin) -> Begin:
        BEGINS.update(dict.fromkeys(functions, fn))
        return fn

    return register


def _ours() -> bool:
    """Whether the library, not the model, calls the function: its local programs are plain."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name != "_call_impl":
        name = frame.f_globals.get("__name__", "")
        if name.startswith("shardtensor.") and name not in _HERE:
            # a checkpoint calls a function of the model again, within backward; not a reentrant one
            names = {f.f_code.co_name for f in (frame, frame.f_back) if f is not None}
            return name != settings.__name__ or not names.isdisjoint(("forward", "backward"))
        frame = frame.f_back
    return False


# of sizes ----------------------------------------------------------------------------------------

# not empty ones: these are filled with random numbers, or become parameters
_SIZED = (torch.zeros, torch.ones, torch.full)
_NEW = (Tensor.new_zeros, Tensor.new_ones, Tensor.new_full)
_KNOWN = {"size", "dtype", "device", "fill_value"}


@_begin(*_SIZED, *_NEW)
def _blank(where: Where, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Zeros and other numbers; zeros wait for what is written to them."""
    new = func in _NEW
    if any(v and k not in _KNOWN for k, v in kwargs.items()) or (new and not where.takes(args[0])):
        return NotImplemented
    like = args[0].device if new else torch.get_default_device()
    device = torch.device(kwargs.get("device") or like)
    # torch raises here what it has to say of the arguments
    facts = func(*args, **{**kwargs, "device": "meta"})
    found = where.begins(facts.shape, facts.itemsize)
    if found is None or device.type != where.mesh.device_type:
        return NotImplemented
    _, spec = found
    if device.index is None:
        device = torch.empty(0, device=device).device
    if func in (torch.zeros, Tensor.new_zeros):
        return modes.zeros(spec, facts.dtype, device)
    fill = kwargs.get("fill_value", [1, *args][-1]) if "full" in func.__name__ else 1
    local = torch.full(spec.local_shape, fill, dtype=facts.dtype, device=device)
    return wrap(local, spec)


# of indices --------------------------------------------------------------------------------------


def _rows(
    where: Where, x: Tensor, index: Tensor, shape: Callable[[], Any], least: int, most: int
) -> ShardTensor | None:
    """An index, cut along its rows if there are many, if what it takes of x is large.

    Of each pair of tokens the rows are those that ask, along which attention is cut.
    least, most: what is in it; of others torch raises, on all ranks.
    """
    # the most there may be
    if not where.takes(x, index) or index.numel() * x.nbytes < where.least:
        return None
    found = where.spec(index.shape)
    if found is None or index.dtype not in (torch.int64, torch.int32):
        return None
    if not where.grows(shape(), x.itemsize, x) or _ours():
        return None
    # as far as it is known without waiting for a device
    if index.device.type == "cpu" and not probe.is_fake(index):
        low, high = torch.aminmax(index)
        if low < least or high > most:
            return None
    many = index.shape[0] >= ROWS * where.ranks
    return where.cut(index, 0 if many else found[0])


@_begin(Tensor.__getitem__)
def _at(where: Where, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, index = args
    given = index if type(index) is tuple else (index,)
    if not any(isinstance(e, Tensor) and e.ndim for e in given):
        return NotImplemented
    entries = spelled(index, x.ndim) or []
    at = [i for i, e in enumerate(entries) if isinstance(e, Tensor)]
    if len(at) != 1:
        return NotImplemented
    (i,) = at
    n = x.shape[sum(e is not None for e in entries[:i])]

    def shape() -> Any:
        meta = tuple(e.to("meta") if isinstance(e, Tensor) else e for e in entries)
        return x.detach().to("meta")[meta].shape

    rows = _rows(where, x, entries[i], shape, -n, n - 1)
    return NotImplemented if rows is None else x[(*entries[:i], rows, *entries[i + 1 :])]


@_begin(torch.index_select, Tensor.index_select)
def _select(where: Where, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    known = not kwargs and len(args) == 3 and isinstance(args[2], Tensor)
    if not known or not args[0].ndim or args[2].ndim > 1:
        return NotImplemented
    x, dim, index = args
    per = x.numel() // max(1, x.shape[dim])
    rows = _rows(where, x, index, lambda: (index.numel(), per), 0, x.shape[dim] - 1)
    return NotImplemented if rows is None else func(x, dim, rows)


@_begin(F.embedding)
def _embedding(where: Where, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) < 2 or not all(isinstance(a, Tensor) for a in args[:2]):
        return NotImplemented
    index, weight, *rest = args
    need_all = (*rest[3:], kwargs.get("scale_grad_by_freq"), kwargs.get("sparse"))
    if any(need_all) or weight.ndim != 2:
        return NotImplemented
    n, width = weight.shape
    rows = _rows(where, weight, index, lambda: (index.numel(), width), 0, n - 1)
    return NotImplemented if rows is None else func(rows, weight, *rest, **kwargs)


# of a few numbers, many times ---------------------------------------------------------------------


def _again(where: Where, x: Any, shape: Sequence[int], d: int, source: Any) -> Any:
    """Rows source(i) of x along d as rows i, cut; NotImplemented where these are not large."""
    large = shape[d] >= where.ranks and where.takes(x) and where.grows(shape, x.itemsize, x)
    if not large or _ours():
        return NotImplemented
    return x.index_select(d, where.cut(source(torch.arange(shape[d], device=x.device)), 0))


@_begin(Tensor.repeat)
def _repeat(where: Where, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, *given = args
    times = modes.many(given[0], tuple(given[1:])) if given else ()
    if kwargs or len(times) < x.ndim or not all(isinstance(t, int) for t in times):
        return NotImplemented
    wide = (*[1] * (len(times) - x.ndim), *x.shape)
    shape = [n * t for n, t in zip(wide, times, strict=True)]
    found = where.spec(shape) if prod(shape) * x.itemsize >= where.least else None
    if found is None:
        return NotImplemented
    d, _ = found
    rows = _again(where, x.expand(wide), shape, d, lambda at: at % wide[d])
    rest = [1 if i == d else t for i, t in enumerate(times)]
    return NotImplemented if rows is NotImplemented else rows.repeat(rest)


@_begin(torch.repeat_interleave, Tensor.repeat_interleave)
def _interleave(where: Where, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not args:
        return NotImplemented
    x, *rest = args
    times: Any = rest[0] if rest else kwargs.get("repeats")
    dim: Any = rest[1] if len(rest) > 1 else kwargs.get("dim")
    known = isinstance(times, int) and isinstance(dim, int) and not kwargs.get("output_size")
    if not known or not -x.ndim <= dim < x.ndim:
        return NotImplemented
    d = dim % x.ndim
    shape = [n * times if i == d else n for i, n in enumerate(x.shape)]
    return _again(where, x, shape, d, lambda at: at // times)


@_begin(Tensor.contiguous, Tensor.clone, torch.clone)
def _dense(where: Where, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An expanded tensor that is made dense."""
    if kwargs or len(args) != 1 or not where.takes(*args):
        return NotImplemented
    return _cut(where, args, lambda found: func(*found), args[0].shape)


@_begin(torch.stack, torch.cat)
def _joined(where: Where, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Coordinates of each pair, of which each was expanded."""
    given, dim = args[0] if args else (), args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if len(args) > 2 or kwargs.keys() - {"dim"} or not isinstance(given, list | tuple):
        return NotImplemented
    # torch.cat passes over parts of shape (0,)
    alike = bool(given) and where.takes(*given) and len({x.ndim for x in given}) == 1
    if not alike or sum(x.nbytes for x in given) < where.least:
        return NotImplemented
    shape = func([x.detach().to("meta") for x in given], dim).shape
    dim %= len(shape)
    found = where.begins(shape, given[0].itemsize, *given, but=dim)
    if found is None:
        return NotImplemented
    at = found[0] - (func is torch.stack and found[0] > dim)
    return func([where.cut(x, at) for x in given], dim)


_BINARY = (
    "add", "sub", "mul", "div", "true_divide", "eq", "ne", "lt", "le", "gt", "ge", "maximum",
    "minimum", "logical_and", "logical_or", "bitwise_and", "bitwise_or", "pow", "where",
)  # fmt: skip
_OPERATORS = (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "eq", "ne", "lt", "le", "gt", "ge",
    "and", "or",
)  # fmt: skip
_FOUND = (
    *(getattr(torch, n) for n in _BINARY if hasattr(torch, n)),
    *(getattr(Tensor, n) for n in _BINARY if hasattr(Tensor, n)),
    *(getattr(Tensor, f"__{n}__") for n in _OPERATORS),
)


@_begin(*_FOUND)
def _wide(where: Where, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each pair of two operands: differences of positions, masks of labels."""
    given = [a for a in args if isinstance(a, Tensor)]
    if kwargs or len(given) < 2 or not where.takes(*given):
        return NotImplemented
    # the most there may be
    if 8 * prod(x.numel() for x in given) < where.least:
        return NotImplemented
    try:
        shape = torch.broadcast_shapes(*(x.shape for x in given))
    except RuntimeError:
        return NotImplemented

    def call(cut: Sequence[Any]) -> Any:
        left = iter(cut)
        return func(*(next(left) if isinstance(a, Tensor) else a for a in args))

    return _cut(where, given, call, shape)


def _cut(
    where: Where,
    given: Sequence[Tensor],
    call: Callable[[Sequence[Any]], Any],
    shape: Sequence[int],
) -> Any:
    """The op on operands that are cut along the result's largest dim, where they have it."""
    found = where.begins(shape, max(x.itemsize for x in given), *given)
    if found is None:
        return NotImplemented
    d, cut = found[0] - len(shape), []
    for x in given:
        has = x.ndim >= -d and x.shape[d] == shape[d]
        cut.append(where.cut(x, x.ndim + d) if has else x)
    return call(cut)


# of coordinates ----------------------------------------------------------------------------------


@_begin(F.linear)
def _linear(where: Where, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A network of coordinates, which are no weights."""
    if len(args) < 2 or not all(isinstance(a, Tensor) for a in args[:2]):
        return NotImplemented
    x, weight, *rest = args
    if x.requires_grad or isinstance(x, nn.Parameter) or not where.takes(x, weight):
        return NotImplemented
    shape = (*x.shape[:-1], weight.shape[0])
    found = where.begins(shape, x.itemsize, x, but=len(shape) - 1)
    if found is None:
        return NotImplemented
    return func(where.cut(x, found[0]), weight, *rest, **kwargs)
