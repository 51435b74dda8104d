"""What one run of a model gives, on one device or on a rank: its results, and each op's."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...caller import is_library
from ...comm import counters
from ...containers import leaves
from ...ranks.tolerance import gap
from ...spec import Spec
from ...tensor import ShardTensor
from ...tensor.shard_tensor import wrap

# (module, its call, op or "", line, which of its results, which time)
Key = tuple[str, int, str, str, int, int]
_COARSE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}
_CASTS = {"float": "double", "half": "double", "bfloat16": "double", "cfloat": "cdouble"}


@dataclass
class Held:
    """A tensor as this rank has it, apart from what happens to it later."""

    local: Tensor
    shape: torch.Size
    spec: Spec | None = None

    @classmethod
    def of(cls, x: Tensor) -> Held:
        if isinstance(x, ShardTensor):
            return cls(x._local.detach().clone(), x.shape, x._spec)
        return cls(x.detach().clone(), x.shape)

    def added(self) -> Held:
        """Addends summed up, which all ranks must ask for alike; anything else as it is."""
        if self.spec is None or not self.spec.partial:
            return self
        return Held(wrap(self.local, self.spec).full_tensor(), self.shape)

    @cached_property
    def most(self) -> float:
        """The largest value."""
        return gap(self.local, self.local)[1]

    def part(self, whole: Tensor) -> Tensor:
        """What of the whole tensor this rank should have."""
        if self.spec is None or whole.shape != self.shape:
            return whole
        return whole[self.spec.block]


@dataclass
class Event:
    """The result of an op, or, with op "", an output of a module, and the gradient that came to it.

    With a negative number in its key: what the op took. readers: the keys of what took it.
    """

    key: Key
    held: Held
    gradient: Held | None = None
    readers: list[Key] = field(default_factory=list)

    @property
    def module(self) -> str:
        return self.key[0]

    @property
    def op(self) -> str:
        return self.key[2]

    @property
    def line(self) -> str:
        return self.key[3]


@dataclass
class Run:
    """results: outputs, gradients of inputs and weights, buffers, by name. events: if recorded."""

    results: dict[str, Held | None] = field(default_factory=dict)
    events: dict[Key, Event] = field(default_factory=dict)
    # what first took a weight, by name
    weights: dict[str, Key] = field(default_factory=dict)
    # the first result that is narrower than float64
    coarse: tuple[torch.dtype, str] | None = None
    # whether random numbers were drawn
    drawn: bool = False


def run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss: Callable[[Any], Tensor],
    found: Run,
    record: bool = False,
    around: AbstractContextManager[Any] | None = None,
) -> None:
    """Forward, inside of `around`, and backward. record: also what every op and module gives."""
    inputs = [(k, x) for k, x in leaves((args, kwargs)) if isinstance(x, Tensor)]
    if record:
        recorder = Recorder(found, model)
        with recorder, recorder.watching(model):
            out = model(*args, **kwargs)
    else:
        with around or nullcontext():
            out = model(*args, **kwargs)
    for path, x in leaves(out):
        if isinstance(x, bool | int | float):
            x = torch.tensor(x)
        if isinstance(x, Tensor):
            found.results[f"output{path}"] = Held.of(x)
    total = loss(out)
    if total.requires_grad:
        total.backward()
    for path, x in inputs:
        if x.requires_grad:
            g = x.grad
            found.results[f"gradient of input{path[3:]}"] = None if g is None else Held.of(g)
    for k, p in model.named_parameters():
        found.results[f"gradient {k}"] = None if p.grad is None else Held.of(p.grad)
    for k, b in model.named_buffers():
        found.results[f"buffer {k}"] = Held.of(b)


class Recorder(TorchFunctionMode):
    """Notes what every torch function gives that a model calls, sharded or not."""

    def __init__(self, found: Run, model: nn.Module) -> None:
        super().__init__()
        self.weights = {id(x): k for k, x in (*model.named_parameters(), *model.named_buffers())}
        self.found, self.on = found, True
        self.inside: list[tuple[str, int]] = [("the model", 0)]
        self.calls: Counter[str] = Counter()
        self.times: Counter[tuple[Any, ...]] = Counter()
        # by id of a tensor, which is kept: its events
        self.known: dict[int, tuple[Tensor, list[Event]]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "") or type(func).__name__
        # ops inside a rule are on local tensors
        on = self.on and not getattr(counters.current_op, "name", "")
        if on and name not in ("__get__", "__set__", "register_hook", "requires_grad_"):
            given = [x for _, x in leaves((args, kwargs or {})) if isinstance(x, Tensor)]
            self.note(name, _line(), out, given)
        return out

    def note(self, op: str, line: str, out: Any, given: list[Tensor]) -> None:
        """Enter the tensors of a result."""
        results = [x for _, x in leaves(out) if isinstance(x, Tensor)]
        if not results:
            return
        place = (*self.inside[-1], op, line)
        self.times[place] += 1
        for i, g in enumerate(given):
            if op and not any(x is g for x in results):
                known = self.known.get(id(g), (g, []))[1]
                held = known[-1].held if known else Held.of(g)
                key = (*place, -1 - i, self.times[place])
                self.found.events[key] = Event(key, held)
        for i, x in enumerate(results):
            key = (*place, i, self.times[place])
            event = Event(key, Held.of(x))
            self.found.events[key] = event
            if self.found.coarse is None and x.dtype in _COARSE:
                self.found.coarse = x.dtype, line
            if any(x is g for g in given) and op:
                # written in place: what the hooks of its former values get is of no one place
                for before in self.known.pop(id(x), (x, []))[1]:
                    before.readers.append(key)
                continue
            self.known.setdefault(id(x), (x, []))[1].append(event)
            if x.requires_grad and not x.is_leaf:
                x.register_hook(lambda g, event=event: _caught(event, g))
        for g in given:
            if id(g) in self.weights:
                self.found.weights.setdefault(self.weights[id(g)], (*place, 0, self.times[place]))
            for event in self.known.get(id(g), (g, []))[1]:
                event.readers.append((*place, 0, self.times[place]))

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Inside, outputs of modules are entered, too."""

        def enter(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                self.calls[name] += 1
                self.inside.append((name, self.calls[name]))

            return hook

        def leave(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, given: Any, out: Any) -> None:
                self.on = False
                if len(self.inside) > 1:
                    self.note("", "", out, [])
                    self.inside.pop()
                self.on = True

            return hook

        handles = []
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            handles.append(module.register_forward_pre_hook(enter(name or "the model")))
            handles.append(module.register_forward_hook(leave(name or "the model")))
        try:
            yield
        finally:
            for h in handles:
                h.remove()


def _caught(event: Event, g: Tensor | None) -> None:
    # of what a Function gives no gradient to there is none
    if g is not None:
        event.gradient = Held.of(g)


def _line() -> str:
    """file:line of the user's code inside the model, "" where it is all torch's."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not run.__code__:
        file = frame.f_code.co_filename
        if not (file.startswith("<") or is_library(file)):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


class Widened(TorchFunctionMode):
    """Code that casts to a narrower type computes in float64 all the same."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _CASTS and len(args) == 1 and not kwargs:
            return getattr(args[0], _CASTS[name])()
        if name != "view":
            args = tuple(map(_wide, args))
            kwargs = {k: _wide(v) for k, v in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _wide(x: Any) -> Any:
    return _COARSE.get(x, x) if isinstance(x, torch.dtype) else x


@contextmanager
def doubled() -> Iterator[None]:
    """Inside, tensors are made in float64 unless told otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
