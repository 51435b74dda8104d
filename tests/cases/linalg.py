"""Linear algebra on batches of matrices; products and distances of vectors."""

import torch
import torch.nn.functional as F

from .table import case, cases, normal

L = torch.linalg


def positive(x):
    """A positive definite matrix of each square one."""
    return x @ x.mT / x.shape[-1] + 2 * torch.eye(x.shape[-1], dtype=x.dtype)


SQUARE = {
    "cholesky": L.cholesky,
    "upper": lambda x: L.cholesky(x, upper=True),
    "cholesky_ex": L.cholesky_ex,
    "cholesky_inverse": lambda x: torch.cholesky_inverse(L.cholesky(x)),
    "inv": L.inv,
    "inverse": torch.inverse,
    "det": L.det,
    "slogdet": L.slogdet,
    "logdet": torch.logdet,
    "eigh": lambda x: L.eigh(x)[0],
    "eigvalsh": L.eigvalsh,
    "eigvals": lambda x: L.eigvals(x).real,
    "eig": lambda x: L.eig(x)[0],
    "matrix_power": lambda x: L.matrix_power(x, 3),
    "negative_power": lambda x: L.matrix_power(x, -2),
    "matrix_exp": L.matrix_exp,
    "lu_factor": lambda x: L.lu_factor(x)[0],
    "lu": lambda x: L.lu(x)[1:],
    "lu_unpack": lambda x: torch.lu_unpack(*L.lu_factor(x))[1:],
    "ldl": lambda x: L.ldl_solve(*L.ldl_factor(x.detach()), x.detach()),
    "cond": L.cond,
    "nuclear": lambda x: L.matrix_norm(x, "nuc"),
    "spectral": lambda x: L.matrix_norm(x, 2),
    "rank": L.matrix_rank,
    "geqrf": lambda x: torch.geqrf(x.detach())[0],
    "householder": lambda x: L.householder_product(x / 9, x[..., 0] / 9),
}
TALL = {
    "qr": L.qr,
    "r": lambda x: L.qr(x.detach(), "r")[1],
    "svdvals": L.svdvals,
    "svd": lambda x: L.svd(x, full_matrices=False)[1],
    "thin": lambda x: L.svd(x @ x.mT[..., :2], full_matrices=False)[2].abs(),
    "wide": lambda x: L.svd(x[..., :2].mT, full_matrices=False)[2].abs(),
    "pinv": L.pinv,
    "pinverse": torch.pinverse,
    "orgqr": lambda x: torch.orgqr(x / 9, x[..., :3, 0] / 9),
}


SOLVERS = {
    "solve": L.solve,
    "solve_ex": lambda A, B: L.solve_ex(A, B)[0],
    "solve_triangular": lambda A, B: L.solve_triangular(torch.tril(A), B, upper=False),
    "triangular_solve": lambda A, B: torch.triangular_solve(B, torch.tril(A), upper=False),
    "cholesky_solve": lambda A, B: torch.cholesky_solve(B, torch.tril(A)),
    "lu_solve": lambda A, B: L.lu_solve(*L.lu_factor(A), B),
    "old_lu_solve": lambda A, B: torch.lu_solve(B, *L.lu_factor(A)),
    "ldl_solve": lambda A, B: L.ldl_solve(*(t.detach() for t in L.ldl_factor(A)), B.detach()),
    "lstsq": lambda A, B: L.lstsq(
        torch.cat([A, A[..., :2, :]], -2), torch.cat([B, B[..., :2, :]], -2)
    ),
    "gelsd": lambda A, B: L.lstsq(A[..., :3], B, driver="gelsd"),
    "gels": lambda A, B: L.lstsq(A[..., :3], B, driver="gels"),
}

SOLVED = {"rtol": 1e-9}
batch, one = positive(normal(5, 4, 4)), positive(normal(4, 4))
cases("linalg", SQUARE, batch, dims=[(0, 1)], **SOLVED)
cases("linalg", TALL, normal(5, 6, 3), dims=[(0, 1)], **SOLVED)
cases("linalg of two batches", SQUARE | TALL, batch[:4, None], dims=[(1, 0)], share=4, **SOLVED)
cases("linalg of one matrix", SQUARE | TALL, one, gather=True, share=4, **SOLVED)
cases("solve", SOLVERS, batch[:3].clone(), normal(3, 4, 5), dims=[(0, 1), (0, 2)], **SOLVED)
cases("solve of one matrix", SOLVERS, one, normal(4, 5), dims=[(), (1, 0)], **SOLVED)

CROSS = {
    "linalg": L.cross,
    "torch": torch.cross,
    "vecdot": L.vecdot,
    "vdot": lambda a, b: torch.vdot(a[:, 0], b[:, 1]),
}
NORMED = {
    "pdist": lambda a: [F.pdist(a, p) for p in (1.0, 2.0, float("inf"))],
    "renorm": lambda a: [
        torch.renorm(a, p, d, 1.0) for p in (1.0, 2.0, float("inf")) for d in (0, 1)
    ],
    "renorm_": lambda a: (a * 1).renorm_(2, 0, 1.0),
    "vander": lambda a: (L.vander(a, N=4), L.vander(a.mT.contiguous())),
}
cases("cross", CROSS, normal(5, 3), normal(5, 3), gather=True)
cases("rows", NORMED, normal(5, 3))
case("rows", normal(9, 2), name="pdist of many")(F.pdist)
