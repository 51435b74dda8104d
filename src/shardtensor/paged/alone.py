"""A call in parts that do not meet: each has the rows beside it on which its outputs depend.

Where all that a model does with a dim that is cut is local (kernels that slide, sizes that change
by whole factors, elementwise ops), a part may have one wide halo, of the input, and make the rows
between it and its neighbours anew: it runs from input to output at once, and nothing of it waits
in files. In specs a part is the middle one of three ranks; the others never run. A stencil makes
the rows that it can of those that are there (`rules.windows`), so that a shard has fewer rows from
op to op, all of them right; operands of which one has fewer meet in the rows that both have. What
needs another rank finds that it has ended, which ends the attempt: then parts meet as they do
otherwise. So does an output that lacks a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from .. import _torch
from .._torch import probe
from ..comm import observers
from ..comm.formats import memory_format
from ..cuts import chunk_sizes
from ..errors import RankError
from ..later import dt
from ..ranks.simulate import random_states, restore
from ..settings import setting
from ..spec import ALONE, Spec
from ..tensor import ShardTensor
from ..tensor.redistribute import reduced
from ..tensor.shard_tensor import wrap
from .meeting import Meeting
from .pager import Pager
from .ranks import Ranks, advance, alike, kept, lies, own, replica, state

# of the elements that a model makes, those that parts may make once more: of a U-Net 19 % cost less
# than exchanges and files that the system's cache holds, 38 % more (`benchmarks/tiled.py`)
MORE = 0.25
# the first row, the end, and the rows in all
Cut = tuple[int, int, int]


def without_meeting(
    model: nn.Module, parts: tuple[int, ...], dims: tuple[int, ...], pager: Pager, given: Any,
    lead: Tensor,
) -> tuple[list[int], Any] | None:  # fmt: skip
    """(halo, outputs) of a call, without gradients, whose parts did not meet: see `Alone`.

    None where they must. lead: of what is given the tensor that is cut along dims.
    """
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    if hooked or any(probe.global_hooks()) or 0 in lead.shape:
        # who looks at parts is to see them as they are
        return None
    work = Alone(model, parts, dims, pager, given, lead)
    try:
        work.go_on()
    except RankError:
        # errors of the model are raised again where parts meet
        return None
    return None if work.halo is None else (work.halo, work.outputs)


class Alone(Ranks):
    """A call without gradients in parts that do not meet.

    halo: rows of the input beside a part, in each cut dim; None if they have to meet, or would not
    gain by it. outputs: of the model, whole.
    """

    names = (ALONE, "b", "c", "d")

    def __init__(
        self, model: nn.Module, parts: tuple[int, ...], dims: tuple[int, ...], pager: Pager,
        given: Any, lead: Tensor,
    ) -> None:  # fmt: skip
        self.leaves, self.tree = pytree.tree_flatten(given)
        self.lead, self.dims = lead, dims
        self.rows = [lead.shape[d] for d in dims]
        self.spans: list[list[tuple[int, int]]] = []
        for n, k in zip(self.rows, parts, strict=True):
            sizes = chunk_sizes(n, k)
            # a part without rows has nothing to do
            self.spans.append([(a, a + m) for a, m in zip(sizes.offsets, sizes, strict=False) if m])
        self.halo: list[int] | None = None
        self.outputs: Any = None
        self.wholes: list[Any] = []
        # of each output and part
        self.ends: dict[Any, dict[int, Cut]] = {}
        super().__init__(model, (3,) * len(dims), pager)

    def runs(self, mesh: DeviceMesh) -> bool:
        return all(i == 1 for i in mesh.get_coordinate() or ())

    def on_rank(self, model: nn.Module, mesh: DeviceMesh) -> None:
        observers.thread.alone = True
        begin = random_states()
        with _torch.outside_modes(), torch.inference_mode(False), torch.no_grad():
            halo = self._needed(mesh)
        if halo is None:
            return
        first: Any = None
        for at in product(*(range(len(s)) for s in self.spans)):
            restore(begin)
            mine = model if first is None else replica(self.model)
            leaves, outputs = self._run(mine, mesh, at, halo)
            found, tree = pytree.tree_flatten(outputs)
            del outputs
            self._deliver([reduced(y) for y in found], at)
            first = first or (mine, leaves, tree)
            if tree != first[2]:
                raise ValueError("parts with outputs of other forms")
            del found
        mine, leaves, tree = first
        self.ended_forward(mine, True)
        advance(self.leaves, leaves)
        self.outputs, self.halo = pytree.tree_unflatten(self.wholes, tree), halo

    def _run(
        self,
        model: nn.Module,
        mesh: DeviceMesh,
        at: tuple[int, ...],
        halo: Sequence[int],
        made: Any = None,
    ) -> tuple[list[Any], Any]:
        """(what the model was given, what it returned) for a part and the rows beside it."""
        sizes = {}
        for d, n, i, spans, more in zip(self.dims, self.rows, at, self.spans, halo, strict=True):
            a, b = max(0, spans[i][0] - more), min(n, spans[i][1] + more)
            sizes[d] = a, b - a, n - b
        places = [dt.Shard(d) for d in self.dims]
        leaves: list[Any] = []
        # what is made inside of the model is real: somebody may keep it
        mode = nullcontext() if made is None else probe.fake_mode()
        for x in self.leaves:
            if alike(x, self.lead, self.dims):
                spec = Spec.of(mesh, places, x.shape, sizes)
                rows = _rows(x.detach(), spec)
                with mode:
                    local = rows.clone(memory_format=memory_format(x))
                leaves.append(wrap(local, spec))
            elif isinstance(x, Tensor):
                leaves.append(x.detach() if made is None else x.detach().clone())
            else:
                leaves.append(own(x))
        given = [x for x in leaves if isinstance(x, Tensor)]
        before = [state(x) for x in given]
        args, kwargs = pytree.tree_unflatten(leaves, self.tree)
        with made or Meeting(0):
            outputs = model(*args, **kwargs)
        self.unwritten()
        if any(isinstance(b, ShardTensor) for b in model.buffers()):
            raise ValueError("a buffer of rows that other parts have, too")
        if [state(x) for x in given] != before:
            raise ValueError("the model writes to rows that other parts have, too")
        return leaves, outputs

    def _deliver(self, outputs: list[Any], at: tuple[int, ...]) -> None:
        """Put the rows that part number `at` has made where the whole outputs are.

        Raises ValueError where rows lack between it and the part before.
        """
        first = not self.wholes
        for i, y in enumerate(outputs):
            if first:
                self.wholes.append(y)
            if isinstance(y, ShardTensor):
                if first:
                    with _torch.outside_modes():
                        self.wholes[i] = torch.empty_strided(
                            y.shape, lies(y), dtype=y.dtype, device=y.device
                        )
                _rows(self.wholes[i], y._spec).copy_(y._local)
                self.ends[i, at] = cut = _cut(y)
                for k, (start, stop, n) in cut.items():
                    last = at[k] == len(self.spans[k]) - 1
                    before = self.ends[i, _before(at, k)][k][1] if at[k] else 0
                    if start > before or (last and stop < n):
                        raise ValueError(f"rows {before} to {start} of output {i} lack")
            elif isinstance(y, Tensor) and first:
                self.wholes[i] = kept(y.detach())
            elif any(isinstance(v, ShardTensor) for v in getattr(y, "__dict__", {}).values()):
                raise ValueError(f"tensors in a {type(y).__name__}")

    # how wide -----------------------------------------------------------------------------------

    def _needed(self, mesh: DeviceMesh) -> list[int] | None:
        """The halo that outputs need, found on fake tensors; None where parts are to meet.

        Rows that a part in the middle and the ones before it both have, or that neither has, tell
        it.
        """
        middle = tuple([len(s) // 2 for s in self.spans])
        edges = [s[i][0] for s, i in zip(self.spans, middle, strict=True)]
        # no slab may reach the border that is not its part's: there nothing would lack
        halo = [
            max(0, min(int(2 * MORE * s[0][1]), e - 1, n - e - 1))
            for s, e, n in zip(self.spans, edges, self.rows, strict=True)
        ]
        tried = cache(lambda at, halo: self._tried(mesh, at, halo))
        axes = range(len(middle))
        for again in (False, True, True):
            outputs, made = tried(middle, tuple(halo))
            if made.largest <= self.pager.budget:
                # what fits into memory does not go to files
                return None
            lacks = [-n for n in halo]
            for k in axes:
                if middle[k]:
                    others, _ = tried(_before(middle, k), tuple(halo))
                    pairs = [(a[k], b[k]) for a, b in zip(others, outputs, strict=True) if k in b]
                    lacks[k] = max([self._lack(a, b, k) for a, b in pairs], default=0)
            if again and all(n <= 0 for n in lacks):
                break
            # parts begin anywhere among the rows of which one is made
            steps = zip(halo, lacks, made.per, strict=True)
            halo = [max(0, h + n + (per - 1 if h + n else 0)) for h, n, per in steps]
        else:
            return None
        share = made.elements * prod(map(len, self.spans)) / made.whole
        first, _ = tried((0,) * len(axes), tuple(halo))
        last, _ = tried(tuple([len(s) - 1 for s in self.spans]), tuple(halo))
        whole = all(c[0] == 0 for y in first for c in y.values()) and all(
            c[1] == c[2] for y in last for c in y.values()
        )
        return halo if whole and share <= 1 + MORE else None

    def _lack(self, a: Cut, b: Cut, k: int) -> int:
        """The rows of the input that either side of a cut needs more than it had; less if < 0."""
        return -((a[1] - b[0]) * self.rows[k] // (2 * a[2]))

    def _tried(
        self, mesh: DeviceMesh, at: tuple[int, ...], halo: Sequence[int]
    ) -> tuple[list[dict[int, Cut]], Meeting]:
        """(how each sharded output is cut, what was made) of a part, on fake tensors.

        Raises ValueError for what parts may not do, RankError for what needs others.
        """
        made, begin = Meeting(len(self.rows)), random_states()
        # what is drawn does not matter
        with setting("matching", False):
            _, outputs = self._run(replica(self.model), mesh, at, halo, made)
        restore(begin)
        found = pytree.tree_leaves(outputs)
        return [_cut(y) for y in found if isinstance(y, ShardTensor)], made


def _rows(whole: Tensor, spec: Spec) -> Tensor:
    """This rank's rows of what lies in memory that the pager need make no room for."""
    with _torch.outside_modes():
        return whole[spec.block]


def _before(at: tuple[int, ...], k: int) -> tuple[int, ...]:
    """The part before one along a dim."""
    return (*at[:k], at[k] - 1, *at[k + 1 :])


def _cut(y: ShardTensor) -> dict[int, Cut]:
    """For each mesh axis that cuts a dim the first row here, the end, and the rows in all."""
    found = {}
    for dim, (a, b) in zip(y._spec.dims, y._spec.spans, strict=True):
        if dim.axes:
            # several axes in one dim raise
            (k,) = dim.axes
            found[k] = a, b, dim.size
    return found
