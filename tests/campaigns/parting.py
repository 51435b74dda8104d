"""Programs in which one rank, at a random place, does something else than the others.

Under the guard every rank must be told, with the rank and a line; without it no rank may wait for ever.
A program in which no rank parts must run as if nobody looked.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from campaigns import Verdict
from shardtensor.ranks.testing import make_mesh

ROWS, COLUMNS = 6, 4
Op = Callable[[st.ShardTensor], st.ShardTensor]


def _sums(x):
    x.sum()
    return x


def _reads(x):
    x[1, 1].item()
    return x


def _largest(x):
    x.amax(0)
    return x


def _gathers(x):
    x.full_tensor()
    return x


def _writes(x):
    x[2] = 1.0
    return x


def _fills(x):
    y = x.clone()
    y.fill_(0.5)
    return x + y


def _back(x):
    w = torch.ones(COLUMNS, dtype=x.dtype, requires_grad=True)
    (x * w).sum().backward()
    return x * w.detach()


def _back_alone(x):
    y = x.detach().requires_grad_()
    (y * y).backward(torch.ones(ROWS, COLUMNS, dtype=x.dtype))
    return y.detach()


def _splits(x):
    y = st.distribute_tensor(
        torch.ones(ROWS, dtype=x.dtype), x.device_mesh, [Replicate()], src_data_rank=None
    )
    y.redistribute(placements=[Shard(0)])
    return x


def _distributes(x):
    y = st.distribute_tensor(torch.arange(6.0, dtype=x.dtype)[:, None], x.device_mesh, [Shard(0)])
    return x + y


# each gives a tensor of the same spec, and does something that other ranks must do, too
OPS: dict[str, Op] = {
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 0),
    "mul": lambda x: x * 1.5,
    "relu": lambda x: x.relu(),
    "add_": lambda x: x.add_(1),
    "sub": lambda x: x - torch.arange(4.0, dtype=x.dtype),
    "cumsum": lambda x: x.cumsum(0),
    "softmax": lambda x: x.softmax(1),
    "twice": lambda x: x.t().t(),
    "matmul": lambda x: x @ torch.eye(COLUMNS, dtype=x.dtype),
    "cut": lambda x: x.redistribute(placements=[Shard(1)]).redistribute(placements=[Shard(0)]),
    "sort": lambda x: x.sort(0).values,
    "sum": _sums,
    "item": _reads,
    "amax": _largest,
    "full_tensor": _gathers,
    "setitem": _writes,
    "fill_": _fills,
    "backward": _back,
    "backward of shards": _back_alone,
    "redistribute": _splits,
    "distribute_tensor": _distributes,
}
WAYS = (
    "nothing", "skips", "another op", "another order", "one more", "another number", "another dtype",
    "another shape", "another operand", "another sample", "raises", "returns", "catches", "needs grad",
    "a hook raises",
)  # fmt: skip


class Gone(Exception):
    """What the rank that parts raises."""


@dataclass(frozen=True)
class Case:
    mesh: tuple[int, ...]
    ops: tuple[str, ...]
    way: str
    rank: int
    at: int
    other: str

    def run(self, guarded: bool) -> str:
        """What one rank is told; "" if nothing."""
        try:
            if guarded:
                with st.guard(30.0):
                    self._program()
            else:
                self._program()
        except (st.RankError, Gone, ZeroDivisionError, ValueError) as e:
            # without its traceback, which holds this rank's process groups
            return f"{type(e).__name__}: {e.with_traceback(None)}"
        return ""

    def _program(self) -> None:
        mesh = make_mesh(self.mesh)
        whole = torch.arange(float(ROWS * COLUMNS), dtype=torch.float64).reshape(ROWS, COLUMNS)
        x = st.distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
        for i, op in enumerate(self.ops):
            if i == self.at and dist.get_rank() == self.rank and self.way != "nothing":
                x = self._parted(x, i)
                if x is None:
                    return
            elif not (i == self.at + 1 and self._took_next()):
                x = OPS[op](x)

    def _took_next(self) -> bool:
        return self.way == "another order" and dist.get_rank() == self.rank

    def _parted(self, x: Any, i: int) -> Any:
        """What the rank does in place of op i; None where it returns."""
        op = OPS[self.ops[i]]
        if self.way == "another op":
            return OPS[self.other](x)
        if self.way == "another order":
            after = self.ops[i + 1] if i + 1 < len(self.ops) else self.other
            return op(OPS[after](x))
        if self.way == "one more":
            return OPS[self.other](op(x))
        if self.way == "another number":
            return op(x * 2.5)
        if self.way == "another dtype":
            return op(x.float())
        if self.way == "another shape":
            return op(x[:, :COLUMNS])
        if self.way == "another operand":
            return op(x + torch.ones(COLUMNS, dtype=x.dtype))
        if self.way == "another sample":
            sample = torch.arange(6.0, dtype=x.dtype)[:, None] ** 2
            return op(x + st.distribute_tensor(sample, x.device_mesh, [Shard(0)]))
        if self.way == "raises":
            raise Gone("this rank is gone")
        if self.way == "catches":
            try:
                x @ torch.ones(3, 3, dtype=x.dtype)
            except RuntimeError:
                return op(x)
        if self.way == "needs grad":
            return op(x.detach().requires_grad_() * 1).detach()
        if self.way == "a hook raises":
            y = x.detach().requires_grad_() * 1
            y.register_hook(lambda g: 1 / 0)
            y.sum().backward()
        # skips, returns
        return None if self.way == "returns" else x


def draw(rng: random.Random) -> Case:
    ranks = rng.choice((2, 2, 3, 4))
    ops = tuple(rng.choice(list(OPS)) for _ in range(rng.randint(1, 6)))
    at = rng.randrange(len(ops))
    way = rng.choice(WAYS)
    if way == "another order" and (at + 1 == len(ops) or ops[at] == ops[at + 1]):
        way = "skips"
    other = rng.choice([n for n in OPS if n != ops[at]])
    return Case((ranks,), ops, way, rng.randrange(ranks), at, other)


def judge(case: Case) -> Verdict:
    """Every rank is told of the rank that parts, with a line; nothing where none does."""
    (ranks,) = case.mesh
    try:
        st.simulate(ranks, case.run, False)
        told = st.simulate(ranks, case.run, True)
    except st.RankError as e:
        return Verdict("crashed", str(e))
    if case.way == "nothing":
        alarm = next(filter(None, told), "")
        return Verdict("wrong", f"a false alarm: {alarm}") if alarm else Verdict("right")
    silent = [r for r, text in enumerate(told) if not text]
    if len(silent) == ranks:
        return Verdict("wrong", "no rank is told")
    if silent:
        return Verdict("parted", f"ranks {silent} are not told: {told}")
    line = re.compile(rf"{Path(__file__).name}:\d+")
    named = re.compile(rf"\branks? (\d+, )*{case.rank}\b")
    for r, text in enumerate(told):
        own = text.startswith(("Gone", "ZeroDivisionError")) and r == case.rank
        if not own and not (line.search(text) and named.search(text)):
            return Verdict("wrong", f"rank {r} is told no line, or not the rank: {text}")
    return Verdict("right")
