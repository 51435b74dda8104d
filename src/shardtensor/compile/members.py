"""The modules of what is compiled, their parameters and buffers: found once, compared in C."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import Any

from torch import Tensor, nn

_TABLES = [attrgetter(name) for name in ("_modules", "_parameters", "_buffers")]
_keys, _values, _training = methodcaller("keys"), methodcaller("values"), attrgetter("training")


class Members:
    """names: of each of the tensors, all that it has. form: a number for names as they are now."""

    def __init__(self, fn: Any) -> None:
        self.fn = fn
        self.modules: list[nn.Module] = []
        self.names: list[tuple[str, ...]] = []
        self.tensors: list[Tensor] = []
        self.forms: dict[Any, int] = {}
        self.form: int = -1
        self.sizes: list[int] = []
        self.held: list[Any] = []
        self.places: dict[int, int] = {}

    def find(self) -> None:
        """Find them anew, where any is another one than before."""
        if not isinstance(self.fn, nn.Module):
            return
        sizes, held = self._now()
        if self.form >= 0 and sizes == self.sizes and all(map(is_, held, self.held)):
            return
        self.modules = [*self.fn.modules()]
        self.sizes, self.held = self._now()
        names: dict[int, list[str]] = {}
        found: dict[int, Tensor] = {}
        for name, x in members_of(self.fn).items():
            names.setdefault(id(x), []).append(name)
            found[id(x)] = x
        self.names, self.tensors = [*map(tuple, names.values())], [*found.values()]
        self.places = {id(x): i for i, x in enumerate(self.tensors)}
        self.form = self.forms.setdefault(tuple(self.names), len(self.forms))

    def training(self) -> tuple[bool, ...]:
        """Of each module, whether it is in train mode."""
        return tuple(map(_training, self.modules))

    def _now(self) -> tuple[list[int], list[Any]]:
        """How much each table of each module holds; all names and values."""
        tables = [*chain.from_iterable(map(get, self.modules) for get in _TABLES)]
        names, values = map(_keys, tables), map(_values, tables)
        return [*map(len, tables)], [*chain.from_iterable(names), *chain.from_iterable(values)]


def members_of(fn: Any) -> dict[str, Tensor]:
    """Parameters, then buffers, of a module by all names; no name through a module's second one."""
    if not isinstance(fn, nn.Module):
        return {}
    modules = [*fn.named_modules()]
    return {
        f"{prefix}.{name}" if prefix else name: x
        for table in _TABLES[1:]
        for prefix, m in modules
        for name, x in table(m).items()
        if x is not None
    }
