"""Shards that are uneven on purpose: by the speed of ranks, the work of rows, or what was measured.

sizes = st.balance.sizes(721, 4, speeds=[1, 1, 1, 0.5], multiple=8)
x = st.distribute_tensor(x, mesh, [Shard(2)], sizes={2: sizes})
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .. import comm
from ..comm import wire
from ..containers import mapped
from ..cuts import cut
from ..observe.trace import Trace, trace
from ..shares import balanced as sizes
from ..shares import loads
from ..tensor import ShardTensor

__all__ = ["Balancer", "busy", "loads", "sizes"]
T = TypeVar("T")


class Balancer:
    """Sizes of a dim's shards that follow what the ranks take for them.

        balancer = st.balance.Balancer(721, mesh)
        for x, y in loader:
            x, y = balancer.cut((x, y))
            with balancer.step():
                loss = step(x, y)
            if balancer.changed:
                balancer.cut(model), balancer.cut(optimizer)

    size: rows of the dim; mesh: that on which tensors lie; axes: those that shard the dim, by name
    or number (default: all). weights, speeds, multiple, most: see `sizes`; speeds are a guess.

    Of every `every` steps `steps` are measured, not the first. Then all ranks of the mesh get each
    other's median, by one all-gather of a number, and so decide alike: of ranks that hold the same
    rows the slowest counts, and a rank's speed is the work of its rows over its time. `sizes`
    changes where that makes the slowest rank's time shorter by the share `gain`, which keeps it
    from following noise. A rank without rows is taken to be twice as fast as it was thought to be,
    each time, from 1/64 of the fastest on, so that it is tried again.

    sizes: those to be taken now; speeds: as far as known; changed: whether the last step, or call
    of `note`, changed the sizes. Every rank of the mesh makes it with the same arguments, and calls
    the same. Numbers do not depend on how a dim is cut; draws of random numbers do, but in
    `random.match_single_device`. Raises ValueError for arguments that do not fit.
    """

    axes: tuple[int, ...]
    changed: bool
    every: int
    gain: float
    mesh: DeviceMesh
    size: int
    sizes: tuple[int, ...]
    speeds: list[float]
    steps: int

    def __init__(
        self,
        size: int,
        mesh: DeviceMesh,
        *,
        axes: Sequence[int | str] | None = None,
        weights: Any = None,
        speeds: Sequence[float] | None = None,
        multiple: int = 1,
        most: int | Sequence[int] | None = None,
        steps: int = 8,
        every: int = 100,
        gain: float = 0.05,
    ) -> None:
        names = mesh.mesh_dim_names or ()
        every_axis = range(mesh.ndim)
        chosen = every_axis if axes is None else axes
        self.axes = tuple(
            sorted({every_axis[names.index(a) if isinstance(a, str) else a] for a in chosen})
        )
        self.mesh, self.size = mesh, size
        ranks = prod(mesh.size(a) for a in self.axes)
        self.speeds = [1.0] * ranks if speeds is None else [float(s) for s in speeds]
        if not 0 < steps < every or not 0 <= gain < 1:
            raise ValueError(
                f"steps {steps} of every {every} are measured, for a gain of {gain}: fewer than "
                "all, and a share below 1"
            )
        self.steps, self.every, self.gain = steps, every, gain
        self._by: dict[str, Any] = dict(weights=weights, multiple=multiple, most=most)
        self.sizes = sizes(size, ranks, speeds=self.speeds, **self._by)
        self.changed = False
        self._busy: list[float] = []
        # steps since sizes changed
        self._number = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step, or all of it that depends on the cut.

        One that is measured records a `trace`, which waits for a GPU at its end; that after the
        last of them communicates where it begins, and sizes change where it ends. A step in which
        one rank raised is left out of its median. Not to be used where ranks are simulated, of
        which one runs at a time: `note`.
        """
        begun, self._number = self._number, self._number + 1
        number, self.changed, found = begun % self.every, False, None
        if begun > self.steps and number == (self.steps + 1) % self.every:
            # not where a step ends, which one that raised may not do on all ranks
            found = self._of_all(self._busy)
        try:
            # the first finds out much that is kept
            if not 0 < number <= self.steps:
                yield
            else:
                with trace() as t:
                    yield
                self._busy.append(busy(t))
        finally:
            self.changed = found is not None and self._decide(found)

    def note(self, seconds: float) -> bool:
        """Count this rank's time of a step without what it waited, in the place of `step`.

        Whether sizes changed. Each `steps`-th call communicates.
        """
        self._busy.append(seconds)
        self.changed = False
        if len(self._busy) >= self.steps:
            self.changed = self._decide(self._of_all(self._busy))
        return self.changed

    def _of_all(self, busy: list[float]) -> list[float]:
        """The median seconds of each shard, of ranks that hold the same one the most; 0: unknown.

        busy: this rank's, which are used up.
        """
        mesh = self.mesh
        group = comm.group(mesh, tuple(range(mesh.ndim)))
        middle = sorted(busy)[len(busy) // 2] if busy else None
        busy.clear()
        # whole numbers are the same on all ranks, and so is what follows from them
        mine = [0 if middle is None else max(1, round(1e9 * middle))]
        found = wire.all_gather_table(mine, mesh.device_type, group).reshape(mesh.shape)
        others = tuple(a for a in range(mesh.ndim) if a not in self.axes)
        return [1e-9 * n for n in np.max(found, axis=others).ravel().tolist()]

    def _decide(self, seconds: Sequence[float]) -> bool:
        """Learn the speeds from the time of each shard; whether other sizes are worth it."""
        if not all(seconds):
            return False
        weights = self._by["weights"]
        work = loads(self.sizes, weights=weights)
        if not any(work):
            weights, work = None, loads(self.sizes)
        known = [w / s if w else None for w, s in zip(work, seconds, strict=True)]
        pairs = [(k, s) for k, s in zip(known, self.speeds, strict=True) if k is not None]
        if not pairs:
            return False
        best = max(k for k, _ in pairs)
        # of the unit in which they were given
        unit = sum(k for k, _ in pairs) / (sum(s for _, s in pairs) or 1.0)
        self.speeds = [
            min(best, max(2 * unit * s, best / 64)) if k is None else k
            for k, s in zip(known, self.speeds, strict=True)
        ]
        new = sizes(self.size, len(work), speeds=self.speeds, **self._by)
        now, then = (max(loads(c, weights=weights, speeds=self.speeds)) for c in (self.sizes, new))
        if not then < (1 - self.gain) * now:
            return False
        self.sizes, self._number = new, 0
        return True

    def cut(self, what: T) -> T:
        """The same, cut to `sizes`; nothing is sent where it is already.

        what: a ShardTensor, or containers of such, of which every dim that has `size` rows and is
        sharded by `axes` is cut anew, differentiably; other tensors stay as they are. A module: its
        buffers and parameters that are ShardTensors, in place, with their gradients. An optimizer:
        its state. A checkpoint needs nothing of this: it loads into whatever cut there is. Every
        rank of the mesh calls it.
        """
        if isinstance(what, nn.Module):
            self._cut_module(what)
        elif isinstance(what, torch.optim.Optimizer):
            for state in what.state.values():
                state.update(mapped(self._cut, dict(state)))
        else:
            return mapped(self._cut, what)
        return what

    def _cut(self, x: Any) -> Any:
        if not isinstance(x, ShardTensor) or x.device_mesh != self.mesh:
            return x
        dims = [
            d
            for d, dim in enumerate(x.spec.dims)
            if dim.size == self.size and dim.axes == self.axes and dim.sizes != self.sizes
        ]
        return x.redistribute(sizes=dict.fromkeys(dims, self.sizes)) if dims else x

    def _cut_module(self, model: nn.Module) -> None:
        made: dict[int, Any] = {}
        for module in model.modules():
            for key, x in module._buffers.items():
                if isinstance(x, ShardTensor):
                    if id(x) not in made:
                        made[id(x)] = self._cut(x)
                    module._buffers[key] = made[id(x)]
        for p in model.parameters():
            if isinstance(p, ShardTensor):
                self._cut_leaf(p)

    @torch.no_grad()
    def _cut_leaf(self, p: ShardTensor) -> None:
        """The same object, which optimizers know, on a leaf of other shards."""
        held, new = p.grad, self._cut(p.detach())
        if new.spec == p.spec:
            return
        old = p._local
        if old._backward_hooks or old._post_accumulate_grad_hooks:
            raise ValueError(
                f"hooks on a parameter of {p.spec} know its shards: remove them, and register them "
                "again after the cut"
            )
        p._local = new._local.detach().requires_grad_(old.requires_grad)
        p._spec, p._strides = new._spec, new._strides
        if held is not None:
            p.grad = self._cut(held)

    def state_dict(self) -> dict[str, list[float]]:
        """Plain values for a checkpoint: sizes and speeds."""
        return {"sizes": list(self.sizes), "speeds": list(self.speeds)}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on with the sizes and speeds of a checkpoint; of other numbers of ranks they stay.

        Raises ValueError for those of another dim.
        """
        given = cut(int(n) for n in state["sizes"])
        if given.offsets[-1] != self.size:
            raise ValueError(f"sizes {list(given)} of a dim of {self.size} rows")
        if len(given) == len(self.sizes):
            self.sizes, self.speeds = given, [float(s) for s in state["speeds"]]
            self._busy.clear()
            self._number = 0


def busy(t: Trace) -> float:
    """Seconds of a trace in which its rank was in no collective: at work, not waiting."""
    return t.end - t.begin - sum(s.seconds for s in t.sent)
