"""Simulated ranks of one memory, with copies of one model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .. import _torch
from ..ranks.simulate import Turns, World
from ..ranks.testing import make_mesh
from ..settings import bringing
from ..tensor.random import match_single_device
from ..train.parallelize import parallelize
from .pager import Paged, Pager, Settled


class Ranks:
    """Ranks of a world that share a pager and the parameters' memory."""

    def __init__(self, model: nn.Module, parts: tuple[int, ...], pager: Pager) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.grad = torch.is_grad_enabled()
        self.random: Tensor | None = None
        modes, n = _modes_of_caller(), prod(parts)

        def rank() -> None:
            with ExitStack() as stack:
                for make in modes:
                    stack.enter_context(make())
                stack.enter_context(_torch.not_tracing())
                stack.enter_context(Settled(pager))
                stack.enter_context(Paged(pager))
                stack.enter_context(match_single_device())
                mesh = make_mesh(parts)
                mine = _replica(model)
                if self.grad and self.parameters:
                    parallelize(mine, mesh, sync=False)
                self.on_rank(mine, mesh)

        self.world = World(n, bringing(rank), (), _Latest(n, pager))

    def on_rank(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """What a rank does with its copy of the model."""
        raise NotImplementedError

    def go_on(self) -> None:
        """Run all ranks until they end, or leave to wait for what is outside."""
        self.world.go_on()
        if self.random is not None:
            # as the plain call leaves it
            torch.set_rng_state(self.random)
            self.random = None

    def ended_forward(self, model: nn.Module) -> None:
        """On the first rank: what the plain call leaves behind, beside its outputs."""
        self.random = torch.get_rng_state()
        mine = dict(model.named_buffers())
        with torch.no_grad():
            for name, b in self.model.named_buffers():
                if name in mine and mine[name].shape == b.shape:
                    b.copy_(mine[name])

    def gradients(self, model: nn.Module) -> list[Tensor | None]:
        """Of the model's trained parameters, in memory of their own."""
        found = [p.grad for p in model.parameters() if p.requires_grad]
        with _torch.outside_modes():
            return [None if g is None else g.detach().clone() for g in found]


class _Latest(Turns):
    """Ranks of one memory: that which stopped last goes on first, as most of it is there still."""

    def __init__(self, world_size: int, pager: Pager) -> None:
        super().__init__(world_size)
        self.pager = pager
        self.stopped = list(range(world_size))[::-1]

    def order(self, rank: int) -> Iterable[int]:
        self.stopped.remove(rank)
        self.stopped.append(rank)
        return [*self.stopped[-2::-1], rank]

    def work(self, collective: Any, datas: list[Any]) -> None:
        with Paged(self.pager):
            collective.work(datas)


def _modes_of_caller() -> list[Callable[[], AbstractContextManager[Any]]]:
    """What makes this thread's autograd and autocast in another one."""
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    cast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    kept = torch.is_autocast_cache_enabled()
    return [
        lambda: torch.inference_mode(inference),
        lambda: torch.set_grad_enabled(grad),
        lambda: torch.autocast("cpu", dtype=dtype, enabled=cast, cache_enabled=kept),
    ]


def _replica(model: nn.Module) -> nn.Module:
    """The model on the same parameters' memory, with gradients, buffers and state of its own."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, memo)
