"""Modules that are imported when something of them is first asked for, or told when they are."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any


class Later:
    """A module's names; the first of them imports it. Half of a second that no import waits for."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(importlib.import_module(self._module), name)
        setattr(self, name, found)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        # what is made of a copy asks for names before it has its own
        return Later, (self._module,)


if TYPE_CHECKING:
    from torch.distributed import fsdp as fsdp2
    from torch.distributed import tensor as dt
    from torch.distributed.checkpoint import state_dict as states
    from torch.distributed.tensor import parallel as styles
    from torch.fx.experimental import symbolic_shapes as symbolic
    from torch.nn.attention import flex_attention as flex
    from torch.utils import flop_counter
else:
    dt = Later("torch.distributed.tensor")
    fsdp2 = Later("torch.distributed.fsdp")
    states = Later("torch.distributed.checkpoint.state_dict")
    styles = Later("torch.distributed.tensor.parallel")
    symbolic = Later("torch.fx.experimental.symbolic_shapes")
    flex = Later("torch.nn.attention.flex_attention")
    flop_counter = Later("torch.utils.flop_counter")


class _Finder(MetaPathFinder):
    """Tells those who wait for a module that it has been imported."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Callable[[ModuleType], object]]] = {}
        self.asking: set[tuple[int, str]] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        asking = (threading.get_ident(), fullname)
        if fullname not in self.waiting or asking in self.asking:
            return None
        # others may ask all finders, too: none in a circle
        self.asking.add(asking)
        try:
            found = (f.find_spec(fullname, path, target) for f in list(sys.meta_path))
            spec = next((s for s in found if s is not None), None)
        finally:
            self.asking.discard(asking)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_tell(module: ModuleType) -> None:
                load(module)
                # one loader may be that of many modules, as of a zip file
                for then in self.waiting[fullname] if module.__name__ == fullname else ():
                    then(module)

            spec.loader.exec_module = load_and_tell  # type: ignore[method-assign]
        return spec


_finder = _Finder()


def when_loaded(module: str, then: Callable[[ModuleType], object]) -> None:
    """Call then(module) now if it is imported, and whenever it is imported from now on."""
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    # kept for a module that is imported anew
    _finder.waiting.setdefault(module, []).append(then)
    if sys.modules.get(module) is not None:
        # whole, where another thread is importing it
        then(importlib.import_module(module))


# gives the classes that FSDP2 made of modules' own, dead ones too if no collection ran since
fsdp_classes: Callable[[], list[type]] = list


def _know_fsdp(module: ModuleType) -> None:
    global fsdp_classes
    fsdp_classes = module.FSDPModule.__subclasses__


when_loaded("torch.distributed.fsdp", _know_fsdp)
