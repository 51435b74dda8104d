"""Copies that stand in for views: writing to one must not silently miss its base.

Where torch gives a view, a rule that had to communicate gives a copy. The copy's storage
remembers the storage that it stands for; views of the copy share it. Writing in place is refused
while that base is still alive, since single-device code would see the write there.
"""

from __future__ import annotations

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .errors import UnsupportedOpError
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
    if base is not None and not base.expired():
        raise UnsupportedOpError(
            f"{op} in place on the result of {made_by}, which torch gives as a view, "
            f"but which was moved between ranks here ({x._spec}): call .clone() first, "
            "or use the op that returns a new tensor"
        )
