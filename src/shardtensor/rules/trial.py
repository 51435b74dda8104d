"""What torch says of an op: tried on a few ones, where shards without elements say nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def few(tree: Any) -> Any:
    """The tree with plain tensors of ones of two rows at most, of the same dtypes."""

    def ones(x: Any) -> Any:
        return torch.ones([min(n, 2) for n in x.shape], dtype=x.dtype) if _is_tensor(x) else x

    return pytree.tree_map(ones, tree, is_leaf=_is_tensor)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def tried(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Raise what fn raises for dtypes and numbers like these."""
    args, kwargs = few((args, kwargs))
    with torch.no_grad():
        fn(*args, **kwargs)
