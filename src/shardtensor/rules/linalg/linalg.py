"""Linear algebra on a batch of matrices: local where the matrices are whole.

A signature such as "NN,Nk->Nk" labels the last dims of each tensor, as in `labels`: the dims before
them are the batch, which broadcasts. Where a dim of a matrix is sharded, an all-to-all moves its
shards to the batch or to the columns of a right-hand side; only a single matrix with nothing else
to shard is gathered, since these algorithms see it at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...dispatch.fallback import fall_back
from ...registry import rule
from ...spec import Spec
from ...tensor import ShardTensor, wrap
from ...tensor.redistribute import reduced
from .. import labels
from ..agreed import agreed
from ..empty import cut, some
from ..pointwise import function_rule
from . import phases

# names of tensor arguments, in their order wherever several stand together
_TENSORS = (
    "self", "input", "A", "LU", "LD", "LU_data", "LU_pivots", "pivots", "input2", "tau", "L",
    "input3", "B", "b", "atol", "rtol", "tol", "rcond",
)  # fmt: skip
_SIGNATURES = {
    "MN": (
        "cholesky_inverse", "geqrf", "linalg_eig", "linalg_cholesky_ex", "linalg_inv_ex",
        "linalg_lu_factor_ex", "linalg_ldl_factor_ex", "_linalg_eigvals", "_linalg_det",
        "_linalg_slogdet", "matrix_exp", "linalg_matrix_exp", "linalg_pinv",
    ),
    "NN->N,NN": ("_linalg_eigh",),
    "MN->MK,KN": ("linalg_qr",),
    "MN->MM,MK,KN": ("linalg_lu",),
    "MN->MM,K,NN": ("_linalg_svd",),
    "MN,K": ("linalg_householder_product",),
    "MN,K,PQ": ("ormqr",),
    "MN,K->MM,MK,KN": ("lu_unpack",),
    # each column of the right-hand side is solved on its own
    "Nk,NN->Nk": ("cholesky_solve",),
    "NN,K,Nk->Nk": ("linalg_ldl_solve",),
}  # fmt: skip


def batched(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    signature: str,
    call: Callable[..., Any] | None = None,
) -> Any:
    """func on the matrices that each rank has; call: what runs on local tensors."""
    left, _, right = signature.partition("->")
    at: list[Any] = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    at += [k for k in _TENSORS if isinstance(kwargs.get(k), Tensor)]
    given = [reduced(args[i] if isinstance(i, int) else kwargs[i]) for i in at]
    # tolerances, one for each matrix, have no letters
    letters = (*left.split(","), *("",) * len(given))[: len(given)]
    if any(x.ndim < len(c) for x, c in zip(given, letters, strict=True)):
        return fall_back(func, args, kwargs)
    batch = max(x.ndim - len(c) for x, c in zip(given, letters, strict=True))
    lead = labels.broadcast(batch, batch)
    terms = [(*lead[batch - x.ndim + len(c) :], *c) for x, c in zip(given, letters, strict=True)]
    p = labels.plan((*terms, *((*lead, *c) for c in right.split(","))), *given)
    if p.gathered and not p.varying:
        return fall_back(func, args, kwargs)
    # torch 2.13 drops some gradients of empty batches, and with them what others wait for
    values = [some(v) if x.numel() else v for v, x in zip(p.fit(given), given, strict=True)]
    inside = dict(zip(at, values, strict=True))
    args = tuple(inside.get(i, a) for i, a in enumerate(args))
    kwargs = {k: inside.get(k, a) for k, a in kwargs.items()}
    found = agreed(lambda: (call or func)(*args, **kwargs), p.spec(lead), p.varying)
    if isinstance(found, Tensor):
        return _wrapped(found, p, batch, right or None)
    phases.watch(found, p.spec(lead), p.varying)
    named = (*(right.split(",") if right else ()), *(None,) * len(found))
    return type(found)([_wrapped(y, p, batch, c) for y, c in zip(found, named, strict=False)])


def _wrapped(local: Tensor, p: labels.Plan, batch: int, named: str | None) -> ShardTensor:
    """A result with the batch of all operands; named: the letters of its last dims."""
    if local.ndim < batch if named is None else local.ndim != batch + len(named):
        # an empty tensor in the place of a result that was not asked for
        return wrap(local, Spec.whole(p.mesh, local.shape))
    # dims that are whole have the size that came out: options decide it (`full_matrices`)
    core = [c if c.islower() else "" for c in named or " " * (local.ndim - batch)]
    spec = p.spec((*labels.broadcast(batch, batch), *core), local.shape)
    return wrap(cut(local, spec.local_shape), spec)


def _register(signature: str, names: tuple[str, ...]) -> None:
    def handler(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return batched(func, args, kwargs, signature)

    handler.__name__ = "linalg"
    function_rule(*names)(handler)


for _signature, _names in _SIGNATURES.items():
    _register(_signature, _names)


@rule("cholesky")
def cholesky(input: Tensor, upper: bool = False) -> Tensor:
    return torch.linalg.cholesky(input, upper=upper)


@rule("_linalg_check_errors")
def check_errors(info: ShardTensor, api_name: str, *, is_matrix: bool) -> None:
    """What the composites of torch.linalg ask for after their factorisation."""
    spec = info._spec
    check = torch.ops.aten._linalg_check_errors
    agreed(lambda: check(info._local, api_name, is_matrix=is_matrix), spec, spec.varying)


# right-hand sides --------------------------------------------------------------------------------


def _is_vector(A: Tensor, B: Tensor) -> bool:
    """Whether torch takes B for one right-hand side of each matrix."""
    return B.ndim == 1 or (A.ndim - 1 == B.ndim and B.shape == A.shape[:-1])


def _columns(left: bool) -> str:
    return "Nk" if left else "kN"


@function_rule("linalg_solve", "linalg_solve_ex", "_linalg_solve_ex")
def solve(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Local matrices might pass for right-hand sides of one column: B is given two dims first."""
    A, B = (*args, *(kwargs.pop(k) for k in ("A", "B")[len(args) :]))
    left = kwargs.get("left", True)
    vector = _is_vector(A, B)
    if A.ndim < 2 or (vector and not left):
        return fall_back(func, (A, B), kwargs)
    B = B.unsqueeze(-1) if vector else B
    B = B.reshape(*[1] * (A.ndim - B.ndim), *B.shape) if B.ndim < A.ndim else B
    columns = _columns(left)
    found = batched(func, (A, B), kwargs, f"NN,{columns}->{columns}")
    if not vector:
        return found
    if isinstance(found, Tensor):
        return found.squeeze(-1)
    return type(found)([found[0].squeeze(-1), *found[1:]])


