"""Linear algebra on batches of matrices, products and distances of vectors, against torch."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor.ranks.testing import On, cuts, full, hold, make_mesh, shard

L = torch.linalg


def random(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(*batch, n=4):
    x = random(*batch, n, n)
    return x @ x.mT / n + 2 * torch.eye(n, dtype=torch.float64)


SQUARE = {
    "cholesky": L.cholesky,
    "upper": lambda x: torch.cholesky(x, True),
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


@pytest.mark.parametrize("name", [*SQUARE, *TALL])
def test_batches(name):
    fn = (SQUARE | TALL)[name]
    x = spd(5) if name in SQUARE else random(5, 6, 3)
    for sizes in cuts(5):
        hold(fn, [x], [shard(0, sizes)], (len(sizes),), rtol=1e-9)
    # rows and columns go to the batch, with empty batches where it is short
    hold(fn, [x[:2]], [shard(1)], (3,), rtol=1e-9)
    hold(fn, [x], [On([Shard(0), Shard(2)])], (2, 2), rtol=1e-9)
    hold(fn, [x], [On([Shard(0), Shard(0)])], (2, 2), rtol=1e-9)
    hold(fn, [x], [On([Replicate(), Shard(1)])], (2, 2), rtol=1e-9)
    hold(fn, [x.reshape(5, 1, *x.shape[1:])], [shard(1)], (2,), rtol=1e-9)
    # a single matrix is gathered
    hold(fn, [x[0]], [shard(0)], (2,), rtol=1e-9, gather=True)


def on_lower(fn):
    return lambda A, B: fn(torch.tril(A), B)


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


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers(name):
    fn, A, B = SOLVERS[name], spd(3), random(3, 4, 5)
    how = {"rtol": 1e-9}
    for sizes in [(2, 1), (0, 3), (1, 0, 2)]:
        n = (len(sizes),)
        hold(fn, [A, B], [shard(0, sizes), None], n, **how)
        hold(fn, [A, B], [None, shard(0, sizes)], n, **how)
        hold(fn, [A, B], [shard(0, sizes), shard(2)], n, **how)
        hold(fn, [A, B], [shard(1), shard(0)], n, **how)
    # right-hand sides of one matrix: nothing is sent
    specs = hold(fn, [A[0], B[0]], [None, shard(1, (2, 0, 3))], (3,), **how)
    assert specs[0].dims[-1].sizes == (2, 0, 3)
    hold(fn, [A[0], B[0]], [None, shard(0)], (2,), **how)
    hold(fn, [A, B], [On([Shard(0), Replicate()]), On([Shard(0), Shard(2)])], (2, 2), **how)
    hold(fn, [A, B], [On([Shard(0), Shard(1)]), On([Shard(2), Shard(0)])], (2, 2), **how)


def test_vectors_and_sides():
    how = {"rtol": 1e-9}
    hold(L.solve, [spd(3), random(3, 4)], [shard(0), None], (2,), **how)
    # a shard of three matrices must not take a 3 x 3 right-hand side for three vectors
    hold(L.solve, [spd(6, n=3), random(3, 3)], [shard(0), None], (2,), **how)
    hold(L.solve, [spd(4), random(1, 4, 2)], [shard(0), None], (2,), **how)
    hold(
        lambda A, B: L.solve(A, B, left=False), [spd(), random(5, 4)], [None, shard(0)], (2,), **how
    )
    hold(
        lambda A, B: L.solve_triangular(A, B, upper=True, left=False),
        [spd(), random(5, 4)], [None, shard(0)], (2,), **how,
    )  # fmt: skip
    hold(L.tensorsolve, [random(4, 2, 8), random(4, 2)], [shard(0), None], (2,), gather=True, **how)
    hold(L.tensorinv, [random(4, 2, 8)], [shard(2)], (2,), gather=True, **how)
    tolerance = torch.zeros(3).double()
    hold(lambda x: L.pinv(x, atol=tolerance), [random(3, 4, 2)], [shard(0)], (2,), **how)
    A = torch.complex(random(3, 3, 3), random(3, 3, 3, seed=4))
    hold(L.inv, [A], [shard(0)], (2,), **how)
    hold(L.inv, [spd(3).float()], [shard(1)], (2,))


def errors():
    mesh = make_mesh((3,))
    A = spd(3)
    A[2] = -A[2]
    s = st.distribute_tensor(A, mesh, [Shard(0)], src_data_rank=None)
    for fn in (L.cholesky, lambda x: L.inv(x * 0), torch.cholesky, lambda x: L.eigvalsh(x / 0)):
        with pytest.raises(torch.linalg.LinAlgError):
            fn(s)
    assert full(L.cholesky_ex(s).info).tolist()[:2] == [0, 0]
    found = L.svd(s, full_matrices=False)
    assert type(found) is type(L.svd(A, full_matrices=False))
    assert torch.allclose(full(found.U * found.S[..., None, :] @ found.Vh), A)
    deficient = A.clone()
    deficient[1, :, 0] = 0
    t = st.distribute_tensor(deficient[..., :3], mesh, [Shard(0)], src_data_rank=None)
    b = random(3, 4, 2)
    for g, w in zip(
        L.lstsq(t, b, driver="gelsd"), L.lstsq(deficient[..., :3], b, driver="gelsd"), strict=True
    ):
        assert torch.allclose(full(g), w)


def test_an_error_on_one_rank_is_raised_on_all():
    st.simulate(3, errors)


def sent():
    mesh = make_mesh((2,))
    s = st.distribute_tensor(spd(4), mesh, [Shard(0)], src_data_rank=None).requires_grad_()
    with st.trace() as t:
        L.det(s), L.svdvals(s), L.solve(s, torch.ones(4, 1).double())
    return t.bytes


def test_batches_send_but_whether_they_failed():
    assert max(st.simulate(2, sent)) <= 3 * 8


@pytest.mark.parametrize("sizes", cuts(5))
def test_vectors(sizes):
    n = (len(sizes),)
    a, b = random(5, 3), random(5, 3, seed=4)
    for places in ([shard(0, sizes), None], [None, shard(0, sizes)], [shard(1), shard(0)]):
        hold(L.cross, [a, b], places, n)
        hold(torch.cross, [a, b], places, n)
        hold(L.vecdot, [a, b], places, n)
        hold(lambda a, b: torch.vdot(a[:, 0], b[:, 1]), [a, b], places, n)
    hold(lambda a: L.vander(a, N=4), [a], [shard(0, sizes)], n)
    hold(L.vander, [a.mT.contiguous()], [shard(1, sizes)], n)
    for p in (1.0, 2.0, float("inf")):
        hold(F.pdist, [a, p], [shard(0, sizes), None], n)
        for dim in (0, 1):
            hold(torch.renorm, [a, p, dim, 1.0], [shard(0, sizes), None, None, None], n)
    hold(F.pdist, [random(9, 2)], [shard(0)], (2,))
    hold(F.pdist, [a], [On([Shard(0), Shard(1)])], (2, 2))


def compiled():
    mesh = make_mesh((2,))
    for fn in (L.inv, L.det, L.eigvalsh, lambda x: L.solve(x, x[..., :1])):
        A = spd(3)
        s = st.distribute_tensor(A, mesh, [Shard(0)], src_data_rank=None).requires_grad_()
        out = st.compile(fn, backend="aot_eager")(s)
        assert torch.allclose(full(out), fn(A))
        out.sum().backward()
        plain = A.clone().requires_grad_()
        fn(plain).sum().backward()
        assert torch.allclose(full(s.grad), plain.grad)


def test_compiled():
    st.simulate(2, compiled)
