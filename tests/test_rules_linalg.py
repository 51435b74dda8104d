"""Linear algebra on batches of matrices, products and distances of vectors, against torch."""

import pytest
import torch
from cases.linalg import L, positive
from drawn import drawn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import full, hold, make_mesh, shard


def spd(*batch, n=4):
    return positive(drawn(*batch, n, n))


def test_vectors_and_sides():
    how = {"rtol": 1e-9}
    hold(L.solve, [spd(3), drawn(3, 4)], [shard(0), None], (2,), **how)
    # a shard of three matrices must not take a 3 x 3 right-hand side for three vectors
    hold(L.solve, [spd(6, n=3), drawn(3, 3)], [shard(0), None], (2,), **how)
    hold(L.solve, [spd(4), drawn(1, 4, 2)], [shard(0), None], (2,), **how)
    hold(
        lambda A, B: L.solve(A, B, left=False), [spd(), drawn(5, 4)], [None, shard(0)], (2,), **how
    )
    hold(
        lambda A, B: L.solve_triangular(A, B, upper=True, left=False),
        [spd(), drawn(5, 4)], [None, shard(0)], (2,), **how,
    )  # fmt: skip
    hold(L.tensorsolve, [drawn(4, 2, 8), drawn(4, 2)], [shard(0), None], (2,), gather=True, **how)
    hold(L.tensorinv, [drawn(4, 2, 8)], [shard(2)], (2,), gather=True, **how)
    tolerance = torch.zeros(3).double()
    hold(lambda x: L.pinv(x, atol=tolerance), [drawn(3, 4, 2)], [shard(0)], (2,), **how)
    A = torch.complex(drawn(3, 3, 3), drawn(3, 3, 3, seed=4))
    hold(L.inv, [A], [shard(0)], (2,), **how)
    hold(L.inv, [spd(3).float()], [shard(1)], (2,))


def errors():
    mesh = make_mesh((3,))
    A = spd(3)
    A[2] = -A[2]
    s = st.distribute_tensor(A, mesh, [Shard(0)], src_data_rank=None)
    failing = [L.cholesky, lambda x: L.inv(x * 0), lambda x: L.eigvalsh(x / 0)]
    # torch 2.14 has one that only says that it is gone
    failing += [torch.cholesky] * (type(torch.cholesky) is type(torch.add))
    for fn in failing:
        with pytest.raises(torch.linalg.LinAlgError):
            fn(s)
    assert full(L.cholesky_ex(s).info).tolist()[:2] == [0, 0]
    found = L.svd(s, full_matrices=False)
    assert type(found) is type(L.svd(A, full_matrices=False))
    assert torch.allclose(full(found.U * found.S[..., None, :] @ found.Vh), A)
    deficient = A.clone()
    deficient[1, :, 0] = 0
    t = st.distribute_tensor(deficient[..., :3], mesh, [Shard(0)], src_data_rank=None)
    b = drawn(3, 4, 2)
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


def learned():
    """A right-hand side that is a weight, and larger than the matrices: these stay on their ranks."""
    mesh = make_mesh((3,))
    s = st.distribute_tensor(spd(3), mesh, [Shard(0)], src_data_rank=None)
    weight = drawn(3, 4, 5).requires_grad_()
    with st.trace() as t:
        assert L.solve(s, weight)._spec.dims[0].axes == (0,)
    # whether one of them was singular
    return t.bytes


def test_matrices_before_a_large_weight_are_not_gathered():
    assert max(st.simulate(3, learned)) <= 3 * 8
