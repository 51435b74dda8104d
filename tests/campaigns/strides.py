"""PyTorch's operator database on operands of other strides: results lie as on one device.

Turned, with the channels last, steps and parts of more, expanded; cut evenly, unevenly, with empty shards.
Strides of dims of more than one row are held against torch's, memory formats, and which views succeed.
"""

from __future__ import annotations

import itertools
import os
import random
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

import shardtensor as st
from campaigns.operands import UNDEFINED, Place, _place, way_of
from shardtensor.comm.formats import FORMATS

MESHES = [(1,), (2,), (2,), (3,), (2, 2)]
WAYS = ["value"] * 6 + ["in place", "out"]
# how an operand lies: what it is made of, and the views of that which give it
FORMS = ["plain", "turned", "swapped", "last", "steps", "part", "expanded"]
# which lie otherwise than on one device, or where torch's own is a mistake: docs/design.md
OTHER = {
    "linalg.lstsq", "triangular_solve", "nn.functional.max_unpool1d", "nn.functional.max_unpool2d",
    "nn.functional.max_unpool3d", "diagonal_scatter", "slice_scatter", "select_scatter",
    "as_strided_scatter", "nn.functional.scaled_dot_product_attention",
    "nn.functional.local_response_norm", "addr", "kron", "linalg.solve", "linalg.solve_ex",
    "repeat_interleave", "index_fill", "index_put", "nn.functional.embedding_bag",
    "nn.functional.binary_cross_entropy_with_logits", "nn.functional.conv1d",
    "nn.functional.conv2d", "nn.functional.conv3d", "nn.functional.conv_transpose1d",
    "nn.functional.conv_transpose2d", "nn.functional.conv_transpose3d", "take_along_dim",
}  # fmt: skip
# of no public function
PRIVATE = {
    "_unsafe_masked_index_put_accumulate", "_softmax_backward_data", "native_dropout_backward",
    "_native_batch_norm_legit", "_batch_norm_with_update", "native_group_norm",
}  # fmt: skip


@cache
def _ops() -> list[Any]:
    only = os.environ.get("OPS", "")
    found = [
        o
        for o in op_db
        if o.name not in UNDEFINED | OTHER | PRIVATE and torch.float64 in o.supported_dtypes("cpu")
    ]
    return [o for o in found if o.name in only.split(",")] if only else found


def _stored(x: Tensor, form: str, d: int) -> tuple[Tensor, Any]:
    """What is distributed, and the view of it that is x or looks like it."""
    n = x.ndim
    if form == "turned" and n > 1:
        order = list(reversed(range(n)))
        return x.permute(order).contiguous(), lambda b: b.permute(order)
    if form == "swapped" and n > 1:
        return x.transpose(d, d - 1).contiguous(), lambda b: b.transpose(d, d - 1)
    if form == "last" and n in FORMATS:
        return x.contiguous(memory_format=FORMATS[n]), lambda b: b
    if form == "steps" and n:
        return x.repeat_interleave(2, d), lambda b: b[(slice(None),) * d + (slice(None, None, 2),)]
    if form == "part" and n:
        ends = x.narrow(d, 0, min(1, x.shape[d]))
        return torch.cat([ends, x, ends], d), lambda b: b.narrow(d, min(1, x.shape[d]), x.shape[d])
    if form == "expanded" and n and x.shape[d] > 1:
        return x.narrow(d, 0, 1).contiguous(), lambda b: b.expand(x.shape)
    return x.contiguous(), lambda b: b


def lies(y: Tensor) -> tuple[Any, ...]:
    """What is alike on all devices of how a tensor lies, and which reshapes of it are views."""
    if not y.numel():
        return ()
    formats = [y.is_contiguous()]
    if y.ndim in FORMATS:
        formats.append(y.is_contiguous(memory_format=FORMATS[y.ndim]))
    shapes = [(-1,)]
    shapes += [(*y.shape[:d], -1, *y.shape[d + 2 :]) for d in range(y.ndim - 1)]
    views = []
    for shape in shapes:
        try:
            y.detach().view(shape)
            views.append(True)
        except RuntimeError as e:
            views.append("compatible" not in str(e))
    steps = [s for s, n in zip(y.stride(), y.shape, strict=True) if n > 1]
    return steps, formats, views


