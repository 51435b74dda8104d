"""Ops whose dims carry labels, as in einsum: which mesh axes shard which label, decided once.

`run("... p M, ... r M -> ... p r", fn, a, b)`. These laws hold:

- A label is cut alike in every operand that has it. Operands choose in the order of their sizes; a
  mesh axis serves one label.
- A label in upper case is whole on every rank.
- A label that the result has not leaves addends, which one all-reduce adds up.
- The dims of `...` broadcast, as torch's do; every other label has one size.
- A small operand whose partner is large, whole and learned (features before a classifier) is
  gathered rather than leave addends: cutting the weight would copy it, and its gradient would have
  to be put together again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import comm
from ..cache import cached
from ..errors import UnsupportedOpError
from ..spec import Dim, Spec
from ..tensor import ShardTensor, wrap
from ..tensor.redistribute import fit, reduced

Labels = tuple[str, ...]
Known = Spec | torch.Size


class Plan(NamedTuple):
    """The result's spec, the dims wanted of each operand, the axes that are summed over."""

    out: Spec
    wanted: tuple[tuple[Dim, ...], ...]
    varying: tuple[int, ...]
    summed: tuple[int, ...]


def run(pattern: str | tuple[Labels, ...], fn: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    """fn(*operands) of global tensors whose dims carry the labels of a pattern.

    fn gets local tensors, cut alike where they have the same label, and must be linear in what it
    sums over. pattern: a string, or the labels of each operand and, last, of the result. Operands
    move where they are not cut as planned (`redistribute.convert`'s collectives); one all-reduce
    follows where a label that is summed is cut. Raises RuntimeError for sizes that do not fit and
    UnsupportedOpError for different meshes, before anything is sent.
    """
    given: list[Tensor] = []
    facts: list[Known] = []
    learned = None
    for i, x in enumerate(operands):
        if isinstance(x, ShardTensor):
            x = reduced(x)
            facts.append(x._spec)
        else:
            facts.append(x.shape)
            if learned is None and x.requires_grad and x.is_leaf:
                learned = i
        given.append(x)
    if not any(isinstance(k, Spec) for k in facts):
        return fn(*operands)
    terms = labels(pattern, tuple([x.ndim for x in given])) if isinstance(pattern, str) else pattern
    p = plan(terms, *facts, learned=learned)
    local = fn(*fit(p.out.mesh, p.varying, *zip(given, p.wanted, strict=True)))
    if p.summed:
        local = comm.reduce(local, comm.group(p.out.mesh, p.summed))
    return wrap(local, p.out)


@cached
def plan(terms: tuple[Labels, ...], *known: Known, learned: int | None = None) -> Plan:
    """Where operands are wanted and how the result lies. learned: an operand that is a weight."""
    *inputs, out = terms
    shapes = [k.shape if isinstance(k, Spec) else k for k in known]
    specs = [(k, t) for k, t in zip(known, inputs, strict=True) if isinstance(k, Spec)]
    mesh = specs[0][0].mesh
    if any(s.mesh != mesh for s, _ in specs):
        raise UnsupportedOpError(f"tensors on different meshes: {known}; distribute all on one")
    sizes = _sizes(inputs, shapes)
    most = max(s.shape.numel() for s, _ in specs)
    small = learned is not None and most < shapes[learned].numel()
    dims = {name: Dim(n) for name, n in sizes.items()}
    used: set[int] = set()
    for spec, term in sorted(specs, key=lambda s: -s[0].shape.numel()):
        for name, dim in zip(term, spec.dims, strict=True):
            if not dim.axes or name[0].isupper() or (small and name not in out):
                continue
            free = not dims[name].axes and used.isdisjoint(dim.axes)
            if free and dim.size == sizes[name]:
                dims[name] = dim
                used.update(dim.axes)
    wanted = tuple(
        tuple(dims[name] if n == sizes[name] else Dim(n) for name, n in zip(t, s, strict=True))
        for t, s in zip(inputs, shapes, strict=True)
    )
    summed = sorted(a for name, d in dims.items() if name not in out for a in d.axes)
    return Plan(Spec(mesh, tuple(dims[n] for n in out)), wanted, tuple(sorted(used)), tuple(summed))


def _sizes(terms: list[Labels], shapes: list[torch.Size]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for name, n in zip(term, shape, strict=True):
            other = sizes.setdefault(name, n)
            if n == other:
                continue
            if not name.startswith(".") or 1 not in (n, other):
                raise RuntimeError(
                    f"shapes {[tuple(s) for s in shapes]} do not fit each other: "
                    f"a dim of {other} meets one of {n}"
                )
            sizes[name] = n if other == 1 else other
    return sizes


@cached
def labels(pattern: str, ndims: tuple[int, ...]) -> tuple[Labels, ...]:
    """The labels of each operand and, last, of the result; the dims of `...` are numbered."""
    left, _, right = pattern.partition("->")
    terms = [t.split() for t in (*left.split(","), right)]
    if len(terms) != len(ndims) + 1:
        raise ValueError(f"{pattern!r} is for {len(terms) - 1} operands, not {len(ndims)}")
    extra = [n - len(t) + 1 for t, n in zip(terms, ndims, strict=False) if "..." in t]
    most = max(extra, default=0)
    return tuple(
        _spelled(pattern, term, n, most) for term, n in zip(terms, (*ndims, None), strict=True)
    )


def _spelled(pattern: str, term: list[str], ndim: int | None, most: int) -> Labels:
    """One term with its `...` written out as the last of the `most` broadcast dims."""
    if "..." not in term:
        if ndim not in (None, len(term)):
            raise RuntimeError(f"{pattern!r}: {' '.join(term)!r} for a tensor of {ndim} dims")
        return tuple(term)
    n = most if ndim is None else ndim - len(term) + 1
    if n < 0:
        raise RuntimeError(f"{pattern!r}: {' '.join(term)!r} for a tensor of {ndim} dims")
    at = term.index("...")
    return (*term[:at], *broadcast(n, most), *term[at + 1 :])


def broadcast(n: int, most: int) -> Labels:
    """Labels of the last n of `most` dims that broadcast."""
    return tuple([f".{j}" for j in range(most - n, most)])


@cached
def elementwise(*ndims: int) -> tuple[Labels, ...]:
    """The labels of operands that broadcast against each other, and of the result."""
    most = max(ndims)
    return tuple([broadcast(n, most) for n in (*ndims, most)])
