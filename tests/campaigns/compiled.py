"""Small modules under `st.compile`, whose Python state changes between calls, against eager plain PyTorch.

Attributes, closures, hooks added later, parts replaced, buffers, views, in-place ops, Functions of the
user, values that Python branches on, random ops: outputs, gradients, buffers and counters of every call.
"""

from __future__ import annotations

import itertools
import random
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.utils.checkpoint import checkpoint

import shardtensor as st

D = torch.float64
# a case compiles several programs: as many times fewer of them are tried
COST = 20
WIDTH = 4
ACTIVATIONS = (torch.tanh, torch.sigmoid, F.softplus, torch.cos)


class Scale(torch.autograd.Function):
    """Its backward is not the derivative, so that who loses it is seen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.k = k
        return x * k

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return g * ctx.k + x * 0.1, None


class Part(nn.Module):
    """What it computes (body), the state that it begins with, and what changes from call to call."""

    def __init__(self, init: Callable[[Any], None], body: Any, change: Any) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH, dtype=D)
        self.body, self.change = body, change
        init(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def put(**values: Any) -> Callable[[Any], None]:
    return lambda m: [setattr(m, k, v() if callable(v) else v) for k, v in values.items()]  # type: ignore[func-returns-value]


def nothing(m: Any, i: int) -> None:
    pass


def added(m: Any, x: Tensor) -> Tensor:
    y = m.lin(x)
    y += m.k
    y[..., 0] = x[..., 1] * m.k
    return y


def counting(m: Any, x: Tensor) -> Tensor:
    m.n += 1
    return m.lin(x) * m.n


def keeping(m: Any, x: Tensor) -> Tensor:
    m.last = m.lin(x)
    return m.last * 2


def averaging(m: Any, x: Tensor) -> Tensor:
    if m.training:
        m.mean.mul_(0.5).add_(x.detach().mean())
    return x - m.mean


def scaling(m: Any, x: Tensor) -> Tensor:
    y = x * (m.mean + 1)
    with torch.no_grad():
        m.mean.mul_(0.5).add_(x.detach().mean())
    return y.sin() * m.mean.exp()


def replacing(m: Any, x: Tensor) -> Tensor:
    m.mean = m.mean * 0.5 + m.lin.weight.detach().mean(0)
    return x - m.mean


def numbered(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    return m.lin(x) / m.calls


def hooked(m: Any, x: Tensor) -> Tensor:
    y = m.lin(x)
    y.register_hook(lambda g: g * 2)
    return y


def branching(m: Any, x: Tensor) -> Tensor:
    return m.lin(x) if x.sum() > m.k else x * 2


def path_dropped(m: Any, x: Tensor) -> Tensor:
    kept = x.new_empty((x.shape[0], *[1] * (x.ndim - 1))).bernoulli_(0.6)
    return m.lin(x) * kept.div_(0.6)


def detached(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        k = m.lin(x).mean()
    return x * k + x.detach()


def closed(m: Any) -> None:
    k = [1.0]

    def inner(x: Tensor) -> Tensor:
        return x * k[0]

    m.inner, m.cell = inner, k


def deeper(m: Any) -> None:
    m.config = types.SimpleNamespace(k=2.0, d={"a": [1.0, 2]})


def swapped(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.lin(x)[..., :2], x.flip(-1)[..., :2]], -1)


def one_more(m: Any, i: int) -> None:
    m.lin.register_forward_hook(lambda mod, a, y: y * (1 + 0.5 * i))


def before(m: Any, i: int) -> None:
    m.register_forward_pre_hook(lambda mod, a: (a[0] + i,))


def another(m: Any, i: int) -> None:
    torch.manual_seed(i)
    m.lin = nn.Linear(WIDTH, WIDTH, dtype=D)


def set_k(m: Any, i: int) -> None:
    m.k = (3.0, 2, True, -1.5, 3.0)[i % 5]


PARTS: dict[str, tuple[Any, Any, Any]] = {
    "attribute": (put(k=2.0), lambda m, x: m.lin(x) * m.k, set_k),
    "in place": (put(k=2.0), added, set_k),
    "closure": (closed, lambda m, x: m.lin(m.inner(x)), lambda m, i: m.cell.__setitem__(0, 2.0 + i)),
    "config": (deeper, lambda m, x: m.lin(x) * m.config.k + m.config.d["a"][0], lambda m, i: m.config.d["a"].__setitem__(0, 0.1 * i)),
    "hook": (put(), lambda m, x: m.lin(x), one_more), "hook before": (put(), lambda m, x: m.lin(x), before),
    "another part": (put(), lambda m, x: m.lin(x), another),
    "function": (put(i=0), lambda m, x: ACTIVATIONS[m.i](m.lin(x)), lambda m, i: setattr(m, "i", i % 4)),
    "frozen": (put(), lambda m, x: m.lin(x), lambda m, i: m.lin.weight.requires_grad_(bool(i % 2))),
    "Function": (put(k=2.0), lambda m, x: Scale.apply(m.lin(x), m.k), set_k),
    "counter": (put(n=0), counting, nothing), "kept": (put(last=None), keeping, nothing),
    "buffer": (lambda m: m.register_buffer("mean", torch.zeros(WIDTH, dtype=D)), averaging, nothing),
    "buffer as a factor": (lambda m: m.register_buffer("mean", torch.zeros(WIDTH, dtype=D)), scaling, nothing),
    "buffer replaced": (lambda m: m.register_buffer("mean", torch.zeros(WIDTH, dtype=D)), replacing, nothing),
    "number in a buffer": (lambda m: m.register_buffer("calls", torch.zeros((), dtype=D)), numbered, nothing),
    "hook on a tensor": (put(), hooked, nothing), "branch": (put(k=0.0), branching, set_k),
    "no_grad": (put(), detached, nothing), "view": (put(), lambda m, x: m.lin(x.unflatten(-1, (2, 2)).mT.flatten(-2)), nothing),
    "transpose": (put(), lambda m, x: m.lin(x).transpose(0, 1).contiguous().transpose(0, 1), nothing),
    "rows": (put(k=1), lambda m, x: m.lin(x).roll(int(m.k), 0), set_k), "cat": (put(), swapped, nothing),
    "norm": (put(norm=lambda: nn.LayerNorm(WIDTH, dtype=D)), lambda m, x: m.norm(m.lin(x)), nothing),
    "batch norm": (put(norm=lambda: nn.BatchNorm1d(WIDTH, dtype=D)), lambda m, x: m.norm(x.flatten(0, -2)).reshape(x.shape), nothing),
    "softmax": (put(), lambda m, x: m.lin(x.softmax(0)), nothing), "sums": (put(), lambda m, x: m.lin(x) - x.sum(0, keepdim=True) / x.mean(), nothing),
    "attention": (put(), lambda m, x: F.scaled_dot_product_attention(m.lin(x), x, x), nothing),
    "conv": (put(conv=lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1, dtype=D)), lambda m, x: m.conv(x.mT).mT, nothing),
    "checkpoint": (put(), lambda m, x: checkpoint(m.lin, x, use_reentrant=False), nothing),
    "dropout": (put(k=0.0), lambda m, x: F.dropout(m.lin(x), 0.0), nothing), "dropout in eval": (put(), lambda m, x: F.dropout(m.lin(x), 0.5, m.lin.training and False), nothing),
    "train": (put(), lambda m, x: m.lin(x) * (2.0 if m.training else 3.0), lambda m, i: m.train(bool(i % 2))),
    "tensor": (put(t=lambda: torch.ones(WIDTH, dtype=D)), lambda m, x: m.lin(x) * m.t, lambda m, i: setattr(m, "t", torch.full((WIDTH,), 1.0 + i, dtype=D))),
    "tensor in place": (put(t=lambda: torch.ones(WIDTH, dtype=D)), lambda m, x: m.lin(x) * m.t, lambda m, i: m.t.add_(0.5)),
    "shape": (put(), lambda m, x: m.lin(x) * x.shape[0] if x.shape[0] > 5 else m.lin(x), nothing),
    "mask": (put(k=0.0), lambda m, x: torch.where(x > m.k, m.lin(x), 0.1), set_k), "einsum": (put(), lambda m, x: torch.einsum("...i,oi->...o", x, m.lin.weight), nothing),
    "weight": (put(), lambda m, x: F.linear(x, m.lin.weight * 2, m.lin.bias), lambda m, i: m.lin.weight.data.mul_(1.1)),
    "drawn: dropout": (put(k=2.0), lambda m, x: F.dropout(m.lin(x) * m.k, 0.4), set_k),
    "drawn: noise": (put(), lambda m, x: x * torch.rand_like(x) + torch.randn_like(m.lin(x)), nothing),
    "drawn: path": (put(), path_dropped, nothing), "drawn: channels": (put(), lambda m, x: F.dropout1d(m.lin(x), 0.3), nothing),
    "drawn: alike": (put(), lambda m, x: m.lin(x) * torch.rand(WIDTH, dtype=D) * torch.randperm(WIDTH), nothing),
    "drawn: bernoulli": (put(), lambda m, x: m.lin(x) * torch.bernoulli(x.detach().sigmoid()), nothing),
    "drawn: seeded": (put(), lambda m, x: (torch.manual_seed(2), F.dropout(m.lin(x), 0.3))[1], nothing),
}  # fmt: skip


class Model(nn.Module):
    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Part(*PARTS[n]) for n in names)
        self.scale = 1.0

    def forward(self, x: Tensor, shift: Any = 0.0, memory: Tensor | None = None) -> dict[str, Any]:
        for part in self.parts:
            x = x + part(x)
        if memory is not None:
            memory.mul_(0.5).add_(x.detach())
        return {"out": x * self.scale + shift, "norm": x.square().mean()}


@dataclass(frozen=True)
class Case:
    """Calls of a model of some parts; before each call but the first some of them change."""

    mesh: tuple[int, ...]
    parts: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    changed: tuple[tuple[int, ...], ...]
    shifts: tuple[float, ...]
    ways: tuple[str, ...]
    function: bool
    dims: tuple[int, ...]
    uneven: bool
    backend: str

    rtol = 1e-9
    atol = 1e-11

    def _run(self, place: Callable[[Tensor], Tensor], compiled: Callable[[Any], Any]) -> Any:
        torch.manual_seed(1)
        model = Model(self.parts)
        fn, found = compiled((lambda *args: model(*args)) if self.function else model), []
        memory = None
        for i, (shape, changed) in enumerate(zip(self.shapes, self.changed, strict=True)):
            for at in changed:
                model.parts[at].change(model.parts[at], i)
            numel = torch.Size(shape).numel()
            x = place(torch.linspace(-1, 2, numel, dtype=D).sin().reshape(shape)).requires_grad_()
            given: tuple[Any, ...] = () if not self.shifts[i] else (self.shifts[i],)
            way = self.ways[i]
            if way == "memory":
                memory = place(torch.ones(shape, dtype=D))
                given = (self.shifts[i], memory)
            elif way == "tensor":
                given = (place(torch.linspace(0, 1, numel, dtype=D).reshape(shape)),)
            elif way == "eval":
                model.eval()
            with torch.no_grad() if way == "no_grad" else nullcontext():
                out = fn(x, *given)
            model.train()
            model.zero_grad()
            if way != "no_grad":
                (out["out"].cos().sum() + out["norm"]).backward()
            wanted = [p for p in model.parameters() if p.requires_grad]
            grads = [p.detach() * 0 if p.grad is None else p.grad for p in wanted]
            state = [getattr(p, "n", 0) for p in model.parts]
            buffers = [b.detach().clone() for b in model.buffers()]
            found.append([out, x.grad, grads, state, buffers, x.detach(), memory])
        return found

    def serial(self) -> Any:
        return self._run(lambda x: x, lambda m: m)

    def sharded(self, mesh: DeviceMesh) -> Any:
        def place(x: Tensor) -> Tensor:
            sizes = None
            if self.uneven and self.dims[0] >= 0:
                n, size = mesh.size(0), x.shape[self.dims[0]]
                edges = [0, *(max(0, size - n + r) for r in range(1, n)), size]
                sizes = {self.dims[0]: tuple(b - a for a, b in itertools.pairwise(edges))}
            places = [Replicate() if d < 0 else Shard(d) for d in self.dims]
            return st.distribute_tensor(x, mesh, places, sizes=sizes, src_data_rank=None)

        draws = any(n.startswith("drawn") for n in self.parts)
        with st.random.match_single_device() if draws else nullcontext():
            return self._run(place, lambda m: st.compile(m, backend=self.backend))


def draw(rng: random.Random) -> Case:
    mesh = rng.choice([(1,), (2,), (2,), (3,), (2, 2)])
    names = tuple(rng.choice([*PARTS]) for _ in range(rng.randint(1, 3)))
    first = (rng.randint(4, 7), rng.randint(2, 5), WIDTH)
    other = (rng.randint(4, 7), first[1], WIDTH)
    calls = rng.randint(2, 4)
    shapes = tuple(first if rng.random() < 0.75 else other for _ in range(calls))
    changed = ((), *(
        tuple(j for j in range(len(names)) if rng.random() < 0.5) for _ in range(calls - 1)
    ))  # fmt: skip
    shifts = tuple(rng.choice((0.0, 0.0, 0.0, 1.5)) for _ in range(calls))
    ways = tuple(
        rng.choice(("", "", "", "", "memory", "tensor", "eval", "no_grad")) for _ in range(calls)
    )
    function = rng.random() < 0.2
    dims = tuple(rng.choice((0, 0, 1, 1, -1)) for _ in mesh)
    uneven = len(mesh) == 1 and rng.random() < 0.5
    backend = rng.choice(("eager", "eager", "eager", "aot_eager"))
    return Case(mesh, names, shapes, changed, shifts, ways, function, dims, uneven, backend)
