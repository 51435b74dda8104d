"""The optimizer's step: run on the weights of one layout, booked alike for those with the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...later import dt
from ..tree import OPTIMIZER
from .ledger import Ledger, local


@dataclass
class Booked:
    """What a step allocates, releases and computes, and the bytes of the state that it keeps.

    moves: (number from the step's first on, signed bytes, ops of the step before it).
    """

    states: list[int]
    moves: list[tuple[int, int, int]]
    work: list[Any]


class Update:
    """Called at the end of a step, it updates weights and drops their gradients.

    known: by weights' forms, what a step books; ones with an entry are not run. A step that sends,
    keeps more than before or reads values gets none. lists: whether it works on lists of weights,
    as torch does by default on GPUs.
    """

    def __init__(
        self,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        weights: Sequence[nn.Parameter],
        ledger: Ledger,
        known: dict[Any, Booked],
        lists: bool,
    ) -> None:
        self.weights, self.ledger, self.known = weights, ledger, known
        self.key = lists, *map(_form, weights)
        self.assumed = len(ledger.known.assumed)
        found = known.get(self.key)
        if found is None:
            self.optimizer = optimizer(weights)
            if lists:
                _on_lists(self.optimizer)
            self._begin()
        else:
            for nbytes in found.states:
                ledger.enter(nbytes, "optimizer")

    def _begin(self) -> None:
        """A first step, so that the optimizer has its state."""
        known = self.ledger.known
        for p in self.weights:
            p.grad = torch.zeros_like(p)
            known.forget(local(p.grad))
        with known.kept(map(local, self.weights)):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ledger.mark("optimizer", self._states())

    def _states(self) -> list[Tensor]:
        found = (v for s in self.optimizer.state.values() for v in s.values())
        return [v for v in found if isinstance(v, Tensor)]

    def __call__(self) -> None:
        found = self.known.get(self.key)
        with self.ledger.places.at(OPTIMIZER):
            if found is not None:
                self.ledger.repeat(found.moves, found.work)
            else:
                self._run()
        for p in self.weights:
            p.grad = None

    def _run(self) -> None:
        ledger = self.ledger
        moves, work, first = len(ledger.moves), len(ledger.work), ledger.next
        sent = len(ledger.sent), len(ledger.heard)
        self.optimizer.step()
        booked = ledger.moves[moves:]
        when = [n - work for n in ledger.when[moves:]]
        own = all(n >= first for n, _ in booked) and not sum(b for _, b in booked)
        quiet = sent == (len(ledger.sent), len(ledger.heard))
        if own and quiet and self.assumed == len(ledger.known.assumed):
            memory = {local(v).untyped_storage() for v in self._states()}
            self.known[self.key] = Booked(
                [m.nbytes() for m in memory],
                [(n - first, b, t) for (n, b), t in zip(booked, when, strict=True)],
                ledger.work[work:],
            )


def _on_lists(optimizer: torch.optim.Optimizer) -> None:
    """Where the user chose no way, that of weights on a GPU."""
    for group in optimizer.param_groups:
        chosen = group.get("fused") or group.get("differentiable")
        if group.get("foreach", False) is None and not chosen:
            group["foreach"] = True


def _form(p: nn.Parameter) -> Any:
    x = local(p)
    placed = (p.shape, p.placements) if isinstance(p, dt.DTensor) else None
    return x.shape, x.stride(), x.dtype, p.dtype, placed
