"""Complex vectors of a matrix, each known up to a phase: a loss that depends on it has no gradient.

Torch finds that out in backward, by values, and the matrix for which it does may lie on one rank.
So before it looks the ranks tell each other, in one small all-gather. Real vectors have signs,
which have no slope.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _torch
from ...spec import Spec
from ..agreed import agreed

# up to which slope torch takes a loss for flat, less what sums in another order may round to
_FLAT = 1e-2 * (1 - 1e-4)
_WHAT = "{0}_backward: the loss depends on the phases of complex vectors, so it has no gradient"
_OTHERS = _WHAT.format("linalg") + ", for matrices of {0} other ranks, the first of them number {1}"


def watch(found: Any, spec: Spec, varying: tuple[int, ...]) -> None:
    """Let backward of eigenvectors or singular vectors raise on all ranks or on none."""
    if not found[-1].is_complex() or not varying or _torch.is_tracing() or _torch.transforming():
        return
    node = found[-1].grad_fn
    name = "" if node is None else node.name().removesuffix("Backward0")
    if name not in _VECTORS:
        return
    rises, at = _VECTORS[name]
    # the node holds the hook, which may not hold the node
    vectors = [found[i].detach() for i in at]

    def hook(grads: Sequence[Tensor | None]) -> None:
        known = [grads[i] for i in at]
        if any(g is not None for g in known):
            agreed(
                lambda: _check(name, rises(vectors, known)), spec, varying, RuntimeError, _OTHERS
            )

    node.register_prehook(hook)


def _check(name: str, rises: Tensor) -> None:
    # of NaN it is not known, as in torch
    if not bool((rises <= _FLAT).all()):
        raise RuntimeError(_WHAT.format(name))


@torch.no_grad()
def _slopes(vectors: Tensor, g: Tensor | None, dim: int) -> Tensor:
    """Of the loss, by the phase of each of the vectors, which lie along dim."""
    return vectors.new_zeros(1).real if g is None else (vectors.conj() * g).sum(dim).imag


def _of_eig(vectors: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Tensor:
    return _slopes(vectors[0], grads[0], -2).abs()


def _of_svd(vectors: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Tensor:
    """The phases of a pair of vectors are alike; vectors beyond those have no say."""
    (u, vh), (gu, gvh) = vectors, grads
    n = min(u.shape[-2], vh.shape[-1])
    left = 2 * _slopes(u, gu, -2)[..., :n]
    right = -2 * _slopes(vh, gvh, -1)[..., :n]
    return (left + right).abs() / (1 + right.abs())


# what the slopes come to, from which results
_VECTORS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "LinalgEig": (_of_eig, (1,)), "LinalgEigh": (_of_eig, (1,)), "LinalgSvd": (_of_svd, (0, 2)),
}  # fmt: skip
