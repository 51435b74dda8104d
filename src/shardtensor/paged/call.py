"""One call of a model in parts, as one node of autograd."""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from .. import _torch
from ..containers import flatten
from ..errors import RankError, UnsupportedOpError
from ..later import dt
from ..tensor import ShardTensor
from ..tensor.construct import distribute_tensor
from ..tensor.redistribute import reduced
from ..tensor.shard_tensor import wrap
from .pager import Pager
from .parts import hides
from .ranks import Ranks, alike, kept, lies, own, state

# calls whose outputs went where ranks could not be ended
_left: list[OneCall] = []


class OneCall(Ranks):
    """One call: what it was given, what it gave, and what comes to both in backward.

    again: whether backward makes anew what forward did, so that all it reads must be as it was.
    """

    again = False

    def __init__(
        self,
        model: nn.Module,
        parts: tuple[int, ...],
        dims: tuple[int, ...],
        pager: Pager,
        given: Any,
    ) -> None:
        leaves, self.tree = flatten(given)
        self.leaves = leaves
        self.tensors = [x for x in leaves if isinstance(x, Tensor)]
        self.dims = dims
        # of the outputs: whole tensors by number, else what the first part gave
        self.found: list[Any] = []
        # which are tensors, and which of these have a gradient
        self.kinds: list[bool] = []
        self.followed: list[bool] = []
        self.out_tree: Any = None
        # by number of the output, of the given tensor, and of the parameter
        self.cotangents: list[Tensor | None] = []
        self.of_inputs: list[Tensor | None] = [None] * len(self.tensors)
        super().__init__(model, parts, pager)
        self.of_parameters: list[Tensor | None] = [None] * len(self.parameters)

    def gave(self, outputs: list[Any], tree: Any) -> None:
        """Note the form of what the model returned."""
        self.out_tree = tree
        self.kinds = [isinstance(y, Tensor) for y in outputs]
        self.followed = [y.requires_grad for y in outputs if isinstance(y, Tensor)]

    def rebuilt(self, outputs: tuple[Tensor, ...]) -> Any:
        """What the model gave, with these tensors."""
        tensors = iter(outputs)
        leaves = [
            next(tensors) if kind else y for y, kind in zip(self.found, self.kinds, strict=True)
        ]
        self.found = []
        return self.out_tree.of(leaves)

    def end(self) -> None:
        """End ranks that wait for a backward that will not come."""
        if self.world.ended:
            return
        self.world.turns.stuck = RankError("the output of a tiled call is gone")
        with suppress(RankError):
            self.go_on()


