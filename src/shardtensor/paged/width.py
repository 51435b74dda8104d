"""Which halo of the input parts need that do not meet, and whether that pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import prod

import torch
from torch import nn

from .._torch import probe
from .meeting import Meeting
from .parts import Cut, Span

# of the elements that a model makes, those that parts may make once more: of a U-Net 19 % cost less
# than exchanges and files that the system's cache holds, 38 % more (`benchmarks/tiled.py`)
MORE = 0.25
At = tuple[int, ...]
# of a part, a halo and whether backward runs, how each sharded output is cut, and what was made
Tried = Callable[[At, tuple[int, ...], bool], tuple[list[dict[int, Cut]], Meeting]]


def hooked(model: nn.Module, own: int = 0) -> bool:
    """Whether somebody looks at modules: at parts as they are, not at wider ones.

    own: hooks of the library's own.
    """
    tables = ["_forward_hooks", "_forward_pre_hooks"]
    tables += ["_backward_hooks", "_backward_pre_hooks"] * torch.is_grad_enabled()
    found = sum(len(getattr(m, t)) for m in model.modules() for t in tables)
    return found > own or any(probe.global_hooks())


def needed(
    rows: Sequence[int],
    spans: Sequence[Sequence[Span]],
    better_met: Callable[[Meeting], bool],
    tried: Tried,
    known: Sequence[int] | None = None,
) -> list[int] | None:
    """The halo that outputs need in each dim, found on fake tensors; None where parts are to meet.

    Rows that a part in the middle and the ones before it both have, or that neither has, tell it.
    known: a halo that may do.
    """
    middle = tuple([len(s) // 2 for s in spans])
    edges = [s[i][0] for s, i in zip(spans, middle, strict=True)]
    # no slab may reach the border that is not its part's: there nothing would lack
    halo = [
        max(0, min(int(2 * MORE * s[0][1]), e - 1, n - e - 1))
        for s, e, n in zip(spans, edges, rows, strict=True)
    ]
    if known is not None:
        halo = [min(n, most) for n, most in zip(known, halo, strict=True)]
    tried = cache(tried)
    axes = range(len(middle))
    for again in (known is not None, True, True):
        outputs, made = tried(middle, tuple(halo), again)
        if better_met(made):
            return None
        lacks = [-n for n in halo]
        for k in axes:
            if middle[k]:
                others, _ = tried(before(middle, k), tuple(halo), False)
                pairs = [(a[k], b[k]) for a, b in zip(others, outputs, strict=True) if k in b]
                lacks[k] = max([_lack(a, b, rows[k]) for a, b in pairs], default=0)
        if again and all(n <= 0 for n in lacks):
            break
        # parts begin anywhere among the rows of which one is made
        steps = zip(halo, lacks, made.per, strict=True)
        halo = [max(0, h + n + (per - 1 if h + n else 0)) for h, n, per in steps]
    else:
        return None
    share = made.elements * prod(map(len, spans)) / made.whole
    first, _ = tried((0,) * len(axes), tuple(halo), True)
    last, _ = tried(tuple([len(s) - 1 for s in spans]), tuple(halo), True)
    whole = all(c[0] == 0 for y in first for c in y.values()) and all(
        c[1] == c[2] for y in last for c in y.values()
    )
    return halo if whole and share <= 1 + MORE else None


def _lack(a: Cut, b: Cut, rows: int) -> int:
    """Of the input's rows those that either side of a cut needs more than it had; less if < 0."""
    return -((a[1] - b[0]) * rows // (2 * a[2]))


def before(at: At, k: int) -> At:
    """The part before one along a dim."""
    return (*at[:k], at[k] - 1, *at[k + 1 :])
