"""Programs of views, writes and reads after writes: every name alive at the end must hold torch's value."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard

import shardtensor as st

D = torch.float64
SHAPES = [(4, 3), (5, 4), (7, 2, 3), (6, 4), (3, 2, 4), (1, 6), (8, 5)]
MESHES = [(1,), (2,), (3,), (4,), (2, 2)]

# op -> (kind, how it is drawn from a random generator and the tensor's ndim)
VIEWS = [
    "v.t()", "v.transpose(0, -1)", "v[{i}]", "v[{i}:]", "v[:{j}]", "v[..., {i}]", "v[..., :{j}]",
    "v[..., {i}:]", "v[::2]", "v.unbind(0)[{i}]", "v.unbind(-1)[-1]", "v.chunk(2)[0]",
    "v.chunk(2, -1)[-1]", "v.split(2)[{i}]", "v.reshape(-1)", "v.view(-1)", "v.flatten()",
    "v.flatten(0, 1)", "v.contiguous()", "v.detach()", "v.data", "v.unsqueeze(0)", "v.squeeze()",
    "v.unfold(0, 2, 1)", "v.diagonal()", "v.narrow(0, {i}, 1)", "v.view_as(v)", "v.expand_as(v)",
    "v.reshape(v.shape[::-1])", "v.reshape(2, -1)", "v.movedim(0, -1)", "v[None]", "v.mT",
    "v.unsqueeze(-1).expand(*v.shape, 2)", "v.select(0, {i})", "[r for r in v][{i}]", "v.to(v.dtype)",
    "v.swapaxes(0, -1).contiguous()", "v.ravel()", "v[{i}:, {i}]", "v[{i}, {i}:]", "v[-1]",
]  # fmt: skip
COPIES = ["v * 2", "v + 1", "v.clone()", "v.t() + 1", "v * v", "v.sum(0)", "v.sum()", "v.sin()"]
WRITES = [
    "v.add_(1)", "v.mul_(2)", "v.zero_()", "v.sub_({k})", "v += 1", "v *= 0.5", "v[{i}] = {k}",
    "v[{i}:] = {k}", "v[..., {i}] = {k}", "v[..., :{j}] += 1", "v[{i}] += {k}", "v[{i}, {i}] = {k}",
    "v.fill_({k})", "v.data.add_(1)", "v.detach().mul_(3)", "v.copy_(v * 2)", "v[1:] = v[:-1]",
    "v[v > 0.5] = {k}", "v.t_()", "v.unsqueeze_(0)", "v.squeeze_()", "v.transpose_(0, -1)",
    "v.masked_fill_(v > 0, {k})", "v[:{j}].mul_(2)", "v[-1].add_(1)", "v.clamp_(-1, 1)",
    "v.addcmul_(v, v)", "v.sin_()", "v[[0, {i}]] = {k}", "v.index_fill_(0, torch.tensor([{i}]), {k})",
    "v += w", "v.mul_(w)", "v.copy_(w)", "v[{i}] = w[{i}]",
]  # fmt: skip
LOOPS = ["for row in v:\n    row += 1", "for row in v.unbind(-1):\n    row.mul_(2)"]


@dataclass
class Case:
    """A program on names a, b, ...; a is the input, cut by placements and sizes."""

    mesh: tuple[int, ...]
    shape: tuple[int, ...]
    placements: list[Placement]
    sizes: dict[int, tuple[int, ...]]
    grad: bool
    lines: list[str]
    names: list[str]
    seed: int

    def _input(self) -> Tensor:
        return torch.randn(self.shape, dtype=D, generator=torch.Generator().manual_seed(self.seed))

    def _run(self, x: Tensor) -> Any:
        leaf = x.requires_grad_(self.grad)
        scope: dict[str, Any] = {"torch": torch, "a": leaf * 1 if self.grad else leaf}
        exec("\n".join(self.lines), scope)
        out = [scope[n] for n in self.names]
        needs = [t.requires_grad for t in out]
        grads: list[Any] = []
        if any(needs):
            total = sum((t * t).sum() for t in out if t.requires_grad)
            grads = list(torch.autograd.grad(total, [leaf], allow_unused=True))
        return out, needs, grads

    def serial(self) -> Any:
        return self._run(self._input())

    def sharded(self, mesh: DeviceMesh) -> Any:
        x = st.distribute_tensor(
            self._input(), mesh, self.placements, src_data_rank=None, sizes=self.sizes
        )
        return self._run(x)


def draw(rng: random.Random) -> Case:
    shape, mesh = rng.choice(SHAPES), rng.choice(MESHES)
    placements, sizes = _cut(rng, shape, mesh)
    names, lines = ["a"], []
    for _ in range(rng.randint(2, 7)):
        on = rng.choice(names)
        kind = rng.random()
        if kind < 0.5:
            new = chr(ord("a") + len(names))
            op = rng.choice(VIEWS if kind < 0.42 else COPIES)
            lines += _guarded(rng, f"{new} = {_filled(rng, op, on, names)}")
            names.append(new)
        elif kind < 0.95:
            lines += _guarded(rng, _filled(rng, rng.choice(WRITES), on, names))
        else:
            lines += _guarded(rng, _filled(rng, rng.choice(LOOPS), on, names))
    return Case(
        mesh, shape, placements, sizes, rng.random() < 0.4, lines, names, rng.randrange(1 << 30)
    )


def _filled(rng: random.Random, op: str, on: str, names: list[str]) -> str:
    numbers = {"i": rng.randrange(3), "j": rng.randint(1, 3), "k": rng.choice(["0", "0.5", "-2"])}
    for key, value in numbers.items():
        op = op.replace(f"{{{key}}}", str(value))
    words = {"v": on, "w": rng.choice(names)}
    out, i = "", 0
    while i < len(op):
        alone = not (i and (op[i - 1].isalnum() or op[i - 1] in "._"))
        after = op[i + 1 : i + 2]
        if op[i] in words and alone and not (after.isalnum() or after == "_"):
            out += words[op[i]]
        else:
            out += op[i]
        i += 1
    return out


def _guarded(rng: random.Random, line: str) -> list[str]:
    if rng.random() < 0.2:
        return ["with torch.no_grad():", *(f"    {part}" for part in line.split("\n"))]
    return [line]


def _cut(rng: random.Random, shape: Any, mesh: Any) -> Any:
    placements: list[Placement] = []
    for _ in mesh:
        kind = rng.random()
        placements.append(Replicate() if kind < 0.1 else Shard(0 if kind < 0.7 else len(shape) - 1))
    sizes = {}
    for d in {p.dim for p in placements if isinstance(p, Shard)}:
        parts = 1
        for n, p in zip(mesh, placements, strict=True):
            parts *= n if p == Shard(d) else 1
        if rng.random() < 0.7:
            edges = sorted(rng.randint(0, shape[d]) for _ in range(parts - 1))
            ends = [0, *edges, shape[d]]
            sizes[d] = tuple(b - a for a, b in pairwise(ends))
    return placements, sizes
