"""What every module of a model gives in one run: its outputs, and the gradients that reach them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..ranks.testing import full, tensors


@dataclass
class Seen:
    """One output tensor of one call of a module. value, gradient: global, detached."""

    module: str
    value: Tensor
    gradient: Tensor | None = None


@dataclass
class Run:
    """One run of a model: outputs of modules in the order of execution, inner ones first."""

    seen: list[Seen] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    # the modules whose forward is running, outermost first
    inside: list[str] = field(default_factory=list)


def run(model: nn.Module, args: tuple[Any, ...], loss: Callable[[Any], Tensor], found: Run) -> None:
    """Forward and backward; what was seen before an exception stays in `found`."""
    pending: list[tuple[Seen, list[Tensor]]] = []
    with watched(model, found, pending):
        out = model(*args)
        found.outputs = [full(x) for x in tensors(out)]
        total = loss(out)
        if total.requires_grad:
            total.backward()
    for seen, caught in pending:
        # of an output that is used several times, the hook is called once, with the sum
        seen.gradient = full(caught[-1]) if caught else None
    found.gradients = {
        k: None if p.grad is None else full(p.grad) for k, p in model.named_parameters()
    }
    for i, x in enumerate(args):
        if isinstance(x, Tensor) and x.requires_grad:
            found.gradients[f"input {i}"] = None if x.grad is None else full(x.grad)
    found.buffers = {k: full(b) for k, b in model.named_buffers()}


@contextmanager
def watched(
    model: nn.Module, found: Run, pending: list[tuple[Seen, list[Tensor]]]
) -> Iterator[None]:
    """Inside, every module's outputs are noted, and hooks wait for their gradients."""

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: found.inside.append(name)

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, out: Any) -> None:
            found.inside.pop()
            for x in tensors(out):
                seen = Seen(name, full(x).clone())
                found.seen.append(seen)
                if x.requires_grad and not x.is_leaf:
                    caught: list[Tensor] = []
                    x.register_hook(lambda g, caught=caught: caught.append(g.detach()))
                    pending.append((seen, caught))

        return hook

    handles = []
    for name, module in model.named_modules():
        # a ModuleList and the like are never called
        handles.append(module.register_forward_pre_hook(enter(name or "the model")))
        handles.append(module.register_forward_hook(leave(name or "the model")))
    try:
        yield
    finally:
        for h in handles:
            h.remove()
