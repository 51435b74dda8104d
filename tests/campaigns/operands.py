"""PyTorch's operator database, every tensor operand placed at random.

Shards of any dim with uneven and empty sizes, Partial, Replicate, plain and nested, on meshes of 2 to 4
ranks and of 2 x 2: values, gradients and second derivatives, `out=`, in-place variants, mistakes.
"""

from __future__ import annotations

import itertools
import os
import random
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

import shardtensor as st

# values, gradients and second derivatives of a sample
COST = 2
MESHES = [(2,), (2,), (3,), (4,), (2, 2)]
WAYS = ["value", "value", "second", "second", "second", "out", "in place", "in place", "mistake"]
DTYPES = [torch.float64] * 8 + [torch.int64, torch.complex128, torch.bool]
# half-precision complex numbers and eighths cannot be added up by torch itself
NARROW = {"chalf", "torch._scaled_mm", "torch._scaled_mm_v2"}
NO_SUMS = {torch.bool, torch.uint16, torch.uint32, torch.uint64}
# values that are random or undefined by their meaning cannot be compared
UNDEFINED = {
    "bernoulli", "cauchy", "empty", "empty_like", "empty_permuted", "empty_strided", "exponential", "geometric", "log_normal",
    "multinomial", "new_empty", "new_empty_strided", "nn.functional.alpha_dropout", "nn.functional.dropout",
    "nn.functional.dropout2d", "nn.functional.dropout3d", "nn.functional.feature_alpha_dropout",
    "nn.functional.multi_head_attention_forward", "nn.functional.rrelu", "normal", "rand_like", "randint", "randint_like",
    "randn", "randn_like", "uniform",
}  # fmt: skip


# torch's own gives something else with `out=`, or has an argument for each result
OTHER_OUT = {"fft.ihfftn", "_batch_norm_with_update"}
# torch's own resizes what it is to write to
RESIZES = {"addbmm"}
# second derivatives: the kernel of attention that torch takes on CPUs has none; that of the other moves by
# 1e-8 where its input moves by one rounding
ONCE = {"nn.functional.scaled_dot_product_attention", "pca_lowrank"}


@cache
def _ops() -> list[Any]:
    only = os.environ.get("OPS", "")
    found = [o for o in op_db if o.name not in UNDEFINED | NARROW]
    return [o for o in found if o.name in only.split(",")] if only else found


@dataclass(frozen=True)
class Place:
    """How one operand lies: placements, sizes of its shards, and what each rank adds."""

    placements: tuple[Placement, ...]
    sizes: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"{list(self.placements)}{self.sizes or ''}"


def _cut(rng: random.Random, size: int, parts: int) -> tuple[int, ...]:
    """Sizes of shards that add up, some of them empty."""
    edges = sorted(rng.randint(0, size) for _ in range(parts - 1))
    return tuple(b - a for a, b in itertools.pairwise([0, *edges, size]))


def _place(rng: random.Random, x: Tensor, mesh: tuple[int, ...], plain: bool) -> Place | None:
    """Where a tensor lies; None: it is given plain."""
    if x.layout is not torch.strided or type(x) is not Tensor:
        return None
    if plain and rng.random() < 0.25:
        return None
    placements: list[Placement] = []
    for _ in mesh:
        kind = rng.random()
        if kind < 0.6 and x.ndim:
            placements.append(Shard(rng.randrange(x.ndim)))
        elif kind < 0.8 and x.dtype not in NO_SUMS:
            placements.append(Partial())
        else:
            placements.append(Replicate())
    sizes = {}
    for d in range(x.ndim):
        parts = prod(n for n, p in zip(mesh, placements, strict=True) if p == Shard(d))
        if parts > 1:
            sizes[d] = _cut(rng, x.shape[d], parts)
    return Place(tuple(placements), sizes)