class Session(OneCall):
    """A call whose parts meet: its ranks wait for what comes to the outputs in backward."""

    def on_rank(self, model: nn.Module, mesh: DeviceMesh) -> None:
        given = [self._placed(x, mesh) for x in self.tensors]
        tensors = iter(given)
        leaves = [next(tensors) if isinstance(x, Tensor) else own(x) for x in self.leaves]
        before = [state(x) for x in given]
        args, kwargs = self.tree.of(leaves)
        outputs, tree = flatten(model(*args, **kwargs))
        first = mesh.get_rank() == 0
        self.unwritten()
        self._changed(given, before, leaves, first)
        del args, kwargs, leaves
        outputs = [reduced(y) for y in outputs]
        self.ended_forward(model, first)
        if first:
            self.gave(outputs, tree)
        self._deliver(outputs, first)
        if not any(isinstance(y, Tensor) and y.requires_grad for y in outputs):
            return
        self.world.turns.leave()
        pairs = [
            (y, _like(y, g))
            for y, g in zip(outputs, self.cotangents, strict=True)
            if g is not None and y.requires_grad
        ]
        del outputs
        # nodes hold what they need
        torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])
        for i, x in enumerate(given):
            if x.grad is not None:
                self._gather(self.of_inputs, i, x.grad, x, first)
        if first:
            self.of_parameters = self.gradients(model)

    def _placed(self, x: Tensor, mesh: DeviceMesh) -> Tensor:
        """This rank's part of a given tensor, or all of it, with gradients of its own."""
        # inference tensors do not tell that they were written to
        with torch.inference_mode(False), torch.set_grad_enabled(self.grad):
            if x.is_inference():
                x = x.clone()
            if not alike(x, self.tensors[0], self.dims):
                return x.detach().requires_grad_(x.requires_grad and self.grad)
            made = distribute_tensor(x, mesh, [dt.Shard(d) for d in self.dims], src_data_rank=None)
            return made.requires_grad_(x.requires_grad and self.grad)

    @torch.no_grad()
    def _changed(
        self, given: list[Tensor], before: list[Any], leaves: list[Any], first: bool
    ) -> None:
        """Tell the caller what the model did to what it was given."""
        for x, y, was in zip(self.tensors, given, before, strict=True):
            if state(y) == was:
                continue
            if not isinstance(y, ShardTensor):
                raise UnsupportedOpError(
                    f"tiled: the model writes to a tensor of shape {list(x.shape)} that each part "
                    "has whole: x.clone() in forward first"
                )
            if sum(not _memory(x).isdisjoint(_memory(other)) for other in self.tensors) > 1:
                raise UnsupportedOpError(
                    f"tiled: the model writes to a tensor of shape {list(x.shape)}, and is given "
                    "its memory in another argument, too: give clones"
                )
            self.after.append(partial(x.detach()[y._spec.block].copy_, y.to_local()))
        if first:
            self.advance(self.leaves, leaves)

    def _deliver(self, outputs: list[Any], first: bool) -> None:
        """Put this rank's part of the outputs where the whole ones are made."""
        self.found += [None] * (len(outputs) - len(self.found))
        for i, y in enumerate(outputs):
            if isinstance(y, Tensor):
                self._gather(self.found, i, y, y, first)
            elif hides(y):
                raise UnsupportedOpError(
                    f"tiled: the model returns tensors in a {type(y).__name__}: return them in a "
                    "tuple, list, dict or dataclass, or register it with torch.utils._pytree"
                )
            elif first:
                self.found[i] = y

    @torch.no_grad()
    def _gather(self, wholes: list[Any], i: int, y: Tensor, like: Tensor, first: bool) -> None:
        """Write this rank's part of a tensor that is cut like another into the i-th whole one."""
        if not isinstance(y, ShardTensor):
            if first:
                wholes[i] = kept(y.detach())
            return
        if isinstance(like, ShardTensor) and y._spec != like._spec:
            y = y.redistribute(like.device_mesh, like.placements)
        if wholes[i] is None:
            with _torch.outside_modes():
                wholes[i] = torch.empty_strided(y.shape, lies(y), dtype=y.dtype, device=y.device)
        wholes[i][y._spec.block].copy_(y.to_local())


class _Waiting:
    """What autograd keeps of a call: without it its ranks end."""

    def __init__(self, session: OneCall) -> None:
        self.session = session

    def __del__(self) -> None:
        _left.append(self.session)
        if threading.current_thread() is threading.main_thread() and not sys.is_finalizing():
            end_left()


class Call(torch.autograd.Function):
    """A call as one node of autograd: (what ran, given tensors, parameters) to output tensors."""

    @staticmethod
    def forward(ctx: Any, session: OneCall, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.materialize_grads = False
        if not session.world.ended:
            ctx.waiting = _Waiting(session)
            if session.again:
                ctx.save_for_backward(*given)
        outputs = tuple(y for y in session.found if isinstance(y, Tensor))
        pairs = zip(outputs, session.followed, strict=True)
        ctx.mark_non_differentiable(*(y for y, followed in pairs if not followed))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        session: OneCall = ctx.waiting.session
        if session.world.ended:
            raise RuntimeError(
                "backward through a tiled call a second time: its ranks have ended; call it again"
            )
        # raises where they were written to
        _ = ctx.saved_tensors
        arrived = iter(cotangents)
        session.cotangents = [next(arrived) if kind else None for kind in session.kinds]
        session.go_on()
        return None, *session.of_inputs, *session.of_parameters


def _memory(x: Tensor) -> set[int]:
    """The names of the storages that a tensor lies in."""
    return {_torch.storage(part)._cdata for part in _torch.dense_parts(x)}


def _like(y: Tensor, g: Tensor) -> Tensor:
    """This rank's part of a whole cotangent."""
    return wrap(g[y._spec.block], y._spec) if isinstance(y, ShardTensor) else g


def end_left() -> None:
    while _left:
        _left.pop().end()
