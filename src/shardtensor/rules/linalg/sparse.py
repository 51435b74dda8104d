"""Products with a sparse matrix that every rank has, of tensors whose rows are cut.

Y = S X, where X (K, ...) is cut along K: each rank makes the rows of Y of its part, and needs those
rows of X that its rows of S name. Which these are, S says, alike on all ranks: nothing is asked,
and what was found is kept with the matrix. X S is the same with S transposed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import _torch, comm
from ...comm.route import Route, arrivals
from ...errors import UnsupportedOpError
from ...spec import Dim
from ...tensor import ShardTensor, wrap
from ...tensor.redistribute import fit, reduced
from ..routes import kept

_COO, _CSR, _CSC = torch.sparse_coo, torch.sparse_csr, torch.sparse_csc
# dtypes that torch has kernels for, whatever the layout
_USUAL = {torch.float32, torch.float64, torch.complex64, torch.complex128}
# numbers that the gradient of a matrix' values takes at a time
_AT_ONCE = 2**22


@dataclass(frozen=True)
class _Part:
    """This rank's rows of a matrix, entry by entry in their order, and the way of X's rows to them.

    picked: which entries of the whole. places: that of each, (row, column) as torch's COO has
    them or, where crow is given, columns as CSR has them; columns count what arrives. shape: of
    this part. route: None where no rank needs rows of another. once: no place comes twice.
    """

    picked: Tensor | slice
    places: Tensor
    crow: Tensor | None
    shape: tuple[int, int]
    route: Route | None
    once: bool


def is_sparse(x: Tensor) -> bool:
    """Whether an operand is a plain tensor that is sparse."""
    return not isinstance(x, ShardTensor) and x.layout in (_COO, _CSR, _CSC)


def product(s: Tensor, x: Tensor, d: int, turned: bool, sparse_grad: bool) -> Tensor | None:
    """S times dim d of x, in whose place the matrix' rows come; None where the shards need no care.

    turned: S transposed. sparse_grad: whether torch's own gradient of S has S's entries only.

    Where dim d is cut, the result is cut there by the same mesh axes: as x is if it has as many
    rows, else evenly. Sends each row of x that a rank needs of another once, and its summed
    gradient back; for a learned matrix, an all-reduce of its values' gradient. First use finds who
    needs what in the entries of S, without communication; a matrix that lives on keeps it.
    """
    if not isinstance(x, ShardTensor):
        return None
    learned = s.requires_grad and torch.is_grad_enabled()
    if not (x._spec.dims[d].axes or learned):
        return None
    _refuse(s, learned, turned, sparse_grad)
    rows, columns = reversed(s.shape) if turned else s.shape
    if columns != x.shape[d]:
        raise RuntimeError(
            f"a sparse matrix of shape {tuple(s.shape)} and a tensor of shape {tuple(x.shape)} "
            "cannot be multiplied"
        )
    if learned and s.layout is _COO:
        # only these have values with a gradient
        s = s.coalesce()
    x = reduced(x)
    spec, k = x._spec, x._spec.dims[d]
    values = s._values() if s.layout is _COO and not learned else s.values()
    values, own = _cast(values), _cast(x._local)
    _check(s, values, own)
    to = k if rows == columns else Dim.chunked(rows, k.axes, spec.mesh)
    part = _part(s, turned, k, to, comm.group(spec.mesh, k.axes))
    v, own = fit(spec.mesh, spec.varying, (values, None), (wrap(own, spec), spec.dims))
    own = own.movedim(d, 0)
    rest = own.shape[1:]
    own = own.reshape(len(own), rest.numel())
    if part.route is not None:
        own = arrivals(own, part.route)
    twice = not learned or _of_values(s)
    out = _Product.apply(v[part.picked], own, part, False, twice)
    out = out.view(part.shape[0], *rest).movedim(0, d).contiguous()
    return wrap(out, spec.replace({d: to}))


def refuse_batched(op: str) -> None:
    """Raise where torch would expand the matrix for a batch, which it cannot."""
    raise UnsupportedOpError(
        f"{op} of a sparse matrix and a batch, which torch does not have: make x contiguous and "
        "let it come first (x @ S.t()), or bring its batch into columns (S @ x.reshape(n, -1))"
    )


def foldable(x: Tensor) -> bool:
    """Whether torch makes one matrix of a batch x of x @ S: its rows lie one after the other."""
    shape, stride = x.shape, x.stride()
    return not x.numel() or all(
        stride[i] == stride[i + 1] * shape[i + 1] for i in range(x.ndim - 2)
    )


def _refuse(s: Tensor, learned: bool, turned: bool, sparse_grad: bool) -> None:
    if s.ndim != 2 or s.dense_dim():
        raise UnsupportedOpError(
            f"a sparse tensor of shape {tuple(s.shape)} with {s.dense_dim()} dense dims: products "
            "of shards take a sparse matrix; make it dense (to_dense())"
        )
    if learned and s.layout is not _COO and (turned or s.layout is not _CSR or not sparse_grad):
        raise UnsupportedOpError(
            "the gradient of a CSR or CSC matrix in this product, which torch lacks or makes "
            "dense: use torch.sparse.mm(S, x) of a CSR matrix, or a COO one"
        )
    if learned and not sparse_grad and not _of_values(s):
        raise UnsupportedOpError(
            "the gradient of a sparse matrix in this product, which torch makes dense, as large as "
            "S.to_dense(): use torch.sparse.mm, whose gradient is sparse, or make S of its values, "
            "torch.sparse_coo_tensor(indices, values, size)"
        )
    if _torch.is_tracing():
        raise UnsupportedOpError(
            "a product with a sparse matrix inside of a graph: what ranks send depends on its "
            "entries, which a trace does not know; call it outside of what is compiled or planned"
        )


def _of_values(s: Tensor) -> bool:
    """Whether the gradient of a matrix goes to the values that it is made of, and nowhere else."""
    node: Any = s.grad_fn
    while node is not None and node.name() in (
        "CoalesceBackward0",
        "TBackward0",
        "TransposeBackward0",
    ):
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith("SparseCooTensorWithDims")


def _cast(x: Tensor) -> Tensor:
    """As autocast casts the operands of a product."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype is torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device)) if x.is_floating_point() else x


