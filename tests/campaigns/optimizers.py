"""Optimizers over plain and sharded parameters, with all that surrounds a step: as one device trains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Placement, Replicate, Shard

import shardtensor as st

D = torch.float64
# a case is some steps of training
COST = 5
# arguments that each may be given
WAYS: dict[str, list[dict[str, Any]]] = {
    "Adadelta": [{}, {"weight_decay": 0.1}],
    "Adafactor": [{}],
    "Adagrad": [{}, {"lr_decay": 0.1}, {"fused": True}],
    "Adam": [{}, {"amsgrad": True}, {"weight_decay": 0.1}, {"fused": True}, {"fused": True, "amsgrad": True},
             {"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "AdamW": [{}, {"amsgrad": True}, {"fused": True}, {"fused": True, "weight_decay": 0.1}],
    "Adamax": [{}, {"weight_decay": 0.1}],
    "ASGD": [{}, {"t0": 1}, {"weight_decay": 0.1}],
    "LBFGS": [{"max_iter": 4}, {"max_iter": 4, "line_search_fn": "strong_wolfe"}],
    "NAdam": [{}, {"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "RAdam": [{}, {"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "RMSprop": [{}, {"centered": True}, {"momentum": 0.9}],
    "Rprop": [{}],
    "SGD": [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.1,
            "weight_decay": 0.1}, {"fused": True, "momentum": 0.9}, {"fused": True}],
}  # fmt: skip
# those that take neither maximize nor foreach
BARE = ("LBFGS", "Adafactor")
CLIPS = ("none", "norm", "inf norm", "one norm", "value", "foreach norm", "norm of none")
HOOKS = ("none", "clamp", "post", "inside", "first rank")


@dataclass(frozen=True)
class Case:
    """A model whose parameters are plain but for `sharded` ones, and how it is trained."""

    mesh: tuple[int, ...]
    placements: tuple[Placement, ...]
    name: str
    arguments: tuple[tuple[str, Any], ...]
    sharded_parameters: bool
    parallelized: bool
    clip: str
    hooks: str
    scaled: bool
    pieces: int
    groups: int
    tied: bool
    frozen: bool
    bucket_mb: float
    rtol = 1e-9
    atol = 1e-12

    def serial(self) -> Any:
        return self.train(None)

    def sharded(self, mesh: Any) -> Any:
        return self.train(mesh)

    def train(self, mesh: Any) -> Any:
        model, xs = Net(self), [torch.randn(4, 5, 3, dtype=D) for _ in range(6)]
        if mesh is not None:
            at = [Shard(p.dim) if isinstance(p, Shard) else p for p in self.placements]
            xs = [st.distribute_tensor(x, mesh, at, src_data_rank=None) for x in xs]
            if self.sharded_parameters:
                # a position for each place lies as the samples do
                at = [Shard(0) if p == Shard(1) else Replicate() for p in self.placements]
                made = st.distribute_tensor(model.position.detach(), mesh, at, src_data_rank=None)
                model.position = nn.Parameter(made)
            if self.parallelized:
                st.parallelize(model, mesh, bucket_mb=self.bucket_mb)
        norms = self.steps(model, xs)
        weights = {k: v.detach() for k, v in model.named_parameters()}
        return [*weights.values(), *norms]

    def steps(self, model: Net, xs: list[Any]) -> list[Any]:
        named = dict(model.named_parameters())
        wanted = [p for p in named.values() if p.requires_grad]
        kwargs = dict(self.arguments)
        make = getattr(torch.optim, self.name)
        if self.hooks == "inside":
            return self.inside(wanted, lambda p: make(p, **kwargs), model, xs)
        if self.hooks == "clamp":
            model.up.weight.register_hook(lambda g: g.clamp(-1e-2, 1e-2))
        elif self.hooks == "post":
            model.up.bias.register_post_accumulate_grad_hook(
                lambda p: setattr(p, "grad", p.grad * p.grad.abs().max())
            )
        elif self.hooks == "first rank" and not (
            torch.distributed.is_initialized() and torch.distributed.get_rank()
        ):
            model.down.weight.register_hook(lambda g: g)
        if self.groups == 2 and self.name != "LBFGS":
            half = len(wanted) // 2
            optimizer = make(
                [{"params": wanted[:half]}, {"params": wanted[half:], "lr": 0.02}], **kwargs
            )
        else:
            optimizer = make(wanted, **kwargs)
        scaler = torch.amp.GradScaler(
            "cpu", init_scale=64.0, growth_interval=2, enabled=self.scaled
        )
        seen: list[Any] = []
        for i in range(0, len(xs), self.pieces):
            if self.name == "LBFGS":
                seen.append(
                    optimizer.step(lambda i=i: self.closure(model, optimizer, xs[i])).detach()
                )
                continue
            for x in xs[i : i + self.pieces]:
                scaler.scale(model(x).square().mean()).backward()
            if self.scaled and i == self.pieces:
                # nobody may take this step
                model.poison()
            scaler.unscale_(optimizer)
            seen += self.clipped(model, wanted)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=i % 2 == 0)
        return [*seen, scaler.get_scale()]

    def closure(self, model: Net, optimizer: Any, x: Any) -> Any:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    def inside(self, wanted: list[Any], make: Any, model: Net, xs: list[Any]) -> list[Any]:
        """Each parameter steps as soon as its gradient is there."""
        each = {p: make([p]) for p in wanted}

        def step(p: Any) -> None:
            own = next(o for q, o in each.items() if q is p)
            own.step()
            own.zero_grad()

        for p in wanted:
            p.register_post_accumulate_grad_hook(lambda _, p=p: step(p))
        for x in xs:
            model(x).square().mean().backward()
        return []

    def clipped(self, model: Net, wanted: list[Any]) -> list[Any]:
        if self.clip == "value":
            nn.utils.clip_grad_value_(wanted, 0.05)
        elif "norm" in self.clip:
            kind = {"inf norm": float("inf"), "one norm": 1.0}.get(self.clip, 2.0)
            among = [model.unused] if self.clip == "norm of none" else wanted
            foreach = True if self.clip == "foreach norm" else None
            norm = nn.utils.clip_grad_norm_(among, 0.1, kind, foreach=foreach)
            return [norm.detach()] if self.clip != "norm of none" else []
        return []


class Net(nn.Module):
    """A block whose position is a parameter for each place; parameters used alone and not at all."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(5, 3, dtype=D))
        self.up, self.down = nn.Linear(3, 4, dtype=D), nn.Linear(4, 3, dtype=D)
        self.again = nn.Linear(3, 4, dtype=D)
        if case.tied:
            self.again.weight = self.up.weight
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=D))
        self.alone = nn.Parameter(torch.randn(2, dtype=D))
        self.unused = nn.Parameter(torch.ones(2, dtype=D))
        self.down.bias.requires_grad_(not case.frozen)

    def forward(self, x: Any) -> Any:
        x = x + self.position
        x = self.down(torch.tanh(self.up(x)) + torch.sin(self.again(x))) * self.scale
        return x + self.scale.exp() * self.alone.sum()

    def poison(self) -> None:
        grad = self.position.grad
        with torch.no_grad():
            grad[0, 0] = torch.inf


