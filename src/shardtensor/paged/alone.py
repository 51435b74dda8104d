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

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .. import _torch
from .._torch import probe
from ..comm import observers
from ..comm.formats import memory_format
from ..containers import flatten
from ..errors import RankError
from ..later import dt
from ..ranks.own import random_states, restore
from ..settings import setting
from ..spec import ALONE, Spec
from ..tensor import ShardTensor
from ..tensor.random import matching
from ..tensor.redistribute import local_of, reduced
from ..tensor.shard_tensor import wrap
from .call import OneCall
from .meeting import Meeting, check_nodes
from .pager import Pager
from .parts import Cut, Span, check_plain, cut_of, spans_of, widened
from .ranks import advance, alike, kept, lies, own, replica, state

# of the elements that a model makes, those that parts may make once more: of a U-Net 19 % cost less
# than exchanges and files that the system's cache holds, 38 % more (`benchmarks/tiled.py`)
MORE = 0.25
# of the memory, what a part may keep for backward: what goes to files anyway need not be made twice
KEPT = 1.0
At = tuple[int, ...]
Pairs = list[tuple[Tensor, Tensor]]
# of a part, a halo and whether backward runs, how each sharded output is cut, and what was made
Tried = Callable[[At, tuple[int, ...], bool], tuple[list[dict[int, Cut]], Meeting]]


def without_meeting(
    model: nn.Module, parts: tuple[int, ...], dims: tuple[int, ...], pager: Pager, given: Any,
    known: tuple[int, ...] | None,
) -> Alone | None:  # fmt: skip
    """A call that has run in parts that did not meet: see `Alone`. None where they must.

    known: the halo of another call of the model, which may do here as well.
    """
    if hooked(model):
        return None
    work = Alone(model, parts, dims, pager, given)
    work.known = known
    if 0 in work.lead.shape or (work.grad and any(x.is_inference() for x in work.tensors)):
        return None
    try:
        work.go_on()
    except RankError:
        # errors of the model are raised again where parts meet
        return None
    return None if work.halo is None else work


def hooked(model: nn.Module) -> bool:
    """Whether somebody looks at modules: at parts as they are, not at wider ones."""
    tables = ["_forward_hooks", "_forward_pre_hooks"]
    tables += ["_backward_hooks", "_backward_pre_hooks"] * torch.is_grad_enabled()
    return any(getattr(m, t) for m in model.modules() for t in tables) or any(probe.global_hooks())


@dataclass
class Made:
    """A part: the model that made it, what that was given, and gave, flat, with its form."""

    model: nn.Module
    leaves: list[Any]
    outputs: list[Any]
    tree: Any

    @property
    def sources(self) -> list[Tensor]:
        """Where gradients end: what was given, here, and trained parameters."""
        given = [local_of(x) for x in self.leaves if isinstance(x, Tensor)]
        return [*given, *(p for p in self.model.parameters() if p.requires_grad)]

    def gradients(self, pairs: Pairs) -> list[Tensor | None]:
        """Those of the sources, by pairs of a result and its cotangent."""
        asked = [x for x in self.sources if x.requires_grad]
        if not pairs or not asked:
            return [None] * len(self.sources)
        results, cotangents = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(results, asked, cotangents, allow_unused=True))
        return [next(found) if x.requires_grad else None for x in self.sources]