def _check(s: Tensor, values: Tensor, own: Tensor) -> None:
    """Raise what torch raises of dtypes, also where this rank has nothing to multiply."""
    if values.dtype != own.dtype:
        raise RuntimeError(f"a sparse matrix of {s.dtype} times a tensor of {own.dtype}")
    if values.dtype not in _USUAL:
        one = torch.ones(1, 1, dtype=values.dtype, device=values.device)
        torch.mm(one.to_sparse(layout=_COO if s.layout is _COO else _CSR), one)


# who needs what -----------------------------------------------------------------------------------


def _part(s: Tensor, turned: bool, k: Dim, to: Dim, group: str) -> _Part:
    if s.layout is _COO:
        pattern: tuple[Tensor, ...] = (s._indices(),)
    elif s.layout is _CSR:
        pattern = s.crow_indices(), s.col_indices()
    else:
        pattern = s.row_indices(), s.ccol_indices()
    key = (_part, s.shape, s.layout, turned, k, to, group)
    return kept(pattern, key, lambda: _found(s, turned, k, to, group), [s])


def _entries(s: Tensor) -> tuple[Tensor, Tensor]:
    """The row and the column of each entry, in the order of its values."""
    if s.layout is _COO:
        return s._indices()[0], s._indices()[1]
    ends, other = (
        (s.crow_indices(), s.col_indices())
        if s.layout is _CSR
        else (s.ccol_indices(), s.row_indices())
    )
    outer = torch.arange(len(ends) - 1, device=ends.device).repeat_interleave(ends.diff().long())
    return (outer, other.long()) if s.layout is _CSR else (other.long(), outer)


