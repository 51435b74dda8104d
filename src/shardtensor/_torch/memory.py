# mypy: disable-error-code="attr-defined, union-attr, assignment, misc"
"""Private torch APIs of memory: who shares it, whether it is gone."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._C import _functorch
from torch.utils._python_dispatch import _disable_current_modes


def unwrapped(x: torch.Tensor) -> torch.Tensor:
    """The numbers of a tensor that torch.func follows: no derivative goes there.

    Raises RuntimeError for one whose numbers are a batch's.
    """
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            raise RuntimeError("vmap over values that say what is sent, such as an index")
        x = _functorch.get_unwrapped(x)
    return x


def storage(x: torch.Tensor) -> torch.UntypedStorage:
    """The memory of a tensor, also of one that torch.func follows."""
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x.untyped_storage()


def dense_parts(x: torch.Tensor) -> list[torch.Tensor]:
    """The strided tensors that hold the elements of one of any layout or class."""
    flatten: Any = getattr(x, "__tensor_flatten__", None)
    if flatten is not None:
        return [y for name in flatten()[0] for y in dense_parts(getattr(x, name))]
    if x.layout is torch.strided:
        return [x]
    if x.layout is torch.sparse_coo:
        return [x._indices(), x._values()]
    if x.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [x.crow_indices(), x.col_indices(), x.values()]
    if x.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [x.ccol_indices(), x.row_indices(), x.values()]
    return []


# memory for others to read, and to write to; no derivative follows. Nobody else is asked first
lent = torch._C._to_dlpack
lent_to_write = torch._C._to_dlpack_versioned
# whether a tensor is one of zeros without memory, as tangents of forward mode are at first; no
# function of Python: where each message passes, it is asked
is_zero = torch._is_zerotensor


def storage_ref(x: torch.Tensor) -> Any:
    """A weak reference to the memory of x: `cdata` names it, `expired()` tells when it is gone."""
    from torch.multiprocessing.reductions import StorageWeakRef

    return StorageWeakRef(storage(x))


def owns_memory(x: torch.Tensor) -> bool:
    """Whether no view, numpy array or other library shares the memory of a tensor."""
    own = storage(x)
    return own.resizable() and torch._C._storage_Use_Count(own._cdata) <= _uses_alone()


@functools.cache
def _uses_alone() -> int:
    with _disable_current_modes():
        own = torch.zeros(1).untyped_storage()
    # the tensor is gone: one less than when it holds the storage
    return torch._C._storage_Use_Count(own._cdata) + 1


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same numbers in memory."""
    return (
        storage(a)._cdata == storage(b)._cdata
        and a.dtype is b.dtype
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.storage_offset() == b.storage_offset()
    )


def storage_of(ref: Any) -> torch.UntypedStorage | None:
    """The memory that `storage_ref` refers to, unless it is gone."""
    found: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
    return found


def swap_memory(a: torch.UntypedStorage, b: torch.UntypedStorage) -> None:
    """Let each of two have the other's memory, for all tensors that see it."""
    a._swap_data_ptr_(b)
