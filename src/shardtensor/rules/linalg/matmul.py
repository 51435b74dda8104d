"""Products: linear, matmul and their kin as one contraction over labelled dims."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import comm
from ...cache import cached
from ...dispatch.fallback import fall_back
from ...dispatch.trial import tried
from ...errors import UnsupportedOpError
from ...registry import rule
from ...spec import Spec, whole_dims
from ...tensor import ShardTensor, wrap
from ...tensor.dense import refuse_not_dense
from ...tensor.redistribute import beside, fit, local_of
from .. import labels
from ..in_place import in_place
from ..labels import Labels
from ..operands import checked_dim
from ..reduce import wide
from . import sparse


def _labels(prefix: str, n: int) -> Labels:
    return tuple(f"{prefix}{i}" for i in range(n))


@rule("linear")
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b; a weight that is the same on all ranks gets its whole gradient."""
    if isinstance(input, ShardTensor) and not isinstance(weight, ShardTensor):
        spec = input._spec
        # a bias with rows is cut as these are
        row = bias is None or (not isinstance(bias, ShardTensor) and bias.ndim < 2)
        if row and not spec.dims[-1].axes and not spec.partial:
            out, group = _linear(spec, weight.shape)
            whole: Any = beside(spec, group, weight, bias)
            if whole is not None:
                return wrap(F.linear(input._local, *whole), out)
            if not sparse.is_sparse(weight):
                given = (input, spec.dims), (weight, None), (bias, None)
                return wrap(F.linear(*fit(spec.mesh, spec.varying, *given)), out)
    if bias is not None and input.ndim == 2:
        _kernel_of_sums(weight)
    free = _labels("n", input.ndim - 1)
    lw: Labels = ("o", "k") if weight.ndim == 2 else ("k",)
    if sparse.is_sparse(weight) and input.ndim > 2 and not sparse.foldable(input):
        sparse.refuse_batched("linear")
    product = _of_sparse(weight, input, input.ndim - 1, False) if input.ndim else None
    if product is None:
        product = labels.run(((*free, "k"), lw, (*free, *lw[:-1])), F.linear, input, weight)
    if bias is None:
        return product
    if input.ndim == 1 and bias.ndim == 2 and bias.shape == (1, *product.shape):
        # torch takes a vector for the only row of a matrix
        bias = bias[0]
    shape, usual = product.shape, bias.shape == product.shape[-1:]
    if not usual and torch.broadcast_shapes(shape, bias.shape) != shape:
        raise RuntimeError(
            f"linear: a bias of shape {list(bias.shape)} for a result of {list(shape)}"
        )
    return torch.add(product, _cast(bias, product))


def _cast(x: Tensor, product: Tensor) -> Tensor:
    """An addend in the dtype in which autocast made the product, as one op would cast both."""
    return x.to(product.dtype) if torch.is_autocast_enabled(product.device.type) else x


@cached
def _linear(spec: Spec, weight: torch.Size) -> tuple[Spec, str | None]:
    """(the spec of the result, the group of ranks that have other rows, None without any)."""
    out = spec.with_dims([*spec.dims[:-1], *whole_dims(weight[:-1])])
    return out, comm.group(spec.mesh, spec.varying) if spec.varying else None


# shards without elements find no kernel missing, nor two dtypes
_NO_KERNEL = {torch.bool, torch.uint16, torch.uint32, torch.uint64}


@rule("matmul", "linalg_matmul")
def matmul(input: Tensor, other: Tensor) -> Tensor:
    """Batched matrix product with torch.matmul's broadcasting."""
    return _dense(torch.matmul, input, other)


@rule("mm")
def mm(input: Tensor, mat2: Tensor) -> Tensor:
    if input.ndim != 2 or mat2.ndim != 2:
        raise RuntimeError(f"mm: expected two matrices, not {input.ndim}-D and {mat2.ndim}-D")
    return _dense(torch.matmul, input, mat2)


@rule("bmm")
def bmm(input: Tensor, mat2: Tensor) -> Tensor:
    shapes = tuple(input.shape), tuple(mat2.shape)
    if input.ndim != 3 or mat2.ndim != 3 or input.shape[0] != mat2.shape[0]:
        raise RuntimeError(f"bmm: expected batches of as many matrices, not {shapes}")
    return _dense(torch.matmul, input, mat2)


