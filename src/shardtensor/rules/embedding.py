"""Embedding: sharded indices look up a table that every rank has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedOpError
from ..fallback import fall_back
from ..redistribute import fit
from ..registry import rule
from ..spec import Dim, Spec
from ..tensor import ShardTensor, wrap
from .pointwise import function_rule


@function_rule("embedding_bag")
def embedding_bag(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As one op: the composite would choose a kernel without a gradient."""
    return fall_back(func, args, kwargs)


@rule("embedding")
def embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> ShardTensor:
    """Rows of weight (V, C) for each index; a sharded weight is gathered."""
    spec = indices._spec if isinstance(indices, ShardTensor) else None
    if spec is None:
        assert isinstance(weight, ShardTensor)
        spec = Spec(weight._spec.mesh, tuple(Dim(n) for n in indices.shape))
    if spec.varying and (scale_grad_by_freq or sparse):
        raise UnsupportedOpError(
            f"embedding with indices on {spec}: scale_grad_by_freq and sparse gradients need all "
            "indices on one rank; set both to False"
        )
    w, i = fit(spec.mesh, spec.varying, (weight, None), (indices, spec.dims))
    assert w is not None and i is not None
    local = torch.embedding(w, i, padding_idx, scale_grad_by_freq, sparse)
    return wrap(local, spec.with_dims([*spec.dims, Dim(weight.shape[1])]))