class Alone(OneCall):
    """A call in parts that do not meet.

    In backward each part is made anew, but for the last ones, as many as fit into memory together.
    As sums of what all rows of the output add, gradients need nothing of other parts either.
    halo: rows of the input beside a part, in each cut dim; None if they have to meet, or would not
    gain by it.
    """

    names = (ALONE, "b", "c", "d")
    sums, again = False, True

    def __init__(
        self,
        model: nn.Module,
        parts: tuple[int, ...],
        dims: tuple[int, ...],
        pager: Pager,
        given: Any,
    ) -> None:
        super().__init__(model, (3,) * len(dims), dims, pager, given)
        self.lead = self.tensors[0]
        self.rows = [self.lead.shape[d] for d in dims]
        self.spans = [spans_of(n, k) for n, k in zip(self.rows, parts, strict=True)]
        self.halo: tuple[int, ...] | None = None
        self.known: tuple[int, ...] | None = None
        # of each output and part
        self.ends: dict[Any, dict[int, Cut]] = {}

    def runs(self, mesh: DeviceMesh) -> bool:
        return all(i == 1 for i in mesh.get_coordinate() or ())

    def on_rank(self, model: nn.Module, mesh: DeviceMesh) -> None:
        observers.thread.alone = True
        begin = random_states()
        with _torch.outside_modes(), torch.inference_mode(False), torch.set_grad_enabled(self.grad):
            halo = needed(
                self.rows, self.spans, self._better_met,
                lambda at, halo, back: self._tried(mesh, at, halo, back), self.known,
            )  # fmt: skip
        if halo is None:
            return
        # as it is now
        untouched = replica(self.model) if self.grad else self.model
        # parts that wait for backward
        held: dict[At, Made] = {}
        first: Made | None = None
        everywhere = list(product(*(range(len(s)) for s in self.spans)))
        for at in everywhere:
            restore(begin)
            before = self.pager.held
            made = self._run(replica(untouched) if first else model, mesh, at, halo)
            made.outputs = [reduced(y) for y in made.outputs]
            if first is None:
                # not its rows, which would be there while the others are made
                others = [None if isinstance(x, Tensor) else x for x in made.leaves]
                first = Made(made.model, others, [], made.tree)
                self.gave(made.outputs, made.tree)
            if made.tree != self.out_tree:
                raise ValueError("parts with outputs of other forms")
            self._deliver(made.outputs, at)
            mine = self.pager.held - before
            if any(self.followed):
                if mine > KEPT * self.pager.budget:
                    raise ValueError("what a part keeps for backward does not fit into memory")
                # the next one is to fit beside it, and what backward makes
                if at == everywhere[-1] or before + 3 * mine <= self.pager.budget:
                    held[at] = made
            del made
        assert first is not None
        self.ended_forward(first.model, True)
        advance(self.leaves, first.leaves)
        self.halo = tuple(halo)
        del first, model
        if not any(self.followed):
            return
        self.world.turns.leave()
        for at in [*held, *(at for at in everywhere if at not in held)]:
            part = held.pop(at, None)
            if part is None:
                restore(begin)
                part = self._run(replica(untouched), mesh, at, halo)
                part.outputs = [reduced(y) for y in part.outputs]
            self._add(part, self._arrived(part, at))
            del part

    def _run(
        self,
        model: nn.Module,
        mesh: DeviceMesh,
        at: At,
        halo: Sequence[int],
        counts: Any = None,
    ) -> Made:
        """What the model made of a part and the rows beside it; counts: of a trial."""
        cuts = zip(self.dims, self.spans, at, halo, self.rows, strict=True)
        sizes = {d: widened(spans[i], more, n) for d, spans, i, more, n in cuts}
        places = [dt.Shard(d) for d in self.dims]
        leaves: list[Any] = []
        # what is made inside of the model is real: somebody may keep it
        mode = nullcontext() if counts is None else probe.fake_mode()
        for x in self.leaves:
            follows = isinstance(x, Tensor) and x.requires_grad and self.grad
            if alike(x, self.lead, self.dims):
                spec = Spec.of(mesh, places, x.shape, sizes)
                rows = _rows(x.detach(), spec)
                with mode:
                    local = rows.clone(memory_format=memory_format(x))
                leaves.append(wrap(local.requires_grad_(follows), spec))
            elif isinstance(x, Tensor):
                own_x = x.detach() if counts is None else x.detach().clone()
                leaves.append(own_x.requires_grad_(follows))
            else:
                leaves.append(own(x))
        given = [x for x in leaves if isinstance(x, Tensor)]
        before = [state(x) for x in given]
        args, kwargs = self.tree.of(leaves)
        with counts or Meeting(0):
            outputs = model(*args, **kwargs)
        self.unwritten()
        if any(isinstance(b, ShardTensor) for b in model.buffers()):
            raise ValueError("a buffer of rows that other parts have, too")
        if [state(x) for x in given] != before:
            raise ValueError("the model writes to rows that other parts have, too")
        return Made(model, leaves, *flatten(outputs))

    @torch.no_grad()
    def _deliver(self, outputs: list[Any], at: At) -> None:
        """Put the rows that part number `at` has made where the whole outputs are.

        Raises ValueError where rows lack between it and the part before.
        """
        first = not self.found
        for i, y in enumerate(outputs):
            if first:
                self.found.append(y)
            if isinstance(y, ShardTensor):
                if first:
                    with _torch.outside_modes():
                        self.found[i] = torch.empty_strided(
                            y.shape, lies(y), dtype=y.dtype, device=y.device
                        )
                _rows(self.found[i], y._spec).copy_(y._local)
                self.ends[i, at] = cut = cut_of(y)
                for k, (start, stop, n) in cut.items():
                    last = at[k] == len(self.spans[k]) - 1
                    before = self.ends[i, _before(at, k)][k][1] if at[k] else 0
                    if start > before or (last and stop < n):
                        raise ValueError(f"rows {before} to {start} of output {i} lack")
            elif isinstance(y, Tensor) and first:
                self.found[i] = kept(y.detach())
            else:
                check_plain(y)

    def _arrived(self, part: Made, at: At) -> Pairs:
        """What a part made of the outputs that no part before it has, with its cotangents."""
        pairs = []
        for i, (y, g) in enumerate(zip(part.outputs, self.cotangents, strict=True)):
            if g is None or not y.requires_grad:
                continue
            cut = self.ends.get((i, at), {})
            if any(at[k] for k in range(len(at)) if k not in cut):
                continue
            if not isinstance(y, ShardTensor):
                pairs.append((y, g))
                continue
            own, local = list(y._spec.block), y._local
            for d, dim in enumerate(y._spec.dims):
                for k in dim.axes:
                    start, stop, _ = cut[k]
                    new = self.ends[i, _before(at, k)][k][1] if at[k] else start
                    own[d] = slice(new, max(new, stop))
                    local = local.narrow(d, min(new, stop) - start, max(0, stop - new))
            pairs.append((local, g[tuple(own)]))
        return pairs

    def _add(self, part: Made, pairs: Pairs) -> None:
        """Add to the gradients what a part gives."""
        found = part.gradients(pairs)
        given = [x for x in part.leaves if isinstance(x, Tensor)]
        with torch.no_grad():
            for i, g in enumerate(found[len(given) :]):
                if g is not None:
                    known = self.of_parameters[i]
                    self.of_parameters[i] = kept(g) if known is None else known.add_(g)
            for i, (x, g) in enumerate(zip(given, found, strict=False)):
                if g is None:
                    continue
                whole = self.of_inputs[i]
                if whole is None:
                    with _torch.outside_modes():
                        whole = self.of_inputs[i] = torch.zeros_like(self.tensors[i])
                whole[x._spec.block if isinstance(x, ShardTensor) else ()].add_(g)

    # how wide -----------------------------------------------------------------------------------

    def _better_met(self, made: Meeting) -> bool:
        """Whether what was made in all goes to no files, or to such as are in memory."""
        if self.grad:
            # to make it anew takes longer
            return made.bytes <= self.pager.budget + self.pager.shelf.cached
        return made.largest <= self.pager.budget

    def _tried(
        self, mesh: DeviceMesh, at: At, halo: Sequence[int], back: bool
    ) -> tuple[list[dict[int, Cut]], Meeting]:
        """(how each sharded output is cut, what was made) of a part, on fake tensors.

        back: whether backward runs, too. Raises ValueError for what parts may not do, RankError for
        what needs others.
        """
        counts, begin = Meeting(len(self.rows)), random_states()
        # what is drawn does not matter here; parts draw what one device does, or must meet
        with setting("any draw", matching()), setting("matching", False):
            made = self._run(replica(self.model), mesh, at, halo, counts)
            tensors = [local_of(y) for y in made.outputs if isinstance(y, Tensor)]
            ends = [y for y in tensors if y.requires_grad]
            if back:
                check_nodes(ends, made.sources)
                made.gradients([(y, torch.zeros_like(y)) for y in ends])
        restore(begin)
        return [cut_of(y) for y in made.outputs if isinstance(y, ShardTensor)], counts


