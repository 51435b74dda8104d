"""Copies that stand in for views: writing to one must not silently miss its base.

Where torch gives a view, a rule that had to communicate gives a copy. The copy's storage
remembers the storage that it stands for; views of the copy share it. Writing in place is refused
while that base is still alive, since single-device code would see the write there. A row taken
from a sharded dim, `x[:, i]`, is written back to its owner instead.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from . import _torch
from .errors import UnsupportedOpError
from .registry import Handler
from .tensor import ShardTensor


def stands_for_view(copy: Tensor, base: Tensor, op: str) -> Tensor:
    """Mark the local tensor `copy` as what torch's `op` would give as a view of `base`."""
    storage = copy.untyped_storage()
    # not by address, which traced tensors have not
    if storage._cdata != base.untyped_storage()._cdata:
        storage._shardtensor_base = (op, StorageWeakRef(base.untyped_storage()))  # type: ignore[attr-defined]
    return copy


def check_writable(x: ShardTensor, op: str) -> None:
    """Raise UnsupportedOpError if an in-place op on x could not reach the tensor it is a view of.

    Also for partial sums, whose addends no elementwise write may change.
    """
    if x._spec.partial:
        raise UnsupportedOpError(f"{op} on {x._spec}: redistribute to Replicate or Shard first")
    made_by, base = getattr(x._local.untyped_storage(), "_shardtensor_base", ("", None))
    writing = getattr(_current, "storage", None) == x._local.untyped_storage()._cdata
    if base is not None and not base.expired() and not writing:
        raise UnsupportedOpError(
            f"{op} in place on the result of {made_by}, which torch gives as a view, "
            f"but which was moved between ranks here ({x._spec}): call .clone() first, "
            "or use the op that returns a new tensor"
        )


# rows that are written back -----------------------------------------------------------------------

_current = threading.local()


class _Row:
    """What the storage of a copied row remembers: whose row it is and how to write it back."""

    def __init__(self, rows: Tensor, base: Tensor, write: Callable[[Tensor, Tensor], None]) -> None:
        # weak: the storage must not keep alive a graph that may hold the storage; the root, since
        # base may be a passing view
        root = base if base._base is None else base._base
        self.root = weakref.ref(root)
        self.view = None if root is base else (base.shape, base.stride(), base.storage_offset())
        self.version = base._version
        self.write = write
        self.shape, self.stride = rows.shape, rows.stride()

    def base(self) -> Tensor | None:
        """The local tensor that the row belongs to, None if it is gone."""
        root = self.root()
        return root if root is None or self.view is None else root.as_strided(*self.view)

    def whole(self, local: Tensor) -> Tensor | None:
        """The row of which local is a view, None if no gradient flows between the two."""
        root = local._base if local._base is not None else local
        same = root.untyped_storage()._cdata == local.untyped_storage()._cdata
        return root if same and root.shape == self.shape else None


def stands_for_row(
    rows: Tensor, base: Tensor, op: str, write: Callable[[Tensor, Tensor], None]
) -> None:
    """Mark the local tensor `rows` as what torch's `op` would give as a view of `base`.

    write(base, rows) puts changed rows back.
    """
    stands_for_view(rows, base, op)
    if not (_torch.is_tracing() or base.is_inference()):
        rows.untyped_storage()._shardtensor_row = _Row(rows, base, write)  # type: ignore[attr-defined]


def following(handler: Handler) -> Handler:
    """The handler of an in-place op that also writes back the row that its target was copied from.

    Raises UnsupportedOpError where the tensor was written to since, so that the copy is stale.
    """

    def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args or not isinstance(args[0], ShardTensor):
            # no name for args[0] here: `adopt` counts references to it
            return handler(func, args, kwargs)
        x = args[0]
        storage = x._local.untyped_storage()
        row = getattr(storage, "_shardtensor_row", None)
        base = None if row is None else row.base()
        if row is None or base is None or getattr(_current, "storage", None) == storage._cdata:
            return handler(func, args, kwargs)
        _, outer = getattr(base.untyped_storage(), "_shardtensor_base", ("", None))
        if outer is not None and not outer.expired():
            # the row of a copy: refused by the handler
            return handler(func, args, kwargs)
        if base._version != row.version:
            raise UnsupportedOpError(
                f"{getattr(func, '__name__', func)} in place on a row that was copied from another "
                f"rank ({x._spec}), after the tensor that it is a row of was written to: take the "
                "row anew"
            )
        before, _current.storage = getattr(_current, "storage", None), storage._cdata
        try:
            out = handler(func, args, kwargs)
        finally:
            _current.storage = before
        rows = row.whole(x._local)
        if rows is not None:
            row.write(base, rows)
        else:
            alias = x._local.detach().as_strided(row.shape, row.stride, 0)
            row.write(base.detach(), alias)
        row.version = base._version
        return out

    return run