@rule("mv")
def mv(input: Tensor, vec: Tensor) -> Tensor:
    """By its own kernel, as `dot`: autocast on CPUs leaves them alone, but not matmul."""
    return _dense(torch.mv, input, vec)


@rule("dot")
def dot(input: Tensor, tensor: Tensor) -> Tensor:
    return _dense(torch.dot, input, tensor)


def _dense(op: Any, input: Tensor, other: Tensor) -> Tensor:
    if not input.ndim or not other.ndim:
        raise RuntimeError(f"{op.__name__}: both arguments need to be at least 1D")
    if input.dtype in _NO_KERNEL or (
        input.dtype != other.dtype and not torch.is_autocast_enabled(input.device.type)
    ):
        tried(op, input, other)
    return _product(op, input, other, False)


def _product(op: Any, input: Tensor, other: Tensor, sparse_grad: bool) -> Tensor:
    """op, a product of matrices, of which one may be sparse."""
    found = _of_sparse(input, other, max(other.ndim - 2, 0), False, sparse_grad)
    if found is None:
        found = _of_sparse(other, input, input.ndim - 1, True, sparse_grad)
    if found is not None:
        return found
    return labels.run(_products(input.ndim, other.ndim), op, input, other)


def _of_sparse(
    s: Tensor, x: Tensor, d: int, turned: bool, sparse_grad: bool = False
) -> Tensor | None:
    """The product where s is sparse and shards have to be cared for."""
    if not sparse.is_sparse(s):
        return None
    if x.ndim > 2 and not (d == x.ndim - 1 and sparse.foldable(x)):
        sparse.refuse_batched("matmul")
    return sparse.product(s, x, d, turned, sparse_grad)


@rule("_sparse_mm")
def sparse_mm(sparse: Tensor, dense: Tensor, reduce: str | None = None) -> Tensor:
    """torch.sparse.mm: of matrices, whose sparse one gets a sparse gradient."""
    if reduce is not None:
        raise UnsupportedOpError(
            f"torch.sparse.mm with reduce={reduce!r} of shards: write it as index_select and "
            "scatter_reduce over the entries"
        )
    if sparse.ndim != 2 or dense.ndim != 2:
        raise RuntimeError("sparse.mm: expected two matrices")
    return _product(torch.sparse.mm, sparse, dense, True)