def _rows(whole: Tensor, spec: Spec) -> Tensor:
    """This rank's rows of what lies in memory that the pager need make no room for."""
    with _torch.outside_modes():
        return whole[spec.block]


def needed(
    rows: Sequence[int],
    spans: Sequence[Sequence[Span]],
    better_met: Callable[[Meeting], bool],
    tried: Tried,
    known: Sequence[int] | None = None,
) -> list[int] | None:
    """The halo that outputs need in each dim, found on fake tensors; None where parts are to meet.

    Rows that a part in the middle and the ones before it both have, or that neither has, tell it.
    known: a halo that may do.
    """
    middle = tuple([len(s) // 2 for s in spans])
    edges = [s[i][0] for s, i in zip(spans, middle, strict=True)]
    # no slab may reach the border that is not its part's: there nothing would lack
    halo = [
        max(0, min(int(2 * MORE * s[0][1]), e - 1, n - e - 1))
        for s, e, n in zip(spans, edges, rows, strict=True)
    ]
    if known is not None:
        halo = [min(n, most) for n, most in zip(known, halo, strict=True)]
    tried = cache(tried)
    axes = range(len(middle))
    for again in (known is not None, True, True):
        outputs, made = tried(middle, tuple(halo), again)
        if better_met(made):
            return None
        lacks = [-n for n in halo]
        for k in axes:
            if middle[k]:
                others, _ = tried(_before(middle, k), tuple(halo), False)
                pairs = [(a[k], b[k]) for a, b in zip(others, outputs, strict=True) if k in b]
                lacks[k] = max([_lack(a, b, rows[k]) for a, b in pairs], default=0)
        if again and all(n <= 0 for n in lacks):
            break
        # parts begin anywhere among the rows of which one is made
        steps = zip(halo, lacks, made.per, strict=True)
        halo = [max(0, h + n + (per - 1 if h + n else 0)) for h, n, per in steps]
    else:
        return None
    share = made.elements * prod(map(len, spans)) / made.whole
    first, _ = tried((0,) * len(axes), tuple(halo), True)
    last, _ = tried(tuple([len(s) - 1 for s in spans]), tuple(halo), True)
    whole = all(c[0] == 0 for y in first for c in y.values()) and all(
        c[1] == c[2] for y in last for c in y.values()
    )
    return halo if whole and share <= 1 + MORE else None


def _lack(a: Cut, b: Cut, rows: int) -> int:
    """Of the input's rows those that either side of a cut needs more than it had; less if < 0."""
    return -((a[1] - b[0]) * rows // (2 * a[2]))


def _before(at: At, k: int) -> At:
    """The part before one along a dim."""
    return (*at[:k], at[k] - 1, *at[k + 1 :])