class Case:
    """One sample of an op, and how its operands lie and are cut."""

    atol = 1e-9

    def __init__(self, rng: random.Random) -> None:
        self.mesh = rng.choice(MESHES)
        self.op = rng.choice(_ops())
        self.way = way_of(rng, self.op, WAYS, "value")
        seed = rng.randrange(1 << 30)
        random.seed(seed)
        np.random.seed(seed)
        found = self.op.sample_inputs("cpu", torch.float64, requires_grad=False)
        found = (f for f in found if not f.kwargs.get("dropout_p"))
        some = list(itertools.islice(found, 40))
        # numbers and vectors lie in one way only
        some = [s for s in some if self._dims(s) > 1] or some
        sample = rng.choice(some)
        self.leaves, self.tree = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        tensors = [i for i, x in enumerate(self.leaves) if isinstance(x, Tensor)]
        same = rng.choice(FORMS) if rng.random() < 0.6 else None
        # the stride of a dim of one row is any, and may decide where numbers are broadcast
        ones = any(1 in self.leaves[i].shape for i in tensors)
        self.forms: dict[int, tuple[str, int]] = {}
        self.places: dict[int, Place | None] = {}
        for i in tensors:
            x = self.leaves[i]
            wide = x.is_floating_point() or x.is_complex()
            wide = wide and x.layout is torch.strided and not ones
            form = (same or rng.choice(FORMS)) if wide else "plain"
            self.forms[i] = form, rng.randrange(max(1, x.ndim))
            self.places[i] = _place(rng, self._base(i), self.mesh, len(tensors) > 1)
        dense = [i for i in tensors if self.leaves[i].layout is torch.strided]
        if all(p is None for p in self.places.values()) and dense:
            self.places[dense[0]] = _place(rng, self._base(dense[0]), self.mesh, False)
        self.outs: list[Place | None] = []
        if self.way == "out":
            try:
                self.outs = [_place(rng, o, self.mesh, False) for o in self._results()]
            except Exception:
                self.way = "value"

    @staticmethod
    def _dims(sample: Any) -> int:
        xs = pytree.tree_leaves((sample.input, sample.args))
        return max((x.ndim for x in xs if isinstance(x, Tensor)), default=0)

    def _base(self, i: int) -> Tensor:
        x = self.leaves[i].detach()
        return _stored(x, *self.forms[i])[0] if x.layout is torch.strided else x

    def _results(self) -> list[Tensor]:
        first, args, kwargs = pytree.tree_unflatten(self._operands(lambda i, b: b), self.tree)
        return [o for o in _flat(self.op(first, *args, **kwargs)) if isinstance(o, Tensor)]

    def __repr__(self) -> str:
        def told(i: int, x: Any) -> str:
            if not isinstance(x, Tensor):
                return repr(x)
            form, d = self.forms[i]
            return f"{list(x.shape)} {form} {d} {self.places[i] or 'whole'}"

        leaves = ", ".join(told(i, x) for i, x in enumerate(self.leaves))
        name = f"{self.op.name}.{self.op.variant_test_name}".rstrip(".")
        return f"{name} ({self.way}) on {self.mesh}: {leaves}; {self.outs or ''} {self.tree!r}"[
            :900
        ]

    def _operands(self, place: Any) -> list[Any]:
        made = []
        for i, x in enumerate(self.leaves):
            if isinstance(x, Tensor) and x.layout is torch.strided:
                base, view = _stored(x.detach(), *self.forms[i])
                base = place(i, base.clone())
                made.append(view(base))
            else:
                made.append(x)
        return made

    def _run(self, place: Any) -> Any:
        first, args, kwargs = pytree.tree_unflatten(self._operands(place), self.tree)
        op = self.op
        more = {}
        if self.way == "in place":
            op = op.get_inplace()
            first = first.clone() if isinstance(first, Tensor) else first
        elif self.way == "out":
            given = [torch.zeros(o.shape, dtype=o.dtype) for o in self._results()]
            given = [place(-1 - i, o) for i, o in enumerate(given)]
            more = {"out": given[0] if len(given) == 1 else tuple(given)}
        outs = [o for o in _flat(op(first, *args, **kwargs, **more)) if isinstance(o, Tensor)]
        return [lies(o) for o in outs]

    def serial(self) -> Any:
        return self._run(lambda i, x: x)

    def sharded(self, mesh: DeviceMesh) -> Any:
        def place(i: int, x: Tensor) -> Tensor:
            where = self.places[i] if i >= 0 else self.outs[-1 - i]
            if where is None:
                return x
            kept = [Replicate() if p.is_partial() else p for p in where.placements]
            return st.distribute_tensor(x, mesh, kept, src_data_rank=None, sizes=where.sizes)

        return self._run(place)


def _flat(tree: Any) -> list[Any]:
    return pytree.tree_leaves(tree, is_leaf=lambda x: isinstance(x, Tensor))


def draw(rng: random.Random) -> Case:
    """A sample of an op of the database, stored and cut at random."""
    return Case(rng)
