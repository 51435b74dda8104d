"""Modules under other names: doors of `shardtensor` itself, and names of 0.1 with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType
from typing import Any

# what `shardtensor` itself has under the name
DOORS = {
    "balance": "train.balance",
    "graph": "ops.graph",
    "points": "ops.points",
    "random": "tensor.random",
    "sparse": "ops.sparse",
    "spectral": "ops.spectral",
    "sphere": "ops.sphere",
}
BEFORE = {
    "construct": "tensor.construct",
    "doctor": "plan.doctor",
    "estimate": "plan.estimate",
    "fallback": "dispatch.fallback",
    "guard": "observe.guard",
    "launch": "train.launch",
    "measure": "ranks.measure",
    "options": "train.options",
    "parallel": "train.parallelize",
    "pool": "ranks.workers",
    "redistribute": "tensor.redistribute",
    "rehearse": "ranks.rehearse",
    "simulate": "ranks.simulate",
    "tensor_parallel": "train.tensor_parallel",
    "timeline": "observe.timeline",
    "trace": "observe.trace",
}
# what is imported when it is first asked for
LATER = ("accelerate", "checkpoint", "compat", "lightning", "transformers")


def later(name: str) -> ModuleType:
    """A package of `shardtensor` that its import leaves out."""
    if name not in LATER:
        raise AttributeError(f"module 'shardtensor' has no attribute {name!r}")
    return importlib.import_module(f"shardtensor.{name}")


class _Moved(ModuleType):
    """A module by the name it had: what is taken from it is the new one's, with a warning."""

    def __init__(self, name: str, new: str) -> None:
        super().__init__(name, f"See `{new}`.")
        self.__dict__["_new"] = new

    def __getattr__(self, name: str) -> Any:
        # what the import system asks for
        if name.startswith("__"):
            raise AttributeError(name)
        warnings.warn(
            f"{self.__name__} is {self._new} since shardtensor 0.2; the old name goes with 0.4",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(self._new), name)


def install(package: str) -> None:
    """Make the names importable; the package has imported all that they stand for."""
    for old, new in DOORS.items():
        here = f"{package}.{new}"
        for name, module in list(sys.modules.items()):
            if name == here or name.startswith(f"{here}."):
                sys.modules[f"{package}.{old}{name.removeprefix(here)}"] = module
    for old, new in BEFORE.items():
        moved = _Moved(f"{package}.{old}", f"{package}.{new}")
        sys.modules[moved.__name__] = moved
        # a function of this name stays what it is
        if not hasattr(sys.modules[package], old):
            setattr(sys.modules[package], old, moved)
