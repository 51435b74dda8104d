"""What ran whole: activations that every rank computes alike, and where that began."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import _torch
from ..caller import call_of_user
from ..comm import counters
from ..tensor import ShardTensor


@dataclass(frozen=True)
class Origin:
    """Where something whole began: a buffer, a parameter, or an op.

    kind: "buffer", "parameter", "op" (of sharded operands), "tensor" (made by the op there) or
    "input" (from outside). shape: of a buffer.
    """

    kind: str
    name: str
    line: str = ""
    shape: tuple[int, ...] = ()

    def __str__(self) -> str:
        at = f" at {self.line}" if self.line else ""
        return f"{self.kind} {self.name}{at}"


@dataclass
class Activation:
    """The result of one op. nbytes: of the global value; origin: of a whole one, else None."""

    op: str
    line: str
    nbytes: int
    seconds: float
    origin: Origin | None = None


@dataclass
class Share:
    """What began in one place: shares of all bytes and seconds, and the first op there.

    dim: of a buffer that lies along shards; None of one that does not, as a scale for each channel.
    """

    origin: Origin
    of_bytes: float
    of_time: float
    op: str
    line: str
    dim: int | None = None

    def __str__(self) -> str:
        at = f" at {self.line}" if self.line else ""
        text = f"{self.of_bytes:4.0%} of activations, {self.of_time:.0%} of time since "
        text += f"{self.origin}, first in {self.op}{at}"
        if self.origin.kind == "buffer" and self.dim is not None:
            named = f'{{"{self.origin.name}": {self.dim}}}'
            text += f"\n     shard it: st.shard_buffers(model, {named}, mesh)"
        elif self.origin.kind == "op":
            text += "\n     its result has no dim that is sharded: keep it small, or give it a rule"
        elif self.origin.kind == "input":
            text += "\n     shard it as the others: st.distribute_tensor"
        elif self.origin.kind == "tensor":
            text += "\n     make it sharded: st.distribute_tensor, or x.new_zeros of a sharded x"
        return text


@dataclass(repr=False)
class Whole:
    """Shares of activations that are the same on all ranks, by where that began, largest first."""

    of_bytes: float
    of_time: float
    shares: list[Share] = field(default_factory=list)

    def __str__(self) -> str:
        head = f"{self.of_bytes:.0%} of activations and {self.of_time:.0%} of time are whole"
        return "\n".join([head, *(f"  {s}" for s in self.shares)])

    __repr__ = __str__


def whole(watch: Watch, least: float = 0.01) -> Whole:
    """How much is whole, and since where, on this rank; nothing is sent.

    least: the smallest share that is listed.
    """
    found = watch.activations
    nbytes = sum(a.nbytes for a in found) or 1
    seconds = sum(a.seconds for a in found) or 1.0
    groups: dict[Origin, list[Activation]] = {}
    for a in found:
        if a.origin is not None:
            groups.setdefault(a.origin, []).append(a)
    shares = [
        Share(
            origin,
            sum(a.nbytes for a in group) / nbytes,
            sum(a.seconds for a in group) / seconds,
            group[0].op,
            group[0].line,
            watch.dim(origin),
        )
        for origin, group in groups.items()
    ]
    shares.sort(key=lambda s: -s.of_bytes)
    total = sum(s.of_bytes for s in shares)
    return Whole(total, sum(s.of_time for s in shares), [s for s in shares if s.of_bytes >= least])


class Watch(TorchFunctionMode):
    """Inside, every torch function's results are noted as activations. model: names its buffers."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.activations: list[Activation] = []
        # of buffers that met shards by broadcasting: the dim that lies along them, if any does
        self.met: dict[Origin, int | None] = {}
        # by id of a tensor, which is kept
        self.origins: dict[int, tuple[Tensor, Origin | None]] = {}
        if model is not None:
            for k, p in model.named_parameters():
                self.origins[id(p)] = p, Origin("parameter", k)
            for k, b in model.named_buffers():
                self.origins[id(b)] = b, Origin("buffer", k, "", tuple(b.shape))

    def dim(self, origin: Origin) -> int | None:
        """Of a buffer, along which to shard it: where it met shards, else its longest."""
        longest = origin.shape.index(max(origin.shape)) if origin.shape else None
        return self.met.get(origin, longest)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        begin = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        inside = getattr(counters.current_op, "name", "")
        if name == "__get__" and isinstance(out, Tensor) and id(args[0]) in self.origins:
            # as .T and .data, which are what they are of
            self.origins.setdefault(id(out), (out, self.origins[id(args[0])][1]))
        # as a copy of its shard that `distribute_tensor` takes
        ours = sys._getframe(1).f_globals.get("__name__", "").startswith("shardtensor.tensor.")
        if inside or ours or name in ("__get__", "__set__", "backward"):
            return out
        seconds = time.perf_counter() - begin
        results = list(_tensors(out))
        if results:
            # out= is no operand
            named = {k: v for k, v in (kwargs or {}).items() if k != "out"}
            self._note(name, results, list(_tensors((args, named))), seconds)
        return out

    def _note(self, op: str, results: list[Tensor], given: list[Tensor], seconds: float) -> None:
        line = call_of_user()[0]
        origin = self._origin(op, line, given, results[0].ndim)
        self._meet(given, results[0])
        memory = {_memory(g) for g in given}
        for i, x in enumerate(results):
            of = None if _sharded(x) else origin
            new = id(x) not in self.origins and _memory(x) not in memory
            if not any(x is g for g in given):
                self.origins[id(x)] = x, of
            if new and (x.is_floating_point() or x.is_complex()):
                nbytes = x.shape.numel() * x.element_size()
                self.activations.append(Activation(op, line, nbytes, seconds if not i else 0.0, of))

    def _meet(self, given: list[Tensor], out: Tensor) -> None:
        """Which buffers lie along the shards of out, of those that fit it by broadcasting."""
        dims = out._spec.dims if isinstance(out, ShardTensor) else ()
        sharded = [i - out.ndim for i, d in enumerate(dims) if d.axes]
        if not sharded or not any(map(_sharded, given)):
            return
        for g in given:
            origin = self.origins.get(id(g), (g, None))[1]
            pairs = zip(reversed(g.shape), reversed(out.shape), strict=False)
            fits = g.ndim <= out.ndim and all(n in (1, m) for n, m in pairs)
            if origin is None or _sharded(g) or not fits:
                continue
            along = [i for i in sharded if -i <= min(g.ndim, len(origin.shape)) and g.shape[i] > 1]
            if along or self.met.get(origin) is None:
                self.met[origin] = along[0] + len(origin.shape) if along else None

    def _origin(self, op: str, line: str, given: list[Tensor], ndim: int) -> Origin:
        """Where a whole result of these operands, with ndim dims, began."""
        if any(map(_sharded, given)):
            return Origin("op", op, line)
        found = []
        for g in given:
            origin = self.origins[id(g)][1] if id(g) in self.origins else _from_outside(g)
            if origin is not None:
                found.append((g, origin))
        most = max((g.ndim for g, _ in found), default=0)

        def spent(g: Tensor) -> bool:
            # a factor, or a vector that a matrix took up: no dim of it is left
            return g.numel() == 1 or (g.ndim == 1 and ndim < most)

        # weights are whole always
        found.sort(key=lambda f: (spent(f[0]), f[1].kind == "parameter", -f[0].numel()))
        return found[0][1] if found else Origin("tensor", op, line)


def _from_outside(x: Tensor) -> Origin:
    return Origin("input", f"of {'x'.join(map(str, x.shape)) or 'one number'}")


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for v in tree.values():
            yield from _tensors(v)
    elif isinstance(tree, list | tuple):
        for v in tree:
            yield from _tensors(v)


def _sharded(x: Tensor) -> bool:
    """Whether ranks have parts of x, or addends."""
    if not isinstance(x, ShardTensor):
        return False
    return bool(x._spec.partial) or any(d.axes for d in x._spec.dims)


def _memory(x: Tensor) -> tuple[bool, int]:
    here = x._local if isinstance(x, ShardTensor) else x
    if here.layout is not torch.strided or torch.compiler.is_compiling():
        return False, id(here)
    return True, _torch.storage(here)._cdata