def _addend(x: Tensor, n: int, i: int) -> Tensor:
    """What rank i of n adds to make x, without a rounding."""
    if n == 1:
        return x
    finite = bool(torch.isfinite(x).all())
    weight = {0: 2 if finite else 1, n - 1: -1 if finite else 0}.get(i, 0)
    # minus zero is a sum of minus zeros
    return torch.where(x == 0, x, x * weight if weight else torch.zeros_like(x))


def _placed(x: Tensor, place: Place | None, mesh: DeviceMesh) -> Tensor:
    if place is None:
        return _copy(x)
    whole = x.detach()
    axes = [a for a, p in enumerate(place.placements) if p.is_partial()]
    at = mesh.get_coordinate()
    for axis in axes:
        whole = _addend(whole, mesh.size(axis), at[axis])
    kept = [Replicate() if p.is_partial() else p for p in place.placements]
    made = st.distribute_tensor(whole, mesh, kept, src_data_rank=None, sizes=place.sizes)
    if axes:
        made = st.ShardTensor.from_local(
            made.to_local(), mesh, place.placements, sizes=made.spec.sizes
        )
    return made.requires_grad_(x.requires_grad)


def _copy(x: Any) -> Any:
    return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def _is_leaf(x: Any) -> bool:
    return isinstance(x, Tensor)


def _total(outs: list[Any], seed: float) -> Tensor | None:
    """A number that depends on every element differently."""
    total = None
    for o in outs:
        if isinstance(o, Tensor) and o.requires_grad:
            weight = torch.linspace(seed, seed + 1, o.numel(), dtype=torch.float64)
            value = (o * weight.reshape(o.shape).to(o.dtype)).sum()
            value = value.real if value.is_complex() else value
            total = value if total is None else total + value
    return total


def way_of(rng: random.Random, op: Any, ways: list[str], otherwise: str) -> str:
    """How an op is called; otherwise: in place of "in place", of one that cannot be."""
    way = rng.choice(ways)
    if way == "out" and (not op.supports_out or op.name in OTHER_OUT):
        return "value"
    if way == "in place" and (op.get_inplace() is None or op.name in RESIZES):
        return otherwise
    return way


