"""Campaigns: random cases of one kind, each run sharded and held against plain PyTorch.

A campaign is a module of this package with `draw(rng) -> Case`. Case number i of a campaign is always the
same one. `python -m campaigns NAME COUNT`, run in tests/, tries more of them and prints what failed.
"""

from __future__ import annotations

import importlib
import pkgutil
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

import shardtensor as st
from shardtensor.ranks.testing import make_mesh, same, simulate

KINDS = ("right", "both raise", "refused", "wrong", "parted", "crashed")
BAD = KINDS[3:]
# what a caller's mistake raises in torch; anything else that we raise is a fault of ours
MISTAKES = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)


class Case(Protocol):
    """A program and how it lies on the mesh; its repr is enough to run it again.

    Both runs return the same tree of tensors and values, or raise. `sharded` runs on each simulated rank.
    A case may set `rtol` and `atol`; values of 1e-9 and 0 in float64, `testing.same`'s otherwise.
    """

    mesh: tuple[int, ...]

    def serial(self) -> Any: ...

    def sharded(self, mesh: DeviceMesh) -> Any: ...


@dataclass(frozen=True)
class Verdict:
    """One of KINDS, and why."""

    kind: str
    why: str = ""


@dataclass
class Tally:
    """What became of a campaign's cases."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)

    def add(self, i: int, case: Any, verdict: Verdict) -> None:
        self.counts[verdict.kind] += 1
        if verdict.kind in BAD:
            self.bad.append(f"{self.name} {i}: {verdict.kind}: {verdict.why}\n    {case!r}")
        elif verdict.kind == "refused":
            self.refusals[verdict.why] += 1

    def __str__(self) -> str:
        kinds = ", ".join(f"{self.counts[k]} {k}" for k in KINDS)
        return f"{self.name}: tried {self.counts.total()}: {kinds}"


def names() -> list[str]:
    """All campaigns."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "__main__")


def cost(name: str) -> int:
    """How many times as long a case takes as those of most campaigns."""
    return getattr(importlib.import_module(f"campaigns.{name}"), "COST", 1)


def run(name: str, cases: Iterable[int]) -> Tally:
    """Draw and judge these cases of a campaign."""
    module = importlib.import_module(f"campaigns.{name}")
    tally = Tally(name)
    decide: Callable[[Any], Verdict] = getattr(module, "judge", judge)
    for i in cases:
        case = drawn(module, i)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tally.add(i, case, decide(case))
    return tally


def share(name: str, count: int) -> Tally:
    """The first `count` cases, or as many as take as long."""
    return run(name, range(count // cost(name)))


def drawn(module: ModuleType, i: int) -> Any:
    """Case i of a campaign."""
    _seed(i)
    return module.draw(random.Random(f"{module.__name__} {i}"))


def _seed(number: int) -> None:
    # torch.manual_seed also takes down a traceback, for a GPU that is not in use: 0.3 ms
    torch.default_generator.manual_seed(number)


def judge(case: Case) -> Verdict:
    """Run a case on one device and on simulated ranks."""
    _seed(0)
    want, error = _tried(case.serial)
    try:
        ranks = simulate(prod(case.mesh), _on_rank, case, want)
    except (st.RankError, RuntimeError) as e:
        # the threads could not be brought to an end together
        return Verdict("parted", str(e))
    errors = [e for e, _ in ranks]
    if len({type(e) for e in errors}) > 1 or any(isinstance(e, st.RankError) for e in errors):
        return Verdict("parted", " | ".join(map(_told, errors)))
    ours = errors[0]
    if isinstance(ours, st.UnsupportedOpError):
        return Verdict("both raise" if error else "refused", str(ours))
    if error is not None:
        if ours is None:
            return Verdict("wrong", f"torch raises {_told(error)}, we return")
        alike = isinstance(ours, (type(error), *MISTAKES))
        return Verdict("both raise" if alike else "crashed", _told(ours))
    if ours is not None:
        return Verdict("crashed", _told(ours))
    differences = [why for _, why in ranks if why]
    return Verdict("wrong", differences[0]) if differences else Verdict("right")


def _tried(fn: Callable[..., Any], *args: Any) -> tuple[Any, Exception | None]:
    try:
        return fn(*args), None
    except Exception as e:
        return None, e


def _told(e: BaseException | None) -> str:
    return "no error" if e is None else f"{type(e).__name__}: {e}"


def _on_rank(case: Case, want: Any) -> tuple[Exception | None, str]:
    """This rank's error, and how its result differs from what is wanted."""
    _seed(0)
    mesh = make_mesh(case.mesh)
    got, error = _tried(lambda: _whole(case.sharded(mesh)))
    # without its traceback, which holds this rank's process groups
    if error is not None:
        return error.with_traceback(None), ""
    return None, "" if want is None else _difference(case, got, want)


def _is_leaf(x: Any) -> bool:
    return isinstance(x, Tensor)


def _whole(tree: Any) -> Any:
    """The tree with whole plain tensors; the local shapes are held to the specs on the way."""

    def whole(x: Any) -> Any:
        if not isinstance(x, st.ShardTensor):
            return x.detach() if isinstance(x, Tensor) else x
        local, spec = x.to_local(), x.spec
        assert local.shape == spec.local_shape, f"local shape {tuple(local.shape)} for {spec}"
        return x.full_tensor().detach()

    return pytree.tree_map(whole, tree, is_leaf=_is_leaf)


def _difference(case: Case, got: Any, want: Any) -> str:
    rtol, atol = getattr(case, "rtol", None), getattr(case, "atol", 0.0)
    found, tree = pytree.tree_flatten(got, is_leaf=_is_leaf)
    wanted, form = pytree.tree_flatten(want, is_leaf=_is_leaf)
    if tree != form:
        return f"a result of the form {tree}, expected {form}"
    for i, (g, w) in enumerate(zip(found, wanted, strict=True)):
        if not isinstance(w, Tensor):
            if g != w and not (g != g and w != w):
                return f"result {i}: {g!r}, expected {w!r}"
            continue
        if not isinstance(g, Tensor):
            return f"result {i}: {g!r}, expected a tensor"
        wide = w.dtype in (torch.float64, torch.complex128)
        try:
            same(g, w.detach(), f"result {i}", rtol or (1e-9 if wide else None), atol)
        except AssertionError as e:
            return str(e)
    return ""
