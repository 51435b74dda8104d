"""NaN, infinities, minus zero and tiny numbers in operands and cotangents of any op.

What is NaN or infinite on one device is that here, at the same places and with the same sign, and nothing
else is: PyTorch's operator database, and the cases of every rule. Of gradients beside infinities only the
places are held: whether infinity times zero or minus infinity was met on the way is a formula's own.
"""

from __future__ import annotations

import copy
import math
import random
import re
from typing import Any

import torch
from cases import CASES
from placing import Placed, placed
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from campaigns import operands

COST = 2
NAN, INFINITE = (math.nan,), (math.nan, math.inf, -math.inf)
KINDS = (NAN, NAN, NAN, (math.inf,), (-math.inf,), INFINITE, (-0.0, 0.0), (1e-310, 1e-200, -0.0))
# of complex numbers a product by one has other NaNs already
WIDE = (torch.float64, torch.float32)
# what torch itself gives there depends on where a number lies, or is undefined
OPEN = re.compile("(?<![a-z])({})(?![a-z])".format("|".join((
    # on LAPACK
    "linalg", "solve", "lstsq", "lu", "lu_solve", "svd", "qr", "eig", "cholesky", "inverse", "det", "pca",
    "pinverse", "nuc", "geqrf", "ormqr", "matrix_exp", "logdet", "slogdet",
    # on the order of equals, or what is searched is in no order
    "order", "quantile", "nanquantile", "median", "nanmedian", "sort", "argsort", "msort", "topk", "kthvalue",
    "mode", "searchsorted", "unique", "bucketize",
    # on whether a kernel takes numbers alone or several at once
    "hardtanh", "hardshrink", "hardswish", "relu6", "pdist", "cdist", "var_mean", "std_mean",
    # on which scores that are hidden share a tile with others
    "attention", "scaled_dot_product_attention", "multi_head_attention_forward",
    # on whether dims of one size are skipped; on the order of sums, where weights have both signs
    "antialias", "antialiased", "bicubic",
    # not torch, but this: of windows of -inf at the border the gradient goes to padding
    "max_pool", "pool: max", "pool lines",
))))  # fmt: skip
# operands of coordinates, which are to be numbers
PLACES = ("grid_sample", "grid_sampler")


def draw(rng: random.Random) -> Any:
    """A sample of the database or a case of a rule, some of its numbers extreme."""
    return _sample(rng) if rng.random() < 0.5 else _rule(rng)


def _is_open(name: str) -> bool:
    return OPEN.search(name) is not None


def scattered(rng: random.Random, x: Tensor, kind: tuple[float, ...]) -> Tensor:
    """x with such numbers at some places: single ones, some of a row, or all of it."""
    g = torch.Generator().manual_seed(rng.randrange(1 << 30))
    at = torch.rand(x.shape, generator=g) < rng.choice((0.1, 0.1, 0.4, 1.0))
    if x.numel() and x.ndim and rng.random() < 0.3:
        row, d = torch.zeros_like(at), rng.randrange(x.ndim)
        row.select(d, rng.randrange(x.shape[d])).fill_(True)
        at &= row
    which = torch.randint(len(kind), x.shape, generator=g)
    new = torch.tensor(kind, dtype=torch.float64)[which].to(x.dtype)
    return torch.where(at, new, x.detach()).requires_grad_(x.requires_grad)


def _spoilt(rng: random.Random, name: str, leaves: list[Any], kind: tuple[float, ...]) -> list[Any]:
    wide = [i for i, x in enumerate(leaves) if _has_extremes(x)]
    wide = wide[:1] if any(word in name for word in PLACES) else wide
    chosen = wide if rng.random() < 0.2 else [rng.choice(wide)] if wide else []
    return [scattered(rng, x, kind) if i in chosen else x for i, x in enumerate(leaves)]


def _has_extremes(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout is torch.strided and x.dtype in WIDE


def _weighted(out: Any, kind: tuple[float, ...] | None) -> Any:
    """The results, and what gives them cotangents that are extreme in places."""
    if kind is None:
        return out
    more: list[Tensor] = []
    for o in pytree.tree_leaves(out, is_leaf=_is_leaf):
        if isinstance(o, Tensor) and o.requires_grad:
            g = torch.Generator().manual_seed(len(more))
            w = torch.rand(o.shape, generator=g, dtype=torch.float64) + 0.5
            at = torch.rand(o.shape, generator=g) < 0.15
            which = torch.randint(len(kind), o.shape, generator=g)
            w = torch.where(at, torch.tensor(kind, dtype=w.dtype)[which], w)
            more.append(o * w.to(o.dtype))
    return out, more


def _is_leaf(x: Any) -> bool:
    return isinstance(x, Tensor)


def _places(kinds: tuple[Any, ...], grads: Any) -> Any:
    """Gradients; NaN wherever they are not finite, if an infinity was among the numbers."""
    if all(k in (None, NAN) for k in kinds):
        return grads

    def told(x: Any) -> Any:
        wide = isinstance(x, Tensor) and x.is_floating_point()
        return torch.where(x.isfinite(), x, math.nan) if wide else x

    return pytree.tree_map(told, grads, is_leaf=_is_leaf)


def _sample(rng: random.Random) -> _Sample:
    while _is_open((found := _Sample(rng)).op.full_name):
        pass
    return found


class _Sample(operands.Case):
    """One sample of an op of the database."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        if self.way in ("second", "mistake"):
            self.way = "value"
        self.kinds = rng.choice(KINDS), rng.choice(KINDS[:6]) if rng.random() < 0.3 else None
        self.leaves = _spoilt(rng, self.op.name, self.leaves, self.kinds[0])
        defined = self.defined
        self.defined = lambda out: _weighted(defined(out), self.kinds[1])

    def _run(self, make: Any) -> Any:
        out, flags, *grads = super()._run(make)
        return out, flags, _places(self.kinds, grads)

    def __repr__(self) -> str:
        return f"{self.kinds} in {super().__repr__()}"


class _Rule(Placed):
    """A case of a rule."""

    kinds: tuple[Any, ...] = ()

    def _run(self, leaves: list[Tensor], given: list[Tensor]) -> Any:
        out, grads, rest = super()._run(leaves, given)
        return out, _places(self.kinds, grads), rest


def _rule(rng: random.Random) -> Placed:
    """A case of a rule, its operands anywhere."""
    case = rng.choice([c for name, c in CASES.items() if not _is_open(name)])
    kinds = rng.choice(KINDS), rng.choice(KINDS[:6]) if rng.random() < 0.3 else None
    grad, kwargs = case.how.get("grad", True), case.how.get("kwargs") or {}

    def fn(*args: Tensor) -> Any:
        op = copy.deepcopy(case.fn) if isinstance(case.fn, nn.Module) else case.fn
        return _weighted(op(*args, **kwargs), kinds[1])

    tensors = [x.detach().clone() for x in case.operands]
    tensors = [
        x.requires_grad_(grad and (x.is_floating_point() or x.is_complex())) for x in tensors
    ]
    tensors = _spoilt(rng, case.op, tensors, kinds[0])
    found = placed(rng, f"{kinds} in {case.op}: {case.name}", fn, tensors)
    made = _Rule(found.name, found.mesh, fn, found.tensors, found.places)
    made.kinds = kinds
    return made
