"""Calls of the model inside of a step, whose parts need not meet between its layers either.

A part fetches one wide halo of the input from its neighbours and runs the model alone, as a part of
a call does (see `alone`). Then ranks tell which rows they have made, and each keeps its own. With
gradients parts meet: what is kept for backward goes to files either way, and rows that are made
once more would be kept once more (of a U-Net 17 % more bytes, 22 % more time where 19 % are).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .. import _torch, comm, containers
from .._torch import probe
from .._torch.modules import in_their_place
from ..comm import observers
from ..comm.formats import memory_format
from ..later import dt
from ..ranks.own import random_states, restore
from ..ranks.simulate import Turns
from ..spec import Dim, Spec
from ..tensor import ShardTensor
from ..tensor.redistribute import reduced
from ..tensor.shard_tensor import wrap
from .made import Made, made_by, tried
from .meeting import Meeting
from .pager import Pager
from .parts import Cut, check_plain, cut_of, middle, widened
from .ranks import own, replica
from .width import At, hooked, needed

# of one output by axis, on one rank
Cuts = dict[int, Cut]


class Calls:
    """The model's calls in one step, alike on all its ranks.

    halos: by form of call the rows of the input that a part has beside its own in each cut dim;
    None where parts meet. last: that of the last call.
    """

    def __init__(self, pager: Pager, turns: Turns) -> None:
        self.pager, self.turns = pager, turns
        self.halos: dict[Any, tuple[int, ...] | None] = {}
        self.last: tuple[int, ...] | None = None

    def follow(self, model: nn.Module, mesh: DeviceMesh, hooks: int) -> None:
        """Let calls of a rank's copy of the model, with so many hooks of ours, run so."""
        setattr(model, "_compiled_call_impl", _Calling(self, model, mesh, hooks))  # noqa: B010


class _Told:
    """A collective of simulated ranks: each gets what all have."""

    @staticmethod
    def work(boxes: list[list[Any]]) -> None:
        every = [box[0] for box in boxes]
        for box in boxes:
            box[:] = every


