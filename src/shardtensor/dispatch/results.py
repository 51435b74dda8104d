"""Results that backward needs in torch: one that is written to afterwards is torch's error.

Local programs save other tensors than torch's formulas, so autograd would not notice.
"""

from __future__ import annotations

import weakref
from typing import Any

from .. import _torch
from ..tensor import ShardTensor

# whose derivatives are written in terms of the result
_SAVED = {
    "softmax", "_softmax", "log_softmax", "_log_softmax", "logsumexp", "amax", "amin", "aminmax",
    "norm", "linalg_vector_norm", "linalg_norm", "linalg_matrix_norm", "std", "std_mean", "prod",
    "cumprod", "logcumsumexp", "dist", "pdist", "_pdist_forward", "inverse", "linalg_inv",
    "linalg_inv_ex", "cholesky", "linalg_cholesky", "linalg_cholesky_ex", "linalg_solve",
    "linalg_eigh", "linalg_svd", "linalg_qr", "frobenius_norm", "nuclear_norm",
}  # fmt: skip


def saves_result(name: str) -> bool:
    """Whether backward of an op needs its result."""
    return name in _SAVED


def keep_result(out: Any) -> None:
    """Let backward raise on every rank, as torch does, if results were written to by then."""
    if out.__class__ is ShardTensor and not out._local.requires_grad:
        return
    for x in out if isinstance(out, tuple | list) else (out,):
        node = _node(x) if isinstance(x, ShardTensor) else None
        if node is not None and not _torch.is_tracing():
            node.metadata["shardtensor"] = True
            node.register_prehook(_check(x))


def _node(x: ShardTensor) -> Any:
    """What made the local tensor, or that of which it is a view: a write leaves its node there."""
    base = x._local._base
    return x._local.grad_fn if base is None else base.grad_fn


def _check(x: ShardTensor) -> Any:
    root = x._local if x._local._base is None else x._local._base
    ref, then, shape = weakref.ref(root), root._version, list(x.shape)

    def check(_: Any) -> None:
        local = ref()
        if local is not None and local._version != then:
            raise _changed(shape, f"at version {local._version}; expected version {then} instead")

    return check


def lose_result(x: ShardTensor) -> None:
    """As `keep_result` found it changed: x gets another local tensor, to be written to."""
    node = _node(x)
    if node is not None and "shardtensor" in node.metadata:
        shape = list(x.shape)

        def fail(_: Any) -> None:
            raise _changed(shape, "partial sums that were added up and written to")

        node.register_prehook(fail)


def _changed(shape: list[int], how: str) -> RuntimeError:
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace "
        f"operation: ShardTensor {shape} is {how}"
    )
