"""A call in parts that do not meet: each has the rows beside it on which its outputs depend.

Where all that a model does with a dim that is cut is local (kernels that slide, sizes that change
by whole factors, elementwise ops), a part may have one wide halo, of the input, and make the rows
between it and its neighbours anew: it runs from input to output at once, and nothing of it waits
in files. In specs a part is the middle one of three ranks; there are no others. A stencil makes
the rows that it can of those that are there (`rules.windows`), so that a shard has fewer rows from
op to op, all of them right; operands of which one has fewer meet in the rows that both have. What
needs another rank finds none, which ends the attempt: then parts meet as they do
otherwise. So does an output that lacks a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .. import _torch
from .._torch import probe
from ..comm import observers
from ..comm.formats import memory_format
from ..errors import RankError
from ..later import dt
from ..ranks.own import random_states, restore
from ..spec import Spec
from ..tensor import ShardTensor
from ..tensor.redistribute import reduced
from ..tensor.shard_tensor import wrap
from .call import OneCall
from .made import Made, Pairs, made_by, tried
from .meeting import Meeting
from .pager import Pager
from .parts import Cut, check_plain, cut_of, middle, spans_of, widened
from .ranks import alike, kept, lies, own, replica
from .width import At, before, hooked, needed

# of the memory, what a part may keep for backward: what goes to files anyway need not be made twice
KEPT = 1.0


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


class Alone(OneCall):
    """A call in parts that do not meet.

    In backward each part is made anew, but for the last ones, as many as fit into memory together.
    As sums of what all rows of the output add, gradients need nothing of other parts either.
    halo: rows of the input beside a part, in each cut dim; None if they have to meet, or would not
    gain by it.
    """

    sums, again = False, True

    def __init__(
        self,
        model: nn.Module,
        parts: tuple[int, ...],
        dims: tuple[int, ...],
        pager: Pager,
        given: Any,
    ) -> None:
        super().__init__(model, (1,), dims, pager, given)
        self.lead = self.tensors[0]
        self.rows = [self.lead.shape[d] for d in dims]
        self.spans = [spans_of(n, k) for n, k in zip(self.rows, parts, strict=True)]
        self.halo: tuple[int, ...] | None = None
        self.known: tuple[int, ...] | None = None
        # of each output and part
        self.ends: dict[Any, dict[int, Cut]] = {}

    def mesh(self) -> DeviceMesh:
        return middle(self.pager.shelf.device.type, len(self.dims))

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
            held_before = self.pager.held
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
            mine = self.pager.held - held_before
            if any(self.followed):
                if mine > KEPT * self.pager.budget:
                    raise ValueError("what a part keeps for backward does not fit into memory")
                # the next one is to fit beside it, and what backward makes
                if at == everywhere[-1] or held_before + 3 * mine <= self.pager.budget:
                    held[at] = made
            del made
        assert first is not None
        self.ended_forward(first.model, True)
        self.advance(self.leaves, first.leaves)
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
        made = made_by(model, model, self.tree, leaves, counts)
        self.unwritten()
        return made

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
                    end = self.ends[i, before(at, k)][k][1] if at[k] else 0
                    if start > end or (last and stop < n):
                        raise ValueError(f"rows {end} to {start} of output {i} lack")
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
                    new = self.ends[i, before(at, k)][k][1] if at[k] else start
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
        found, counts, _ = tried(
            lambda counts: self._run(replica(self.model), mesh, at, halo, counts),
            len(self.rows), back,
        )  # fmt: skip
        return found, counts


def _rows(whole: Tensor, spec: Spec) -> Tensor:
    """This rank's rows of what lies in memory that the pager need make no room for."""
    with _torch.outside_modes():
        return whole[spec.block]