@rule("_sparse_addmm")
def sparse_addmm(
    mat: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """torch.sparse.addmm."""
    return _plus(sparse_mm(mat1, mat2), mat, beta, alpha)


@cached
def _products(na: int, nb: int) -> tuple[Labels, ...]:
    """The labels of a product of tensors of na and nb dims: vectors have no rows or columns."""
    batch = max(na, nb, 2) - 2
    rows, columns = ("i",) * (na > 1), ("j",) * (nb > 1)
    left = (*labels.broadcast(max(na - 2, 0), batch), *rows, "k")
    right = (*labels.broadcast(max(nb - 2, 0), batch), "k", *columns)
    return left, right, (*labels.broadcast(batch, batch), *rows, *columns)


def _kernel_of_sums(*operands: Tensor) -> None:
    """Refuse what torch adds to a product in no kernel."""
    for x in operands:
        if x.layout is torch.sparse_coo:
            refuse_not_dense(x.layout)


def _plus(product: Tensor, input: Tensor, beta: float, alpha: float) -> Tensor:
    """alpha * product + beta * input; factors of integers are cut to integers, as in torch."""
    if not (product.is_floating_point() or product.is_complex()):
        kind = bool if product.dtype is torch.bool else int
        beta, alpha = kind(beta), kind(alpha)
    shapes = input.shape, product.shape
    if shapes[0] != shapes[1] and torch.broadcast_shapes(*shapes) != shapes[1]:
        raise RuntimeError(f"a product of shape {tuple(shapes[1])} plus one of {tuple(shapes[0])}")
    input, dtype = _cast(input, product), product.dtype
    if (alpha != 1 or beta not in (0, 1)) and wide(dtype) != dtype:
        # halves are rounded once
        product, input = product.to(wide(dtype)), input.to(wide(dtype))
    product = product if alpha == 1 else product * alpha
    if beta:
        product = torch.add(product, input if beta == 1 else input * beta)
    return product.to(dtype)


def _try_factors(op: Any, *operands: Tensor, beta: float, alpha: float) -> None:
    """Raise what torch raises for factors that the dtype does not hold, and for such dtypes."""
    dtype = operands[1].dtype
    usual = (abs(beta) < 60000 and abs(alpha) < 60000) and not isinstance(beta + alpha, complex)
    usual = usual and (dtype.is_floating_point or dtype.is_complex)
    if not usual or any(x.dtype != dtype for x in operands):
        tried(op, *operands, beta=beta, alpha=alpha)


_ADDED = {2: torch.addmm, 1: torch.addmv, 3: torch.baddbmm}


@rule("addmm", "addmv", "baddbmm")
def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    _kernel_of_sums(input, mat2, *(() if mat1.ndim == mat2.ndim == 2 else (mat1,)))
    if mat2.ndim not in _ADDED:
        raise RuntimeError(f"addmm: a matrix of {mat2.ndim} dims")
    _try_factors(_ADDED[mat2.ndim], input, mat1, mat2, beta=beta, alpha=alpha)
    product = torch.mv if mat2.ndim == 1 else torch.matmul
    return _plus(product(mat1, mat2), input, beta, alpha)


@rule("addbmm")
def addbmm(
    input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    _kernel_of_sums(input, batch1, batch2)
    _try_factors(torch.addbmm, input, batch1, batch2, beta=beta, alpha=alpha)
    return _plus(einsum("bij,bjk->ik", batch1, batch2), input, beta, alpha)


@rule("addr")
def addr(input: Tensor, vec1: Tensor, vec2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    _kernel_of_sums(input, vec1, vec2)
    _try_factors(torch.addr, input, vec1, vec2, beta=beta, alpha=alpha)
    product = outer(vec1, vec2)
    # of the dtype that the sum has, unlike products of matrices
    dtype = torch.result_type(local_of(product), local_of(input))
    return _plus(product.to(dtype), input, beta, alpha)


in_place(addmm, "addmv_", "baddbmm_")
in_place(addbmm)
in_place(addr)


@rule("outer", "ger")
def outer(input: Tensor, vec2: Tensor) -> Tensor:
    return labels.run("i, j -> i j", torch.outer, input, vec2)


@rule("inner")
def inner(input: Tensor, other: Tensor) -> Tensor:
    if input.ndim == 0 or other.ndim == 0:
        return input * other
    la = (*_labels("i", input.ndim - 1), "k")
    lb = (*_labels("j", other.ndim - 1), "k")
    return labels.run((la, lb, (*la[:-1], *lb[:-1])), torch.inner, input, other)


@rule("tensordot")
def tensordot(
    input: Tensor, other: Tensor, dims_self: Sequence[int], dims_other: Sequence[int]
) -> Tensor:
    """The builtin below torch.tensordot, which passes two lists of dims."""
    left = [checked_dim(d, input.ndim) for d in dims_self]
    right = [checked_dim(d, other.ndim) for d in dims_other]
    for d, e in zip(left, right, strict=True):
        # a dim of size 1 is broadcast: the other operand's dim is summed
        if input.shape[d] == 1 != other.shape[e]:
            other = other.sum(e, keepdim=True)
        elif other.shape[e] == 1 != input.shape[d]:
            input = input.sum(d, keepdim=True)
    la = [f"i{d}" for d in range(input.ndim)]
    lb = [f"j{d}" for d in range(other.ndim)]
    for n, (d, e) in enumerate(zip(left, right, strict=True)):
        la[d] = lb[e] = f"k{n}"
    lo = [x for x in la if x[0] == "i"] + [x for x in lb if x[0] == "j"]

    def product(x: Tensor, y: Tensor) -> Tensor:
        return torch.tensordot(x, y, dims=(left, right))

    return labels.run((tuple(la), tuple(lb), tuple(lo)), product, input, other)


@rule("bilinear")
def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if (
        not input1.ndim == input2.ndim > 0
        or weight.ndim != 3
        or (bias is not None and not bias.ndim)
    ):
        shapes = [tuple(x.shape) for x in (input1, input2, weight)]
        raise RuntimeError(f"bilinear: shapes {shapes} do not fit each other")
    # autocast leaves it as a whole alone
    with torch.autocast(input1.device.type, enabled=False):
        out = torch.einsum("...i,oij,...j->...o", input1, weight, input2)
    return out if bias is None else out + bias


@rule(torch.einsum)
def einsum(equation: str, *operands: Tensor) -> Tensor:
    """Einstein sums, two operands at a time from the left; sizes of 1 broadcast, as in torch."""
    if not isinstance(equation, str):
        raise UnsupportedOpError("einsum with sublists: give it an equation with letters")
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    terms, out = _terms(equation, tuple(x.ndim for x in operands))
    if any(len(set(t)) != len(t) for t in terms):
        # an index twice in one operand is a diagonal, which has no rule
        return fall_back(torch.einsum, (equation, *operands), {})
    pending = [_summed_alone(operands, terms, i, out) for i in range(len(operands))]
    (x, lx), *rest = pending
    while rest:
        (y, ly), *rest = rest
        later = {name for _, term in rest for name in term} | set(out)
        lo = tuple(n for n in dict.fromkeys(lx + ly) if n in later)
        if not rest:
            lo = out
        local = f"{''.join(lx)},{''.join(ly)}->{''.join(lo)}"
        dotted = tuple([tuple([f".{name}" for name in term]) for term in (lx, ly, lo)])
        product: Any = partial(torch.einsum, local)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            few = tuple([tuple([min(n, 2) for n in z.shape]) for z in (x, y)])
            cast = torch.get_autocast_dtype(device)
            product = partial(
                _einsum_as, _cast_dtype(local, few, (x.dtype, y.dtype), device, cast), local
            )
        elif x.dtype != y.dtype:
            # shards of one row or none go ways that take both
            tried(torch.einsum, local, x, y)
        x = labels.run(dotted, product, x, y)
        lx = lo
    gone = [i for i, name in enumerate(lx) if name not in out]
    if gone:
        x = x.sum(gone)
        lx = tuple(n for n in lx if n in out)
    return x.permute([lx.index(n) for n in out]) if lx != out else x


@cached
def _cast_dtype(
    equation: str, sizes: Any, dtypes: Any, device: str, cast: torch.dtype
) -> torch.dtype:
    """What autocast to `cast` makes of the whole operands: one row goes a way that it leaves."""
    few = [torch.ones(s, dtype=d, device=device) for s, d in zip(sizes, dtypes, strict=True)]
    return torch.einsum(equation, *few).dtype


def _einsum_as(dtype: torch.dtype, equation: str, *operands: Tensor) -> Tensor:
    return torch.einsum(equation, *operands).to(dtype)


@cached
def _terms(equation: str, ndims: tuple[int, ...]) -> tuple[tuple[Labels, ...], Labels]:
    """The labels of each operand and of the output; an ellipsis becomes unused letters."""
    text = equation.replace(" ", "")
    left, arrow, right = text.partition("->")
    parts = left.split(",")
    if len(parts) != len(ndims):
        raise RuntimeError(f"einsum {equation!r}: {len(ndims)} operands")
    free = [c for c in map(chr, range(ord("A"), ord("z") + 1)) if c.isalpha() and c not in text]
    dots = [n - len(p.replace("...", "")) for p, n in zip(parts, ndims, strict=True)]
    widest = max((d for d, p in zip(dots, parts, strict=True) if "..." in p), default=0)
    ellipsis = "".join(free[:widest])
    full = []
    for part, n in zip(parts, dots, strict=True):
        if ("..." not in part and n != 0) or n < 0:
            raise RuntimeError(f"einsum {equation!r}: labels and dims of an operand differ")
        full.append(part.replace("...", ellipsis[widest - n :] if n else ""))
    if not arrow:
        every = "".join(full)
        right = "..." + "".join(
            sorted(c for c in set(every) - set(ellipsis) if every.count(c) == 1)
        )
    return tuple(tuple(p) for p in full), tuple(right.replace("...", ellipsis))


def _summed_alone(
    operands: Sequence[Tensor], terms: Sequence[Labels], i: int, out: Labels
) -> tuple[Tensor, Labels]:
    """Sum away what only this operand has more than one row of: before products, as torch does."""
    x, labels = operands[i], terms[i]
    others = {*out}
    for j, (y, term) in enumerate(zip(operands, terms, strict=True)):
        if j != i:
            others.update(name for n, name in zip(y.shape, term, strict=True) if n != 1)
    gone = [d for d, name in enumerate(labels) if name not in others]
    if len(terms) == 1 or all(x.shape[d] == 1 for d in gone):
        return x, labels
    return x.sum(gone), tuple(n for d, n in enumerate(labels) if d not in gone)