def _found(s: Tensor, turned: bool, k: Dim, to: Dim, group: str) -> _Part:
    """What the entries of a matrix say: O(entries) on each rank, and a sort of those it meets."""
    me, n = comm.rank(group), comm.size(group)
    rows, columns = reversed(_entries(s)) if turned else _entries(s)
    first, last = to.spans[me] if to.axes else (0, to.size)
    mine = ((rows >= first) & (rows < last)).nonzero()[:, 0]
    mine = mine[torch.argsort(rows[mine], stable=True)]
    own_rows, own_columns = rows[mine] - first, columns[mine]
    route, width = None, k.size
    if n > 1:
        ends = torch.tensor([to.offsets[1:], k.offsets[1:]], device=rows.device)
        target = torch.bucketize(rows, ends[0], right=True)
        owner = torch.bucketize(columns, ends[1], right=True)
        start = k.offsets[me]
        if bool((target == owner).all()):
            own_columns, width = own_columns - start, k.sizes[me]
        else:
            wanted, own_columns = torch.unique(own_columns, return_inverse=True)
            of = torch.bucketize(wanted, ends[1], right=True)
            asked = torch.unique((target * k.size + columns)[owner == me])
            to_rank = asked // max(1, k.size)
            gets, gives = (torch.bincount(r, minlength=n).tolist() for r in (of, to_rank))
            sent = asked - to_rank * k.size - start
            route = Route(sent, tuple(gives), tuple(gets), None, max(k.sizes), group)
            width = len(wanted)
    shape = (last - first, width)
    crow = None
    index = torch.stack([own_rows, own_columns])
    if s.layout is not _COO:
        crow = torch.zeros(shape[0] + 1, dtype=torch.int64, device=rows.device)
        crow[1:] = torch.bincount(own_rows, minlength=shape[0]).cumsum(0)
    once = s.layout is not _COO or s.is_coalesced()
    return _Part(_slice(mine), index, crow, shape, route, once)


def _slice(picked: Tensor) -> Tensor | slice:
    """Neighbours in memory as a slice, which copies nothing."""
    if not len(picked):
        return slice(0, 0)
    a, b = int(picked[0]), int(picked[-1]) + 1
    ordered = b - a == len(picked) and bool((picked.diff() == 1).all())
    return slice(a, b) if ordered else picked


# the local product --------------------------------------------------------------------------------


class _Product(torch.autograd.Function):
    """A part's values times rows (width, C), or its transpose times rows (n, C).

    Torch's kernel both ways; the gradient of values takes some MB more than they do. twice: whether
    second derivatives are the entries' only.
    """

    @staticmethod
    def forward(values: Tensor, x: Tensor, part: _Part, turned: bool, twice: bool) -> Tensor:
        return _multiplied(values, x, part, turned)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.materialize_grads = False
        ctx.save_for_backward(*inputs[:2])
        ctx.rest = inputs[2:]

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
        if g is None:
            return (None,) * 5
        values, x = ctx.saved_tensors
        part, turned, twice = ctx.rest
        if not twice and torch.is_grad_enabled():
            raise UnsupportedOpError(
                "second derivatives through a sparse matrix that is learned, of which torch's are "
                "dense: make it of its values, torch.sparse_coo_tensor(indices, values, size)"
            )
        gv = gx = None
        if ctx.needs_input_grad[0]:
            gv = _dots(x, g, part) if turned else _dots(g, x, part)
            gv = gv.conj() if turned else gv
        if ctx.needs_input_grad[1]:
            # a view of a CSR matrix' values has no view of its own
            conj = values.conj_physical() if values.is_complex() else values
            gx = _Product.apply(conj, g, part, not turned, twice)
        return gv, gx, None, None, None


def _multiplied(values: Tensor, x: Tensor, part: _Part, turned: bool) -> Tensor:
    """Under autocast as without: operands have been cast."""
    n, width = reversed(part.shape) if turned else part.shape
    if not values.numel() or not x.numel():
        return x.new_zeros(n, x.shape[1])
    values = values.resolve_conj()
    if part.crow is not None:
        make = torch.sparse_csc_tensor if turned else torch.sparse_csr_tensor
        m = make(part.crow, part.places[1], values, (n, width), check_invariants=False)
    else:
        index = part.places.flip(0) if turned else part.places
        m = torch.sparse_coo_tensor(
            index, values, (n, width), is_coalesced=part.once and not turned, check_invariants=False
        )
    return torch.mm(m, x.resolve_conj())


def _dots(rows: Tensor, columns: Tensor, part: _Part) -> Tensor:
    """For each entry its row of one times the conjugate of its column's row of the other."""
    i, j = part.places
    step = max(1, _AT_ONCE // max(1, len(i)))
    total = rows.new_zeros(len(i))
    for a in range(0, rows.shape[1], step):
        left = rows[:, a : a + step].index_select(0, i)
        total = total + (left * columns[:, a : a + step].index_select(0, j).conj()).sum(1)
    return total
