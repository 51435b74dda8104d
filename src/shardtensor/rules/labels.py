"""Ops whose dims carry labels, as in einsum: which mesh axes shard which label, decided once.

`run("... p M, ... r M -> ... p r", fn, a, b)`. These laws hold:

- A label is cut alike in every operand and result that has it. Operands choose in the order of
  their sizes, or in a given one; a mesh axis serves one label.
- A label in upper case is whole on every rank. What cut it cuts the largest other label of its
  operand that can be cut, by an all-to-all; where there is none, it is gathered.
- A label that no result has leaves addends, which one all-reduce adds up. Where they would be
  large, and one operand alone is cut along it, it is whole as one in upper case, if it can move.
- A large operand that would be gathered, as another one is cut along another label, moves with it
  to a label that all have, if there is one that can be cut as evenly.
- The dims of `...` broadcast, as torch's do; every other label has one size.
- A label of a result that no operand has is whole, and as large as fn makes it.
- A small operand whose partner is large, whole and learned (features before a classifier) is
  gathered rather than leave addends: cutting the weight would copy it, and its gradient would have
  to be put together again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import comm
from ..cache import cached
from ..errors import UnsupportedOpError
from ..spec import Dim, Spec, axes_in
from ..tensor import ShardTensor, recut, wrap
from ..tensor.redistribute import fit

Labels = tuple[str, ...]
Known = Spec | torch.Size


class Plan(NamedTuple):
    """How labels lie.

    dims: of every label of the operands. wanted: the dims wanted of each operand. results: the spec
    of each result, None where fn decides a size. varying: the mesh axes that cut any label, and
    summed those of labels that no result has. gathered: labels in upper case of which a cut dim had
    no other to move to.
    """

    mesh: DeviceMesh
    dims: dict[str, Dim]
    terms: tuple[Labels, ...]
    wanted: tuple[tuple[Dim, ...], ...]
    results: tuple[Spec | None, ...]
    varying: tuple[int, ...]
    summed: tuple[int, ...]
    gathered: frozenset[str]

    @property
    def out(self) -> Spec:
        """The spec of the only result, whose labels the operands have."""
        (spec,) = self.results
        assert spec is not None
        return spec

    def spec(self, term: Labels, shape: Sequence[int] | None = None) -> Spec:
        """The spec of a tensor with these labels; shape: where an operand has not all of them."""
        dims = [self.dims.get(n) or Dim(shape[i] if shape else 0) for i, n in enumerate(term)]
        return Spec(self.mesh, tuple(dims))

    def fit(self, operands: Sequence[Any]) -> tuple[Any, ...]:
        """The local values of the operands: `redistribute.fit`."""
        return fit(self.mesh, self.varying, *zip(operands, self.wanted, strict=True))

    def result(self, local: Tensor, i: int = 0, op: str = "sum") -> ShardTensor:
        """The i-th result, from what each rank has of it; op: how addends come together."""
        if self.summed:
            local = comm.reduce(local, comm.group(self.mesh, self.summed), op)
        spec = self.results[i]
        if spec is None:
            spec = self.spec(self.terms[len(self.wanted) + i], local.shape)
        return wrap(local, spec)


def known(x: Tensor) -> Known:
    """How an operand lies; its shape where it is plain, hence whole."""
    return x._spec if isinstance(x, ShardTensor) else x.shape


def run(
    pattern: str | tuple[Labels, ...],
    fn: Callable[..., Any],
    *operands: Tensor | None,
    order: tuple[int, ...] | None = None,
    op: str = "sum",
) -> Any:
    """fn(*operands) of global tensors whose dims carry the labels of a pattern.

    fn gets local tensors, cut alike where they have the same label, and must be linear in what it
    sums over. It gives the result, or a tuple of as many as the pattern has. pattern: a string, or
    the labels of each operand and, last, of each result; those of None do not count. order: which
    operand chooses first, and so on; else the largest. op: how addends come together, "sum",
    "max", "min" or "product".

    Operands move where they are not cut as planned (`convert`'s collectives); one
    all-reduce follows where a label that no result has is cut. Raises RuntimeError for sizes that
    do not fit and UnsupportedOpError for different meshes, before anything is sent.
    """
    for x in operands:
        if isinstance(x, ShardTensor):
            break
    else:
        return fn(*operands)
    p = plan(pattern, *operands, order=order)
    found = fn(*p.fit(operands))
    if isinstance(found, Tensor):
        return p.result(found, 0, op)
    return type(found)([p.result(y, i, op) for i, y in enumerate(found)])


def plan(
    pattern: str | tuple[Labels, ...],
    *operands: Tensor | None,
    order: tuple[int, ...] | None = None,
) -> Plan:
    """How operands are wanted and results lie: what `run` does first, for rules that do more."""
    facts: list[Known | None] = []
    learned = None
    for i, x in enumerate(operands):
        if isinstance(x, ShardTensor):
            facts.append(x._spec)
        elif x is None:
            facts.append(None)
        else:
            facts.append(x.shape)
            if learned is None and x.requires_grad and x.is_leaf:
                learned = i
    if isinstance(pattern, str):
        pattern = labels(pattern, tuple([None if x is None else x.ndim for x in operands]))
    return plan_of(pattern, learned, order, *facts)


@cached
def plan_of(
    terms: tuple[Labels, ...],
    learned: int | None,
    order: tuple[int, ...] | None,
    *known: Known | None,
) -> Plan:
    """`plan` of operands that lie so, of which `learned` is a weight."""
    inputs = [t if k is not None else () for k, t in zip(known, terms, strict=False)]
    results = terms[len(known) :]
    shapes = [k.shape if isinstance(k, Spec) else k or torch.Size() for k in known]
    cut = [i for i, k in enumerate(known) if isinstance(k, Spec)]
    mesh = _mesh(known)
    sizes = _sizes(inputs, shapes)
    kept = {name for term in results for name in term}
    if learned is not None and max(shapes[i].numel() for i in cut) < shapes[learned].numel():
        free = {name for name in sizes if not name[0].isupper() and name in kept}
    else:
        free = {name for name in sizes if not name[0].isupper()}
    turns = cut if order is None else [i for i in order if i in cut]
    if order is None:
        turns.sort(key=lambda i: -shapes[i].numel())
    dims = {name: Dim(n) for name, n in sizes.items()}
    own = {i: list(zip(inputs[i], known[i].dims, strict=True)) for i in cut}  # type: ignore[union-attr]
    whole = {name for name in sizes if name[0].isupper()}
    if order is None:
        whole |= _large_sums(own, sizes, results, free)
    free -= whole
    gathered = [name for i in turns for name in _choose(own[i], dims, free, whole, mesh)]
    if order is None:
        _meet(own, dims, [t for t in results if t], free, mesh)
    wanted = tuple(
        tuple(dims[name] if n == sizes[name] else Dim(n) for name, n in zip(t, s, strict=True))
        for t, s in zip(inputs, shapes, strict=True)
    )
    summed = sorted(a for name, d in dims.items() if name not in kept for a in d.axes)
    specs = [
        Spec(mesh, tuple(dims[n] for n in t)) if dims.keys() >= set(t) else None for t in results
    ]
    varying = axes_in(dims.values())
    return Plan(
        mesh, dims, terms, wanted, tuple(specs), varying, tuple(summed), frozenset(gathered)
    )


Own = list[tuple[str, Dim]]


def _large_sums(
    own: dict[int, Own], sizes: dict[str, int], results: Sequence[Labels], free: set[str]
) -> set[str]:
    """Labels that no result has, of which the addends are large beside the operand cut along it."""
    kept = {name for term in results for name in term}
    if not kept <= sizes.keys():
        return set()
    numel = max((prod(sizes[n] for n in term) for term in results), default=0)
    if numel < recut.WHOLE:
        return set()
    cuts = [(name, i) for i, term in own.items() for name, dim in term if dim.is_cut]
    found = set()
    for name, i in cuts:
        if name not in free or name in kept or sum(name == other for other, _ in cuts) > 1:
            continue
        term = dict(own[i])
        parts = len(term[name].sizes)
        room = any(
            n in free and n in kept and not d.axes and d.size == sizes[n] >= parts
            for n, d in own[i]
        )
        if room and 2 * numel >= prod(d.size for d in term.values()) // parts:
            found.add(name)
    return found


def _meet(
    own: dict[int, Own],
    dims: dict[str, Dim],
    results: Sequence[Labels],
    free: set[str],
    mesh: DeviceMesh,
) -> None:
    """Cut a label of all operands and results where a large operand would be gathered else."""
    for term in own.values():
        for name, dim in term:
            if not dim.is_cut or name in (n for n, _ in term if dims[n].axes == dim.axes):
                continue
            if prod(d.size for _, d in term) < recut.WHOLE:
                continue
            held = next((n for n, d in dims.items() if d.axes == dim.axes), None)
            if held is None or held in dict(term):
                continue
            terms = [dict(t) for t in own.values()]
            parts = len(dim.sizes)
            # what moves is a shard of each, what would be gathered nearly all of this one
            moves = sum(prod(d.size for d in t.values()) for t in terms)
            if moves > parts * prod(d.size for _, d in term):
                continue
            common = [
                n
                for n in free.intersection(*terms, *results)
                if not dims[n].axes
                and all(t[n].size == dims[n].size for t in terms)
                and (dims[n].size % parts == 0 or dims[n].size >= 8 * parts)
            ]
            if common:
                to = max(common, key=lambda n: (dims[n].size, n))
                dims[held] = dims[held].whole
                dims[to] = Dim.chunked(dims[to].size, dim.axes, mesh)


def _choose(
    own: Own, dims: dict[str, Dim], free: set[str], whole: set[str], mesh: DeviceMesh
) -> list[str]:
    """Cut labels as an operand is, by axes that cut none yet; gives those that must be gathered."""
    used = {a for d in dims.values() for a in d.axes}
    for name, dim in own:
        open = name in free and not dims[name].axes and used.isdisjoint(dim.axes)
        if open and dim.axes and dim.size == dims[name].size:
            dims[name] = dim
            used.update(dim.axes)
    gathered = []
    for name, dim in own:
        if name not in whole or not dim.is_cut or not used.isdisjoint(dim.axes):
            continue
        aside = [n for n, d in own if n in free and not dims[n].axes and d.size == dims[n].size > 1]
        if aside:
            to = max(aside, key=lambda n: dims[n].size)
            dims[to] = Dim.chunked(dims[to].size, dim.axes, mesh)
            used.update(dim.axes)
        else:
            gathered.append(name)
    return gathered


def _mesh(known: Sequence[Known | None]) -> DeviceMesh:
    """The mesh of all that is sharded."""
    mesh, *others = [k.mesh for k in known if isinstance(k, Spec)]
    if any(m != mesh for m in others):
        raise UnsupportedOpError(f"tensors on different meshes: {known}; distribute all on one")
    return mesh


def _sizes(terms: Sequence[Labels], shapes: list[torch.Size]) -> dict[str, int]:
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
def labels(pattern: str, ndims: tuple[int | None, ...]) -> tuple[Labels, ...]:
    """The labels of each operand and, last, of each result; the dims of `...` are numbered."""
    left, _, right = pattern.partition("->")
    terms = [t.split() for t in left.split(",")]
    if len(terms) != len(ndims):
        raise ValueError(f"{pattern!r} is for {len(terms)} operands, not {len(ndims)}")
    spans = [_ellipsis(pattern, t, n) for t, n in zip(terms, ndims, strict=True)]
    most = max(spans, default=0)
    results = [t.split() for t in right.split(",")]
    for name in {n for t in results for n in t if t.count(n) > 1 and not n[0].isupper()}:
        raise ValueError(
            f"{pattern!r}: a result has {name!r} twice, and could be cut along one of them only: "
            "give the operand twice, with two labels"
        )
    terms += results
    spans += [most] * (len(terms) - len(spans))
    return tuple(
        tuple(name for t in term for name in (broadcast(n, most) if t == "..." else (t,)))
        for term, n in zip(terms, spans, strict=True)
    )


def _ellipsis(pattern: str, term: list[str], ndim: int | None) -> int:
    """How many dims the `...` of an operand's labels stands for; None: there is no operand."""
    n = 0 if ndim is None else ndim - len(term) + ("..." in term)
    if n < 0 or (n > 0 and "..." not in term):
        raise RuntimeError(f"{pattern!r}: {' '.join(term)!r} for a tensor of {ndim} dims")
    return n


def broadcast(n: int, most: int) -> Labels:
    """Labels of the last n of `most` dims that broadcast."""
    return tuple([f".{j}" for j in range(most - n, most)])


@cached
def elementwise(*ndims: int) -> tuple[Labels, ...]:
    """The labels of operands that broadcast against each other, and of the result."""
    most = max(ndims)
    return tuple([broadcast(n, most) for n in (*ndims, most)])