@rule("linalg_solve_triangular")
def solve_triangular(
    A: Tensor, B: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tensor:
    options = {"upper": upper, "left": left, "unitriangular": unitriangular}
    signature = f"NN,{_columns(left)}->{_columns(left)}"
    return batched(torch.linalg.solve_triangular, (A, B), options, signature)


@rule("triangular_solve")
def triangular_solve(
    b: Tensor, A: Tensor, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> Any:
    def call(b: Tensor, A: Tensor, **options: bool) -> Tensor:
        return torch.triangular_solve(b, A, **options)[0]  # type: ignore[arg-type]

    options = {"upper": upper, "transpose": transpose, "unitriangular": unitriangular}
    found = batched(torch.triangular_solve, (b, A), options, "Nk,NN->Nk", call)
    if not isinstance(found, Tensor):
        return found
    matrices = A.expand(*found.shape[:-2], *A.shape[-2:])
    return torch.return_types.triangular_solve((found, matrices.clone()))


@rule("linalg_lu_solve")
def lu_solve(
    LU: Tensor, pivots: Tensor, B: Tensor, *, left: bool = True, adjoint: bool = False
) -> Tensor:
    options = {"left": left, "adjoint": adjoint}
    signature = f"NN,K,{_columns(left)}->{_columns(left)}"
    return batched(torch.linalg.lu_solve, (LU, pivots, B), options, signature)


@rule("linalg_lstsq")
def lstsq(
    input: Tensor, b: Tensor, rcond: float | None = None, *, driver: str | None = None
) -> Any:
    """Residuals only where torch gives them: for some drivers if all matrices have full rank."""
    m, n = input.shape[-2:] if input.ndim > 1 else (0, 0)
    driver = driver or ("gelsy" if input.device.type == "cpu" else "gels")
    vector = _is_vector(input, b) and input.ndim > 1
    B = b.unsqueeze(-1) if vector else b
    given = (m > n and driver != "gelsy", driver != "gels", driver in ("gelsd", "gelss"))

    def call(A: Tensor, B: Tensor, **options: Any) -> list[Tensor]:
        if not B.shape[-1]:
            # LAPACK refuses to solve for no column
            more = torch.cat([B, B.new_zeros(*B.shape[:-1], 1)], -1)
            solution, residuals, *rest = call(A, more, **options)
            return [solution.narrow(-1, 0, 0), residuals.narrow(-1, 0, 0), *rest]
        solution, residuals, rank, singular = torch.linalg.lstsq(A, B, **options)
        batch = A.shape[:-2]
        if not given[0] or residuals.shape != (*batch, B.shape[-1]):
            residuals = torch.zeros_like(solution.real).sum(-2)
        if not given[1]:
            rank = solution.new_zeros(batch, dtype=torch.int64)
        if not given[2] or not solution.numel():
            singular = residuals.new_zeros((*batch, min(m, n)))
        return [solution, residuals, rank, singular]

    options = {"rcond": rcond, "driver": driver}
    found = batched(torch.linalg.lstsq, (input, B), options, "MN,Mk->Nk,k,,K", call)
    if not isinstance(found, list):
        return fall_back(torch.linalg.lstsq, (input, b), options) if vector else found
    solution, residuals, rank, singular = found
    # of a part of the solution, since torch's empty results require its gradient
    none = wrap(solution._local.reshape(-1)[:0], Spec.whole(solution._spec.mesh, (0,)))
    if not given[0] or (given[1] and not bool((rank == n).all())):
        residuals = none.real
    elif vector:
        residuals = residuals.squeeze(-1)
    return torch.return_types.linalg_lstsq(  # type: ignore[attr-defined]
        [
            solution.squeeze(-1) if vector else solution,
            residuals,
            rank if given[1] else none.to(torch.int64),
            singular if given[2] else none.real.detach(),
        ]
    )
