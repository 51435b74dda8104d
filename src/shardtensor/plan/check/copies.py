"""Copies of a model, one for each run, and random states that stay as they were."""

from __future__ import annotations

import copy
import random
import weakref
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from types import CellType, FunctionType, MethodType
from typing import Any

import numpy
import torch
from torch import Tensor, nn


def copied(model: nn.Module) -> nn.Module:
    """The model again, with weights and state of its own, without gradients.

    What TorchScript compiled is shared, as it has no state, and results that a module keeps from an
    earlier call are detached: no deepcopy takes either. Functions that close over the model, as
    hooks do, close over the copy here, as deepcopy does not let them.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            _note(module.__dict__, memo)
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            _kept(module.__dict__, memo)
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


def _kept(held: Any, memo: dict[int, Any]) -> Any:
    """What a copy holds, with its own functions in it; containers in place."""
    if isinstance(held, FunctionType):
        return _own(held, memo)
    if isinstance(held, MutableMapping):
        for k, v in list(held.items()):
            if (own := _kept(v, memo)) is not v:
                held[k] = own
    elif type(held) is list:
        held[:] = [_kept(v, memo) for v in held]
    return held


def _own(x: Any, memo: dict[int, Any]) -> Any:
    """What a copy has in the place of what a function closes over."""
    if id(x) in memo:
        return memo[id(x)]
    if isinstance(x, MethodType):
        return MethodType(x.__func__, _own(x.__self__, memo))
    if isinstance(x, weakref.ref):
        return weakref.ref(_own(x(), memo)) if id(x()) in memo else x
    if isinstance(x, CellType):
        memo[id(x)] = cell = CellType()
        with suppress(ValueError):
            # of an empty cell
            cell.cell_contents = _own(x.cell_contents, memo)
        return cell
    if not isinstance(x, FunctionType) or not (x.__closure__ or x.__defaults__ or x.__kwdefaults__):
        return x
    cells = None if x.__closure__ is None else tuple(_own(c, memo) for c in x.__closure__)
    defaults = tuple(_own(v, memo) for v in x.__defaults__ or ())
    memo[id(x)] = own = FunctionType(x.__code__, x.__globals__, x.__name__, defaults, cells)
    own.__kwdefaults__ = {k: _own(v, memo) for k, v in (x.__kwdefaults__ or {}).items()}
    own.__dict__.update(x.__dict__)
    return own


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
