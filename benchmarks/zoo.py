"""How a model of the zoo is made, run and judged against the same model on one device.

In float64, where rounding is far below any fault: values within 1e-9, gradients within 1e-7 of
their norm. A model that casts to a narrower type inside is judged with those casts made wider; one
that cannot be, in float32, and its row says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from zoo_models import MODELS

import shardtensor as st
from shardtensor.plan.check.record import Widened
from shardtensor.ranks.testing import full, make_mesh

# (value, gradient) by how a model is judged
CLOSE = {"": (1e-9, 1e-7), "casts widened": (1e-9, 1e-7), "in fp32": (1e-4, 1e-2)}
WIDE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def prepared(name: str, double: bool = True) -> nn.Module:
    """The model in eval mode, its zero weights made random: zero heads would hide every error."""
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and not p.any():
                p.normal_(0, 0.02)
    return model._apply(lambda t: t.to(WIDE.get(t.dtype, t.dtype))) if double else model


def sample(name: str, double: bool = True) -> Tensor:
    """Its input."""
    x = torch.randn(*MODELS[name][1], generator=torch.Generator().manual_seed(1))
    return x.double() if double else x


def uneven(n: int, ranks: int) -> list[int]:
    """Shards of which none is a multiple of a usual stride, the first the largest."""
    rest = [max(1, n // ranks - 3)] * (ranks - 1)
    return [n - sum(rest), *rest]


def spread(name: str, x: Tensor, ranks: int, cut: bool = False) -> st.ShardTensor:
    """The input on this rank. cut: in uneven shards."""
    dim = MODELS[name][2]
    sizes = {dim: uneven(x.shape[dim], ranks)} if cut else None
    return st.distribute_tensor(
        x, make_mesh((ranks,)), [Shard(dim)], src_data_rank=None, sizes=sizes
    )


def step(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Forward and backward of a mean square."""
    y = model(x)
    (y**2).mean().backward()
    return y.detach()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of all parameters, and of the input."""
    found = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return {k: full(g) for k, g in {**found, "input": x.grad}.items() if g is not None}


def error(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    """The norm of the difference over that of what is wanted."""
    if got.shape != want.shape:
        return float("inf")
    least = floor * want.numel() ** 0.5
    return float((got - want).norm() / max(float(want.norm()), least, 1e-300))


@dataclass
class Case:
    """A model on one device, in one of the ways of CLOSE: what it gives, and its twins' errors."""

    name: str
    how: str = ""
    model: nn.Module = field(init=False)
    x: Tensor = field(init=False)
    value: Tensor = field(init=False)
    wanted: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        double = self.how != "in fp32"
        # never called: some models keep tables between calls, with the graph that made them
        self.model, self.x = prepared(self.name, double), sample(self.name, double)
        model, plain = copy.deepcopy(self.model), self.x.clone().requires_grad_()
        with self.asked():
            self.value = step(model, plain)
        self.wanted = gradients(model, plain)

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Where the model is to run."""
        with ExitStack() as stack:
            if self.how == "casts widened":
                stack.enter_context(Widened())
            yield

    def errors(self, got: Tensor, found: dict[str, Tensor]) -> dict[str, Any]:
        """value, gradient, result: "right" or what is wrong."""
        largest = max(float(g.abs().max()) for g in self.wanted.values())
        missing = [k for k in self.wanted if k not in found]
        worst = {
            k: error(found[k], g, 1e-6 * largest) for k, g in self.wanted.items() if k in found
        }
        most = max(worst, key=lambda k: worst[k])
        value = error(got, self.value)
        for_value, for_gradient = CLOSE[self.how]
        result = "right"
        if missing:
            result = f"WRONG: no gradient of {missing[0]}"
        elif not value < for_value:
            result = f"WRONG: its value by {value:.0e}"
        elif not worst[most] < for_gradient:
            result = f"WRONG: the gradient of {most} by {worst[most]:.0e}"
        return {"result": result, "value": value, "gradient": worst[most]}

    def on_rank(self, ranks: int, cut: bool) -> dict[str, Any]:
        """This rank's run against that on one device."""
        model, x = copy.deepcopy(self.model), spread(self.name, self.x, ranks, cut)
        x.requires_grad_()
        with self.asked(), st.trace() as t:
            got = step(model, x)
        row = self.errors(full(got), gradients(model, x))
        gathers = sorted({op for op, _ in t.gathered})
        return {**row, "bytes": t.bytes, "gathers": gathers}

    def sharded(self, ranks: int, cut: bool = False) -> dict[str, Any]:
        """The same of the worst of simulated ranks."""
        rows = st.simulate(ranks, self.on_rank, ranks, cut)
        return next((r for r in rows if r["result"] != "right"), rows[0])
