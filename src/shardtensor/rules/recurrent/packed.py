"""RNN, GRU and LSTM of packed sequences: each rank has some of them, whole.

Rows go to the ranks of their sequences and the results back to where rows lie; each travels once,
and ranks find out from the numbers of sequences of all steps, which are the same everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedOpError
from ...spec import Dim, Spec
from ...tensor import ShardTensor, wrap
from ...tensor.redistribute import fit, like
from ..empty import with_one
from ..operands import cut_axes, lifted
from ..rows import read

_NAMES = ("input", "batch_sizes", "hx", "params", "has_biases", "num_layers", "dropout", "train")


def packed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """f(input, batch_sizes, hx, weights, has_biases, layers, dropout, train, bidirectional)."""
    given = dict(zip((*_NAMES, "bidirectional"), args, strict=False)) | kwargs
    x, hx, weights = given["input"], given["hx"], list(given["params"])
    alone = not isinstance(hx, list | tuple)
    states = [hx] if alone else list(hx)
    x = lifted(x, *states, *weights)
    mesh = x._spec.mesh
    if given["train"] and given["dropout"] and given["num_layers"] > 1:
        raise UnsupportedOpError(
            f"{func.__name__} of packed sequences on {x._spec} with dropout between layers: "
            "take layers one by one with dropout of their data between, or padded sequences"
        )
    counts = given["batch_sizes"]
    counts = counts.full_tensor() if isinstance(counts, ShardTensor) else counts
    shards = [d for s in (x, *states) if isinstance(s, ShardTensor) for d in s._spec.dims]
    axes = tuple(sorted({a for d in shards for a in cut_axes(d)}))
    # sequences come longest first
    batch = Dim.chunked(int(counts[0]), axes, mesh)
    order, sizes = _by_rank(counts, batch)
    rows = Dim(len(order), axes, sizes) if axes else Dim(len(order))
    spec = Spec(mesh, (rows, Dim(x.shape[1])))
    back = x._spec.dims[0]
    back = back if set(back.axes) == set(axes) else Dim.chunked(len(order), axes, mesh)
    if axes:
        x = like(x, Spec(mesh, (back, Dim(x.shape[1]))))
        x = read(x, _cut(order, rows, mesh, x.device), negative=None)
    a, b = Spec(mesh, (batch,)).spans[0]
    mine = (counts - a).clamp(0, b - a)
    mine = mine[mine > 0] if b > a else torch.ones_like(counts[:1])
    whole = [(Dim(s.shape[0]), batch, Dim(s.shape[2])) for s in states]
    local, *rest = fit(
        mesh, axes, (x, spec.dims), *zip(states, whole, strict=True), *((w, None) for w in weights)
    )
    ends = [with_one(s, [1], 0.0) for s in rest[: len(states)]]
    out, *last = func(
        with_one(local, [0], 0.0), mine, ends[0] if alone else ends, rest[len(states) :],
        given["has_biases"], given["num_layers"], 0.0, given["train"], given["bidirectional"],
    )  # fmt: skip
    n = spec.local_shape[0]
    y = wrap(out.narrow(0, 0, n), Spec(mesh, (rows, Dim(out.shape[1]))))
    if axes:
        y = read(y, _cut(order.argsort(), back, mesh, x.device), negative=None)
    found = []
    for s in last:
        dims = Dim(s.shape[0]), batch, Dim(s.shape[2])
        found.append(wrap(s.narrow(1, 0, b - a), Spec(mesh, dims)))
    return (y, *found)


def _by_rank(counts: Tensor, batch: Dim) -> tuple[Tensor, tuple[int, ...]]:
    """The packed rows in order of the ranks that have their sequences, and how many each has."""
    rows = torch.arange(int(counts.sum()))
    if not batch.axes:
        return rows, ()
    # those of a step are of the first sequences
    sequence = rows - (counts.cumsum(0) - counts).repeat_interleave(counts)
    owner = torch.bucketize(sequence, torch.tensor(batch.offsets[1:-1]), right=True)
    sizes = torch.bincount(owner, minlength=len(batch.sizes))
    return owner.argsort(stable=True), tuple(sizes.tolist())


def _cut(index: Tensor, dim: Dim, mesh: Any, device: torch.device) -> ShardTensor:
    """An index that all ranks know, cut as a dim."""
    spec = Spec(mesh, (dim,))
    return wrap(index[spec.block].to(device), spec)
