"""Tensors at random places of a mesh, and a function of them with its gradients: a campaign's case."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.utils import _pytree as pytree

import shardtensor as st

MESHES = ((2,), (3,), (4,), (2, 2))


@dataclass(frozen=True)
class Place:
    """None of placements: given plain."""

    placements: tuple[Placement, ...] | None = None
    sizes: dict[int, tuple[int, ...]] | None = None

    def __repr__(self) -> str:
        if self.placements is None:
            return "plain"
        return f"{list(map(str, self.placements))}" + (f" in {self.sizes}" if self.sizes else "")


@dataclass
class Placed:
    """fn of tensors, its results and the gradients of what asks for one."""

    name: str
    mesh: tuple[int, ...]
    fn: Callable[..., Any] = field(repr=False)
    tensors: list[Tensor] = field(repr=False)
    places: list[Place]
    options: dict[str, Any] = field(default_factory=dict)
    given: str = ""
    rtol: float | None = None
    atol: float = 1e-11

    def __post_init__(self) -> None:
        parts = []
        for x in self.tensors:
            grad = " grad" if x.requires_grad else ""
            parts.append(f"{str(x.dtype)[6:]}{list(x.shape)}{grad}")
        self.given = ", ".join(parts)
        if any(x.dtype in (torch.float16, torch.bfloat16) for x in self.tensors):
            self.rtol, self.atol = 2e-2, 1e-3
        elif any(x.dtype in (torch.float32, torch.complex64) for x in self.tensors):
            self.rtol, self.atol = 2e-5, 1e-6

    def _run(self, leaves: list[Tensor], given: list[Tensor]) -> Any:
        out = self.fn(*given, **self.options)
        found = pytree.tree_leaves(out, is_leaf=lambda x: isinstance(x, Tensor))
        total = None
        for i, x in enumerate(x for x in found if isinstance(x, Tensor) and x.requires_grad):
            g = torch.Generator().manual_seed(i)
            cotangent = torch.rand(x.shape, generator=g, dtype=torch.float64).add_(0.5).to(x.dtype)
            part = (x * cotangent).sum()
            part = part.real if part.is_complex() else part
            total = part if total is None else total + part
        if total is not None:
            total.backward()
        wanted = [x for x in leaves if x.requires_grad]
        # no gradient is as good as zeros
        grads = [x.detach() * 0 if x.grad is None else x.grad for x in wanted]
        return out, grads, [x for x in leaves if not x.requires_grad]

    def serial(self) -> Any:
        leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in self.tensors]
        return self._run(leaves, leaves)

    def sharded(self, mesh: DeviceMesh) -> Any:
        leaves, given = [], []
        for x, place in zip(self.tensors, self.places, strict=True):
            y = x.detach().clone()
            if place.placements is None:
                leaves.append(y.requires_grad_(x.requires_grad))
                given.append(leaves[-1])
                continue
            first = [Replicate() if p.is_partial() else p for p in place.placements]
            y = st.distribute_tensor(y, mesh, first, src_data_rank=None, sizes=place.sizes)
            leaves.append(y.requires_grad_(x.requires_grad))
            partial = first != list(place.placements)
            given.append(y.redistribute(mesh, place.placements) if partial else y)
        return self._run(leaves, given)


def place(rng: random.Random, mesh: tuple[int, ...], x: Tensor, plain: float = 0.1) -> Place:
    """Shards, even or not, of any dims; whole; addends; or plain with that probability."""
    if rng.random() < plain:
        return Place()
    placements: list[Placement] = []
    for _ in mesh:
        kind = rng.random()
        if kind < 0.75 and x.ndim:
            placements.append(Shard(rng.randrange(x.ndim)))
        elif kind < 0.82 and (x.is_floating_point() or x.is_complex()) and x.isfinite().all():
            placements.append(Partial())
        else:
            placements.append(Replicate())
    sizes: dict[int, tuple[int, ...]] | None = None
    shards = [p.dim for p in placements if isinstance(p, Shard)]
    if rng.random() < 0.6 and shards:
        sizes = {}
        for d in set(shards):
            if shards.count(d) == 1:
                n = mesh[[getattr(p, "dim", None) for p in placements].index(d)]
                ends = sorted(rng.randint(0, x.shape[d]) for _ in range(n - 1))
                sizes[d] = tuple(
                    b - a for a, b in zip([0, *ends], [*ends, x.shape[d]], strict=True)
                )
    return Place(tuple(placements), sizes)


def placed(
    rng: random.Random,
    name: str,
    fn: Callable[..., Any],
    tensors: list[Tensor],
    mesh: tuple[int, ...] | None = None,
    plain: float = 0.2,
    **options: Any,
) -> Placed:
    """The case of fn with its tensors anywhere, at least one of them on the mesh."""
    mesh = mesh or rng.choice(MESHES)
    places = [place(rng, mesh, x, plain) for x in tensors]
    if tensors and all(p.placements is None for p in places):
        i = rng.randrange(len(tensors))
        places[i] = place(rng, mesh, tensors[i], 0)
    return Placed(name, mesh, fn, tensors, places, options)