PLACES: dict[tuple[int, ...], list[tuple[Placement, ...]]] = {
    (1,): [(Shard(1),)],
    (2,): [(Shard(0),), (Shard(1),), (Replicate(),)],
    (3,): [(Shard(1),), (Shard(2),)],
    (4,): [(Shard(1),)],
    (2, 2): [(Shard(0), Shard(1)), (Shard(1), Replicate()), (Shard(1), Shard(2))],
}


def draw(rng: Any) -> Case:
    mesh = rng.choice([(1,), (2,), (2,), (3,), (4,), (2, 2)])
    name = rng.choice(list(WAYS))
    arguments = {"lr": 0.05, **rng.choice(WAYS[name])}
    if name not in BARE:
        if not arguments.get("fused") and rng.random() < 0.6:
            arguments["foreach"] = rng.random() < 0.6
        if rng.random() < 0.2:
            arguments["maximize"] = True
    case = Case(
        mesh, rng.choice(PLACES[mesh]), name, tuple(arguments.items()),
        rng.random() < 0.6, rng.random() < 0.6, rng.choice(CLIPS), rng.choice(HOOKS),
        rng.random() < 0.25, rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2]), rng.random() < 0.3,
        rng.random() < 0.3, rng.choice([1e-4, 8.0]),
    )  # fmt: skip
    if name == "LBFGS" and case.hooks == "inside":
        return replace(case, hooks="none")
    return case
