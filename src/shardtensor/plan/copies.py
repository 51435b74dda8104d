"""Copies of a model, one for each run, and random states that stay as they were."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn


def copied(model: nn.Module) -> nn.Module:
    """The model again, with weights and state of its own, without gradients.

    What TorchScript compiled is shared, as it has no state, and results that a module keeps from an
    earlier call are detached: no deepcopy takes either.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            _note(module.__dict__, memo)
    twin = copy.deepcopy(model, memo)
    for p in twin.parameters():
        if not p.is_leaf:
            # those of a scripted module are copied as a result of the original's
            p.detach_().requires_grad_()
        p.grad = None
    return twin


def _note(x: Any, memo: dict[int, Any]) -> None:
    """Enter what of an attribute is not to be copied as it is."""
    if isinstance(x, torch.jit.ScriptFunction):
        memo[id(x)] = x
    elif isinstance(x, Tensor):
        if not x.is_leaf:
            memo[id(x)] = x.detach().clone()
    elif isinstance(x, Mapping):
        for v in list(x.values()):
            _note(v, memo)
    elif isinstance(x, list | tuple):
        for v in x:
            _note(v, memo)


def casts(model: nn.Module) -> bool:
    """Whether TorchScript inside casts to a dtype, which nobody sees from outside."""
    found = []
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            found += [getattr(module, "inlined_graph", "")]
        else:
            found += [
                x.inlined_graph
                for x in module.__dict__.values()
                if isinstance(x, torch.jit.ScriptFunction)
            ]
    return any(f"aten::{op}(" in str(graph) for graph in found for op in ("to", "float", "half"))


def seed(number: int) -> None:
    """Of all generators that models draw from."""
    torch.manual_seed(number)
    random.seed(number)
    numpy.random.seed(number)


def states(model: nn.Module) -> tuple[Any, ...]:
    """Those of all generators, to be compared."""
    _, key, *rest = numpy.random.get_state()
    found = [torch.get_rng_state().tolist(), random.getstate(), list(key), rest]
    gpus = {x.device for x in (*model.parameters(), *model.buffers()) if x.is_cuda}
    return *found, *(torch.cuda.get_rng_state(d).tolist() for d in gpus)


@contextmanager
def left_alone(model: nn.Module, inputs: Sequence[Tensor]) -> Iterator[None]:
    """Random states after are those before."""
    on = {x.device for x in (*model.parameters(), *model.buffers(), *inputs)}
    state, other = random.getstate(), numpy.random.get_state()
    gpus = sorted(d.index for d in on if d.type == "cuda" and d.index is not None)
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(state)
        numpy.random.set_state(other)