class _Calling:
    """What calls a rank's copy of the model."""

    def __init__(self, calls: Calls, model: nn.Module, mesh: DeviceMesh, hooks: int) -> None:
        self.calls, self.model, self.mesh, self.hooks = calls, model, mesh, hooks
        self.count = 0
        self.middle: DeviceMesh | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = containers.flatten((args, kwargs))
        dims = _cut_alike(leaves, self.mesh)
        found = halo = None
        free = not (torch.is_grad_enabled() or _torch.transforming())
        if dims and free and not hooked(self.model, self.hooks):
            # ranks come to the same calls, the first one finds out for all
            form = self._form(leaves, dims)
            if form not in self.calls.halos:
                self.calls.halos[form] = self._halo(leaves, tree, dims)
            halo = self.calls.halos[form]
            found = None if halo is None else self._apart(leaves, tree, dims, halo)
            if found is None:
                self.calls.halos[form] = None
        self.calls.last = None if found is None else halo
        return self.model._call_impl(*args, **kwargs) if found is None else found[0]

    def _form(self, leaves: list[Any], dims: list[Dim]) -> Any:
        """What tells calls from each other that may need other halos."""
        modes = [m.training for m in self.model.modules()]
        given = [(*x.shape, x.dtype) if isinstance(x, Tensor) else _name(x) for x in leaves]
        return *dims, *modes, *given

    def _halo(self, leaves: list[Any], tree: Any, dims: list[Dim]) -> tuple[int, ...] | None:
        """What parts need to run alone; None where they are to meet."""
        budget = self.calls.pager.budget
        known, begin = self.calls.last, random_states()
        with _torch.outside_modes(), torch.inference_mode(False), torch.no_grad():
            self.middle = self.middle or middle(self.mesh.device_type, len(dims))
            try:
                found = needed(
                    [d.size for d in dims], [d.spans for d in dims],
                    lambda made: made.largest <= budget,
                    lambda at, halo, _: self._tried(leaves, tree, at, halo), known,
                )  # fmt: skip
            except Exception:
                # errors of the model are raised again where parts meet
                return None
            finally:
                restore(begin)
        return None if found is None else tuple(found)

    def _tried(
        self, leaves: list[Any], tree: Any, at: At, halo: Sequence[int]
    ) -> tuple[list[Cuts], Meeting]:
        def make(counts: Meeting) -> Made:
            model = replica(self.model)
            # it trains nothing
            model.__dict__.pop("_shardtensor_origin", None)
            given = [self._like(x, at, halo) for x in leaves]
            with _alone():
                return made_by(model, model, tree, given, counts)

        with _alone():
            found, counts, made = tried(make, len(halo), False)
        for y in made.outputs:
            _check(y, len(halo))
        kept = [vars(m) for m in made.model.modules()]
        if any(isinstance(x, ShardTensor) for x in containers.tensors(kept)):
            raise ValueError("what the model keeps would be of wider parts")
        return found, counts

    def _like(self, x: Any, at: At, halo: Sequence[int]) -> Any:
        """What a part is given of x, without memory of rows."""
        if not isinstance(x, ShardTensor):
            return x.clone() if isinstance(x, Tensor) else own(x)
        sizes = {
            d: widened(dim.spans[at[k]], halo[k], dim.size)
            for d, dim in enumerate(x._spec.dims) for k in dim.axes
        }  # fmt: skip
        shape = [sizes[d][1] if d in sizes else n for d, n in enumerate(x.shape)]
        with probe.fake_mode():
            local = torch.empty(shape, dtype=x.dtype, device=x.device)
            local = local.contiguous(memory_format=memory_format(x._local))
        return wrap(local, self._spec(x, sizes))

    def _spec(self, x: ShardTensor, sizes: dict[int, tuple[int, int, int]]) -> Spec:
        assert self.middle is not None
        return Spec.of(self.middle, _places(x), x.shape, sizes)

    def _wide(self, x: ShardTensor, halo: Sequence[int]) -> ShardTensor:
        """This rank's rows of x and those beside them."""
        local, sizes = x._local, {}
        for d, dim in enumerate(x._spec.dims):
            for k in dim.axes:
                every = [widened(span, halo[k], dim.size) for span in dim.spans]
                windows = [(a, a + n) for a, n, _ in every]
                local = comm.window(local, d, dim.sizes, windows, comm.along(x._spec, d))
                sizes[d] = every[x._spec.index[d]]
        return wrap(local, self._spec(x, sizes))

    def _apart(
        self, leaves: list[Any], tree: Any, dims: list[Dim], halo: Sequence[int]
    ) -> tuple[Any] | None:
        """What the model makes of this rank's rows; None if on any rank some lack, or it raises.

        Then all is as before.
        """
        model, begin, before = self.model, random_states(), _State(self.model)
        self.middle = self.middle or middle(self.mesh.device_type, len(dims))
        with torch.no_grad():
            buffers = [(b, b.clone()) for b in model.buffers()]
        given = [self._wide(x, halo) if isinstance(x, ShardTensor) else x for x in leaves]
        # their gradients are summed over the ranks of the step, of which none is asked here
        plain = {k: p.detach() for k, p in model.named_parameters(remove_duplicate=False)}
        every: list[Any] = [None]
        # errors of the model are raised again where parts meet
        with suppress(Exception), _alone(), in_their_place(model, plain):
            made = made_by(model, model._call_impl, tree, given)
            outputs = [reduced(y) for y in made.outputs]
            every = [[cut_of(y) if isinstance(y, ShardTensor) else {} for y in outputs]]
        rank = self.mesh.get_rank()
        self.count += 1
        self.calls.turns.join(f"call {self.count}", self.mesh.size(), rank, _Told(), every)
        ends: list[Any] = [None]
        if None not in every:
            ends = [_ends([*cuts], self.mesh, dims) for cuts in zip(*every, strict=True)]
        if None in ends:
            before.put_back()
            with torch.no_grad():
                for b, was in buffers:
                    b.copy_(was)
            restore(begin)
            return None
        mine = [
            self._own(y, found) if isinstance(y, ShardTensor) else y
            for y, found in zip(outputs, ends, strict=True)
        ]
        return (made.tree.of(mine),)

    def _own(self, y: ShardTensor, ends: Any) -> ShardTensor:
        """The rows that are this rank's, of those that it made."""
        local, sizes = y._local, {}
        place = self.mesh.get_coordinate() or ()
        for d, (dim, (start, _)) in enumerate(zip(y._spec.dims, y._spec.spans, strict=True)):
            for k in dim.axes:
                a, b = ends[k][place[k] : place[k] + 2]
                local = local.narrow(d, a - start, b - a)
                sizes[d] = [b - a for a, b in zip(ends[k], ends[k][1:], strict=False)]
        return wrap(local, Spec.of(self.mesh, _places(y), y.shape, sizes))


