"""Registering cases, and holding one to plain PyTorch on the whole hard list."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from layouts import Layout, layouts, of_each_kind
from torch import Tensor

import shardtensor as st
from shardtensor import testing as T

D = torch.float64
CASES: dict[str, Case] = {}


@dataclass(frozen=True)
class Case:
    """fn of operands, each of which may be cut along some of its dims."""

    op: str
    name: str
    fn: Callable[..., Any]
    operands: tuple[Tensor, ...]
    dims: tuple[tuple[int, ...], ...]
    skip: Callable[[Layout], bool] | None = None
    stays: bool = False
    turn: tuple[int, int] = (0, 1)
    how: Mapping[str, Any] = field(default_factory=dict)
    number: int = 0

    def layouts(self, share: str = "all") -> list[Layout]:
        """The hard list without what the rule is known to refuse.

        "some": every sixth of it; "kinds": one of each kind that these are not, in turn; "rest": all others.
        """
        found = [
            on for on in layouts(self.operands, self.dims) if not (self.skip and self.skip(on))
        ]
        first, step = self.turn
        found = found[first::step]
        if share == "all":
            return found
        some = found[1::6]
        if share == "some":
            return some
        kinds = of_each_kind(found, some, self.number)
        met = {id(on) for on in (some if share == "kinds" else [*some, *kinds])}
        return kinds if share == "kinds" else [on for on in found if id(on) not in met]

    def meet(self, share: str = "all") -> None:
        """Raise AssertionError that names op, case, cut and mesh of every layout that fails."""
        failed, every = [], self.layouts(share)
        for mesh, same in itertools.groupby(every, lambda on: on[0]):
            layouts = [places for _, places in same]
            try:
                self._hold(mesh, layouts)
            except Exception as together:
                told = [t for places in layouts if (t := self._alone(mesh, places))]
                failed += told or [f"on mesh {mesh}, one layout after the other: {together}"]
        assert not failed, "\n".join(
            [f"{self.op} {self.name}: {len(failed)} of {len(every)} layouts", *failed]
        )

    def _hold(self, mesh: tuple[int, ...], layouts: list[list[T.On | None]]) -> None:
        device = self.operands[0].device
        run = {"run": partial(_simulated, device)} if device.type != "cpu" else {}
        found = T.hold_all(self.fn, self.operands, layouts, mesh, **self.how, **run)
        for places, specs in zip(layouts, found, strict=True):
            if self.stays and places[0] and places[0].sizes:
                sizes = {d: tuple(n) for d, n in places[0].sizes.items()}
                assert specs[0] and specs[0].sizes == sizes, f"the result is {specs[0]}"

    def _alone(self, mesh: tuple[int, ...], places: list[T.On | None]) -> str:
        """What fails on one layout, if anything."""
        try:
            self._hold(mesh, [places])
        except Exception as e:
            on = ", ".join(str(p) if p else "plain" for p in places)
            return f"on {on} of mesh {mesh}: {e}"
        return ""


def _simulated(device: torch.device, ranks: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """As simulate; ranks, which are threads, make tensors on the device, too."""

    def run(*args: Any) -> Any:
        with device:
            return fn(*args)

    return st.simulate(ranks, run, *args)


def case(
    op: str,
    *operands: Tensor,
    dims: Sequence[int | Sequence[int] | None] | None = None,
    name: str = "",
    skip: Callable[[Layout], bool] | None = None,
    stays: bool = False,
    turn: tuple[int, int] = (0, 1),
    **how: Any,
) -> Callable[[Any], Any]:
    """Registers the decorated function of operands as a case of op.

    dims: for each operand the dims that may be cut, the first of them in every way of the hard list;
    an empty tuple: given plain; None: all dims, the largest first. skip: layouts that are refused.
    stays: whether the first result is cut as the first operand. turn: (first, step) of the list's
    layouts, where several cases have it between them. how: keywords of `testing.hold`.
    """
    given = [None] * len(operands) if dims is None else list(dims)
    cut = tuple(
        _by_size(x) if d is None else (d,) if isinstance(d, int) else tuple(d)
        for x, d in zip(operands, given, strict=True)
    )

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        own = name or fn.__name__
        key = f"{op}: {own}"
        assert key not in CASES, f"two cases {key}"
        CASES[key] = Case(op, own, fn, operands, cut, skip, stays, turn, how, len(CASES))
        return fn

    return register


def cases(
    op: str, table: Mapping[str, Any], *operands: Tensor, share: int = 1, **options: Any
) -> None:
    """Registers every function of a table, all with the same operands.

    share: `share` functions, one after the other, have the list between them: for those that take
    the same way through a rule.
    """
    for i, (name, fn) in enumerate(table.items()):
        case(op, *operands, name=name, turn=(i % share, share), **options)(fn)


def _by_size(x: Tensor) -> tuple[int, ...]:
    return tuple(sorted(range(x.ndim), key=lambda d: -x.shape[d]))


def normal(*shape: int, dtype: torch.dtype = D) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, dtype=dtype)


def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Even numbers between low and high."""
    return low + (high - low) * torch.rand(shape, dtype=D)


def integers(low: int, high: int, *shape: int) -> Tensor:
    """Whole numbers from low to high - 1."""
    return torch.randint(low, high, shape)
