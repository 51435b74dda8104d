"""A model whose weights and buffers have no memory, however its constructor is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..._torch.dispatcher import outside_modes
from ...errors import UnsupportedOpError
from . import caches
from .collector import collect
from .known import MOST_DRAWN
from .ledger import Ledger

# bytes of weights up to which a model is built for real, if it cannot be without memory
REAL = 2**33
# what gives weights values that may be read
_CONSTANT = {"zeros_", "ones_", "constant_", "eye_", "dirac_"}


def build(make: Callable[[], nn.Module], ledger: Ledger) -> nn.Module:
    """What make gives, on fake tensors; constants, schedules and small buffers have their values.

    The constructor runs on fake tensors. One that cannot runs for real, without filling weights,
    which then lose their memory: UnsupportedOpError where they would take too much of it.
    """
    model = _built(make, ledger)
    if not isinstance(model, nn.Module):
        raise TypeError(f"make gives a {type(model).__name__}, not a module")
    for name, p in model.named_parameters():
        if nn.parameter.is_lazy(p):
            raise UnsupportedOpError(
                f"{name} is made by the model's first forward: let `make` call it once, of any size"
            )
    return model


def _built(make: Callable[[], nn.Module], ledger: Ledger) -> nn.Module:
    begun, first = len(ledger.moves), ledger.next
    try:
        return make()
    except Exception as e:
        # not the error itself, which holds the frames, and these what was made
        error = f"{type(e).__name__}: {e}"
    made = sum(n for _, n in ledger.moves[begun:] if n > 0)
    if made > REAL:
        raise UnsupportedOpError(
            f"the model's constructor needs values of weights ({error}), "
            f"and its {made / 2**30:.0f} GiB are too many to make them: build fewer layers"
        )
    if ledger.keeps(first):
        collect()
        if ledger.keeps(first):
            caches.forget()
    with outside_modes(), _unfilled():
        model = make()
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, x in table.items():
                if x is not None and not nn.parameter.is_lazy(x):
                    most = MOST_DRAWN if table is module._parameters else None
                    table[key] = ledger.known.fake(x, most)  # type: ignore[assignment]
    return model


@contextmanager
def _unfilled() -> Iterator[None]:
    """Inside, weights are made without their random numbers, which take time."""
    names = [n for n in vars(nn.init) if n.endswith("_") and not n.startswith("_")]
    kept = {n: getattr(nn.init, n) for n in names if n not in _CONSTANT}

    def given(x: Any, *args: Any, **kwargs: Any) -> Any:
        return x

    try:
        for n in kept:
            setattr(nn.init, n, given)
        yield
    finally:
        for n, f in kept.items():
            setattr(nn.init, n, f)