class _State:
    """What modules hold in Python: their attributes, what lists, dicts and sets of these have."""

    def __init__(self, model: nn.Module) -> None:
        self.held: list[tuple[Any, Any]] = []
        seen = set[int]()
        waiting: list[Any] = [vars(m) for m in model.modules()]
        while waiting:
            x = waiting.pop()
            if not isinstance(x, (dict, list, tuple, set, deque, torch.Generator)) or id(x) in seen:
                continue
            seen.add(id(x))
            if isinstance(x, torch.Generator):
                self.held.append((x, x.get_state()))
                continue
            if not isinstance(x, tuple):
                self.held.append((x, dict(x) if isinstance(x, dict) else list(x)))
            waiting += x.values() if isinstance(x, dict) else x

    def put_back(self) -> None:
        """All as it was, in the same objects."""
        for x, was in self.held:
            if isinstance(x, torch.Generator):
                x.set_state(was)
                continue
            x.clear()
            if isinstance(x, (dict, set)):
                x.update(was)
            else:
                x.extend(was)


@contextmanager
def _alone() -> Iterator[None]:
    """Inside, other parts give this one nothing."""
    before = observers.alone()
    observers.thread.alone = True
    try:
        yield
    finally:
        observers.thread.alone = before


def _cut_alike(leaves: list[Any], mesh: DeviceMesh) -> list[Dim]:
    """By axis of the mesh the dim that it cuts, alike in all sharded tensors; none if not so."""
    found = []
    for x in leaves:
        if isinstance(x, ShardTensor):
            dims = sorted((d for d in x._spec.dims if d.axes), key=lambda d: d.axes)
            found.append(dims)
            axes = [d.axes for d in dims]
            alike = x._spec.mesh == mesh and axes == [(k,) for k in range(mesh.ndim)]
            if (
                not alike
                or x._spec.partial
                or dims != found[0]
                or not all(all(d.sizes) for d in dims)
            ):
                return []
    return found[0] if found else []


def _places(x: ShardTensor) -> list[dt.Placement]:
    """By axis, the dim that it cuts."""
    by_axis = {k: d for d, dim in enumerate(x._spec.dims) for k in dim.axes}
    return [dt.Shard(by_axis[k]) for k in sorted(by_axis)]


def _check(y: Any, axes: int) -> None:
    """Raise ValueError for an output of which no part has rows of its own."""
    if not isinstance(y, Tensor):
        check_plain(y)
    elif isinstance(y, ShardTensor) and len(cut_of(reduced(y))) < axes:
        raise ValueError("parts have the same rows")


def _name(x: Any) -> Any:
    """A value that is given, as far as it tells one call from another."""
    return x if isinstance(x, int | float | str | None) else type(x)


def _ends(cuts: list[Cuts], mesh: DeviceMesh, dims: list[Dim]) -> list[list[int]] | None:
    """By axis where an output is cut, as near to where the input is as the parts' rows allow.

    cuts: of all ranks. None where rows lack.
    """
    found = []
    for k, dim in enumerate(dims if cuts[0] else ()):
        ends, apart = [0], prod(mesh.shape[k + 1 :])
        stop = rows = 0
        for i in range(mesh.size(k)):
            start, end, rows = cuts[i * apart][k]
            if start > stop:
                return None
            if i:
                at = dim.offsets[i] * rows // dim.size
                ends.append(max(ends[-1], min(max(at, start), stop)))
            stop = end
        if stop < rows:
            return None
        found.append([*ends, rows])
    return found
