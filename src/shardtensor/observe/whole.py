"""What ran whole: activations that every rank computes alike, and where that began."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..caller import call_of_user
from ..comm import counters
from ..tensor import ShardTensor


@dataclass(frozen=True)
class Origin:
    """Where something whole began: a buffer, a parameter, or an op.

    kind: "buffer", "parameter", "op" (of sharded operands), "tensor" (made by the op there) or
    "input" (from outside). dim: of a buffer its longest.
    """

    kind: str
    name: str
    line: str = ""
    dim: int = 0

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
    """What began in one place: shares of all bytes and seconds, and the first op there."""

    origin: Origin
    of_bytes: float
    of_time: float
    op: str
    line: str

    def __str__(self) -> str:
        at = f" at {self.line}" if self.line else ""
        text = f"{self.of_bytes:4.0%} of activations, {self.of_time:.0%} of time since "
        text += f"{self.origin}, first in {self.op}{at}"
        if self.origin.kind == "buffer":
            named = f'{{"{self.origin.name}": {self.origin.dim}}}'
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


def whole(activations: Iterable[Activation], least: float = 0.01) -> Whole:
    """How much is whole, and since where, on this rank; nothing is sent.

    least: the smallest share that is listed.
    """
    found = list(activations)
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
        # by id of a tensor, which is kept
        self.origins: dict[int, tuple[Tensor, Origin | None]] = {}
        if model is not None:
            for k, p in model.named_parameters():
                self.origins[id(p)] = p, Origin("parameter", k)
            for k, b in model.named_buffers():
                dim = list(b.shape).index(max(b.shape)) if b.ndim else 0
                self.origins[id(b)] = b, Origin("buffer", k, "", dim)

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
        if inside or name in ("__get__", "__set__", "backward"):
            return out
        seconds = time.perf_counter() - begin
        results = list(_tensors(out))
        if results:
            self._note(name, results, list(_tensors((args, kwargs or {}))), seconds)
        return out

    def _note(self, op: str, results: list[Tensor], given: list[Tensor], seconds: float) -> None:
        line = call_of_user()[0]
        origin = self._origin(op, line, given)
        memory = {_memory(g) for g in given}
        for i, x in enumerate(results):
            of = None if _sharded(x) else origin
            self.origins.setdefault(id(x), (x, of))
            new = not any(x is g for g in given) and _memory(x) not in memory
            if new and (x.is_floating_point() or x.is_complex()):
                nbytes = x.shape.numel() * x.element_size()
                self.activations.append(Activation(op, line, nbytes, seconds if not i else 0.0, of))

    def _origin(self, op: str, line: str, given: list[Tensor]) -> Origin:
        """Where a whole result of these operands began."""
        if any(map(_sharded, given)):
            return Origin("op", op, line)
        found = []
        for g in given:
            origin = self.origins[id(g)][1] if id(g) in self.origins else _from_outside(g)
            if origin is not None:
                found.append((g, origin))
        # weights are whole always
        found.sort(key=lambda f: (f[1].kind == "parameter", -f[0].numel()))
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
    return True, here.untyped_storage()._cdata
