"""Operands of which parts of one model have unlike rows, made alike by leaving some out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .. import _torch
from ..rules.pointwise import is_in_place
from ..spec import Dim
from ..tensor import ShardTensor
from ..tensor.shard_tensor import wrap

# what asks for gradients inside of a model, where those of a part's rows lack what others add; and
# who is to see gradients, which are of a part's outputs alone
_ENDS = {
    torch.autograd.grad, torch.autograd.backward, Tensor.backward, Tensor.register_hook,
    Tensor.register_post_accumulate_grad_hook, Tensor.retain_grad,
}  # fmt: skip
# by global size and mesh axes of a dim the rows that all operands have
Rows = dict[tuple[Any, ...], tuple[int, int]]


class Meeting(TorchFunctionMode):
    """Inside, operands that are cut by an axis meet in the rows that all of them have.

    A skip connection so gives the rows that came through all of the ops that it leaves out.

    axes: of how many it counts. elements: that results have here. whole: that they have in all.
    largest: bytes of the largest result in all. per: of each axis the rows of the longest dim for
    one of the shortest.
    """

    def __init__(self, axes: int) -> None:
        super().__init__()
        self.elements = self.whole = self.largest = self.bytes = 0
        self.most, self.least = [0] * axes, [0] * axes
        # of memory of which some rows met others: itself, which rows it has
        self.parted: dict[int, tuple[Any, Any]] = {}

    @property
    def per(self) -> list[int]:
        return [-(-a // b) if b else 1 for a, b in zip(self.most, self.least, strict=True)]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ENDS:
            raise ValueError(f"{func.__name__} inside of a model whose parts do not meet")
        name = getattr(func, "__name__", "")
        writes = is_in_place(func) or name == "__setitem__" or "out" in kwargs
        target = args[0] if args and writes and "out" not in kwargs else None
        if isinstance(target, ShardTensor) and self.least:
            self._check(target)
        if not writes or (isinstance(target, ShardTensor) and name != "__setitem__"):
            args, kwargs = self._met(target, args, kwargs)
        out = func(*args, **kwargs)
        if self.least:
            for y in pytree.tree_leaves(out):
                if isinstance(y, ShardTensor) and y._spec.varying:
                    self._count(y)
        return out

    def _met(self, target: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Arguments of which tensors that are cut alike but for their rows have the same rows."""
        found = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, ShardTensor)]
        if len(found) < 2 or len({x._spec.cuts for x in found}) == 1:
            return args, kwargs
        common: Rows = {}
        for x in found:
            for dim, (a, b) in zip(x._spec.dims, x._spec.spans, strict=True):
                start, stop = common.get(dim[:2], (0, dim.size))
                common[dim[:2]] = max(start, a), min(stop, b)

        def within(x: ShardTensor) -> ShardTensor:
            y = _within(x, common)
            if y is not x and self.least:
                storage = _torch.storage(x._local)
                self.parted[storage._cdata] = storage, x._spec.spans
            return y

        if isinstance(target, ShardTensor) and _within(target, common) is not target:
            # all of its rows are to be written; the op finds that others have too few
            return args, kwargs
        return pytree.tree_map_only(ShardTensor, within, (args, kwargs))

    def _check(self, target: ShardTensor) -> None:
        """Raises where some of the rows would be written: the others would stay as they are."""
        known = self.parted.get(_torch.storage(target._local)._cdata)
        if known and known[1] != target._spec.spans:
            raise ValueError("writes to some of the rows that a part has")

    def _count(self, y: ShardTensor) -> None:
        n = y.numel()
        self.elements += y._local.numel()
        self.whole += n
        self.bytes += n * y.element_size()
        self.largest = max(self.largest, n * y.element_size())
        for dim in y._spec.cuts:
            for k in dim.axes:
                self.most[k] = max(self.most[k], dim.size)
                self.least[k] = min(self.least[k] or dim.size, dim.size)


def check_nodes(outputs: Iterable[Tensor], leaves: Iterable[Tensor]) -> None:
    """Raises ValueError where gradients of outputs are not sums of what parts add, of these leaves.

    A Function of others may take those of all rows: one that is clipped, say, is no such sum. Other
    leaves, which forward closes over, have their gradients from where parts meet.
    """
    known = {id(x) for x in leaves}
    waiting: list[Any] = [y.grad_fn for y in outputs]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        made = getattr(type(node), "_forward_cls", None)
        if made is not None and not _is_own(made):
            raise ValueError(f"gradients by {made.__name__}")
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise ValueError(f"a gradient of a tensor of shape {list(leaf.shape)} of others")
        for later, _ in () if node is None else node.next_functions:
            if later is not None and later not in seen:
                seen.add(later)
                waiting.append(later)


def _is_own(made: Any) -> bool:
    """Whether a Function is a collective of the library: its own, or what torch makes of the op."""
    package = __package__.split(".")[0]
    return made.__module__.startswith(f"{package}.") or f"_{package}_" in made.__name__


def _within(x: ShardTensor, common: Rows) -> ShardTensor:
    """The rows of x that are in common; x itself if these are all."""
    local, dims = x._local, list(x._spec.dims)
    for d, (dim, (a, b)) in enumerate(zip(x._spec.dims, x._spec.spans, strict=True)):
        start, stop = common.get(dim[:2], (a, b))
        if dim.axes and (start, stop) != (a, b) and start <= stop:
            local = local.narrow(d, start - a, stop - start)
            dims[d] = Dim(dim.size, dim.axes, (start, stop - start, dim.size - stop))
    return x if local is x._local else wrap(local, x._spec.with_dims(dims))
