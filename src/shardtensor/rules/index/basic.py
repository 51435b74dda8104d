"""x[...] with slices, integers and None that moves no row: found once for each spec and index."""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ...cache import cached
from ...spec import Dim, Spec
from ..views.slices import picks, span


class Basic(NamedTuple):
    """What an index of slices, integers and None gives without communication.

    spec: of the result; None: of all of x. local: the index of the local tensor. part: as in
    `slice_of`; its rows are those of what the dims of integers and None leave, if not `own`.
    """

    spec: Spec | None
    local: tuple[Any, ...]
    part: dict[int, tuple[tuple[int, int], int]]
    own: bool


def is_several(index: Any) -> bool:
    """Whether torch takes an index for one of each dim: a tuple, or a list of more than numbers."""
    if not isinstance(index, list) or len(index) >= 32:
        return isinstance(index, tuple)
    several = Tensor | np.ndarray | Sequence | slice | EllipsisType
    return any(e is None or isinstance(e, several) for e in index)


def hashable(index: Any) -> tuple[Any, ...] | None:
    """An index of slices, integers, None and an ellipsis, to be found by; None for any other."""
    found: list[Any] = []
    for e in index if type(index) is tuple else (index,):
        kind = type(e)
        if kind is slice:
            a, b, c = e.start, e.stop, e.step
            if not (
                (a is None or type(a) is int)
                and (b is None or type(b) is int)
                and (c is None or type(c) is int)
            ):
                return None
            found.append((a, b, c))
        elif kind is int or e is None or e is Ellipsis:
            found.append(e)
        else:
            return None
    return tuple(found)


@cached
def basic(spec: Spec, key: tuple[Any, ...]) -> Basic | None:
    """How a `hashable` index is applied; None where rows move, or torch raises."""
    given = sum([e is not None and e is not Ellipsis for e in key])
    ndim = len(spec.dims)
    if given > ndim or key.count(Ellipsis) > 1:
        return None
    where = key.index(Ellipsis) if Ellipsis in key else len(key)
    rest = ((None, None, None),) * (ndim - given)
    new, d = spec, 0
    local: list[Any] = []
    part: dict[int, Any] = {}
    own = True
    for e in (*key[:where], *rest, *key[where + 1 :]):
        if e is None:
            new, part, own = new.insert(d, Dim(1)), {}, False
            local.append(None)
            d += 1
        elif isinstance(e, int):
            dim = new.dims[d]
            if dim.axes or not -dim.size <= e < dim.size:
                return None
            new, part, own = new.drop([d]), {}, False
            local.append(e)
        else:
            step = 1 if e[2] is None else e[2]
            if step < 1:
                return None
            if e != (None, None, None):
                start, stop = span(e[0], e[1], step, new.dims[d].size)
                dim, rows = picks(new.dims[d], new.index[d], start, stop, step)
                new, part = new.replace({d: dim}), {**part, d: ((start, stop), step)}
                local.append(rows)
            else:
                local.append(slice(None))
            d += 1
    return Basic(None if new is spec else new, tuple(local), part, own)