class Case:
    """One sample of an op, and where its operands lie."""

    atol = 1e-11

    def __init__(self, rng: random.Random) -> None:
        self.mesh = rng.choice(MESHES)
        self.op = rng.choice(_ops())
        self.way = way_of(rng, self.op, WAYS, "second")
        if self.way == "mistake" and self.op.error_inputs_func is None:
            self.way = "second"
        if self.way == "second" and self.op.name in ONCE:
            self.way = "value"
        known = self.op.supported_dtypes("cpu")
        dtypes = [d for d in DTYPES if d in known]
        self.dtype = rng.choice(dtypes) if dtypes else torch.float32
        wide = self.dtype.is_floating_point or self.dtype.is_complex
        self.grad = wide and self.op.supports_autograd and self.way != "out"
        sample = self._sample(rng)
        # what is well defined of eigenvectors and the like
        self.defined = getattr(sample, "output_process_fn_grad", None) or (lambda out: out)
        given = () if sample is None else (sample.input, sample.args, sample.kwargs)
        self.leaves, self.tree = pytree.tree_flatten(given)
        tensors = [i for i, x in enumerate(self.leaves) if isinstance(x, Tensor)]
        self.places: dict[int, Place | None] = {}
        for i in tensors:
            self.places[i] = _place(rng, self.leaves[i], self.mesh, len(tensors) > 1)
        dense = [i for i in tensors if self.leaves[i].layout is torch.strided]
        if all(p is None for p in self.places.values()) and dense:
            self.places[dense[0]] = _place(rng, self.leaves[dense[0]], self.mesh, False)
        self.rng = rng
        self.outs: list[Place | None] = []
        if self.way == "out":
            try:
                outs = self._call(_copy, self.op)
            except Exception:
                outs = []
            self.outs = [_place(rng, o, self.mesh, False) for o in outs if isinstance(o, Tensor)]

    def _sample(self, rng: random.Random) -> Any:
        """A sample of the op; None where it has none."""
        seed = rng.randrange(1 << 30)
        random.seed(seed)
        np.random.seed(seed)
        if self.way == "mistake":
            found = self.op.error_inputs("cpu")
        else:
            found = self.op.sample_inputs("cpu", self.dtype, requires_grad=self.grad)
        # of random numbers the values differ
        found = (f for f in found if not getattr(f, "kwargs", {}).get("dropout_p"))
        some = list(itertools.islice(found, rng.choice([4, 40])))
        if not some:
            return None
        one = rng.choice(some)
        self.error = getattr(one, "error_type", None)
        return getattr(one, "sample_input", one)

    def __repr__(self) -> str:
        def told(i: int, x: Any) -> str:
            if not isinstance(x, Tensor):
                return repr(x)
            kind = str(x.dtype).removeprefix("torch.")
            return f"{kind} {list(x.shape)} {self.places[i] or 'plain'}"

        leaves = ", ".join(told(i, x) for i, x in enumerate(self.leaves))
        outs = f" out {self.outs}" if self.outs else ""
        name = f"{self.op.name}.{self.op.variant_test_name}".rstrip(".")
        return f"{name} ({self.way}) on {self.mesh}: {leaves}{outs}; {self.tree!r}"[:1500]

    def _call(self, make: Any, op: Any, **more: Any) -> list[Any]:
        leaves = [make(x) for x in self.leaves]
        first, args, kwargs = pytree.tree_unflatten(leaves, self.tree)
        return pytree.tree_leaves(op(first, *args, **kwargs, **more), is_leaf=_is_leaf)

    def _run(self, make: Any) -> Any:
        """What the program gives when make(which, tensor) makes its operands."""
        if not self.leaves:
            raise RuntimeError("no sample")
        leaves = [make(i, x) if isinstance(x, Tensor) else x for i, x in enumerate(self.leaves)]
        first, args, kwargs = pytree.tree_unflatten(leaves, self.tree)
        op = self.op
        if self.way == "in place":
            op = self.op.get_inplace()
            # a view, so that what it is a view of is seen to change
            target = first.clone() if isinstance(first, Tensor) else first
            outs = [op(target, *args, **kwargs), target]
        elif self.way == "out" and self.outs:
            # this is where the values of the result go
            plain = self._call(_copy, op)
            given = [torch.full_like(o, 3).detach() for o in plain if isinstance(o, Tensor)]
            given = [make(-1 - i, o) for i, o in enumerate(given)]
            outs = op(first, *args, **kwargs, out=given[0] if len(given) == 1 else tuple(given))
            outs = [outs, given]
        else:
            outs = op(first, *args, **kwargs)
            outs = outs if self.way == "mistake" else self.defined(outs)
        outs = pytree.tree_leaves(outs, is_leaf=_is_leaf)
        flags = [o.requires_grad for o in outs if isinstance(o, Tensor)]
        if not self.grad:
            return outs, flags
        wrt = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        first_grads = self._grads(outs, wrt, 0.5)
        second = self._grads(first_grads, wrt, 0.7) if self._twice() else []
        zeros = [0 if g is None else g for g in (*first_grads, *second)]
        return outs, flags, zeros

    def _twice(self) -> bool:
        return self.way == "second" and self.op.supports_gradgrad

    def _grads(self, outs: list[Any], wrt: list[Tensor], seed: float) -> list[Any]:
        total = _total(outs, seed)
        if total is None or not wrt:
            return [torch.zeros(x.shape, dtype=x.dtype) for x in wrt]
        return list(
            torch.autograd.grad(
                total,
                wrt,
                create_graph=self._twice(),
                allow_unused=True,
                materialize_grads=True,
            )
        )

    def serial(self) -> Any:
        return self._run(lambda i, x: _copy(x))

    def sharded(self, mesh: DeviceMesh) -> Any:
        def make(i: int, x: Tensor) -> Tensor:
            return _placed(x, self.places[i] if i >= 0 else self.outs[-1 - i], mesh)

        return self._run(make)


def draw(rng: random.Random) -> Case:
    """A sample of an op of the database, placed at random."""
    return Case(rng)
