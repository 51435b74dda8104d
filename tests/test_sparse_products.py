"""Products of sharded tensors with plain sparse matrices, held against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Partial, Replicate, Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.compat.physicsnemo import sync_module_over_mesh

D = torch.float64
M, K, C = 5, 9, 3
FORMS = {
    "coo": torch.Tensor.to_sparse,
    "csr": torch.Tensor.to_sparse_csr,
    "csc": torch.Tensor.to_sparse_csc,
    # entries in no order, some of them twice
    "loose": lambda s: loose(s.to_sparse()),
}


def loose(s):
    i, v = s.indices(), s.values()
    order = torch.randperm(i.shape[1], generator=torch.Generator().manual_seed(1))
    i, v = torch.cat([i[:, order], i[:, :3]], 1), torch.cat([v[order], v[:3]])
    return torch.sparse_coo_tensor(i, v, s.shape)


def matrix(m, k, form="coo", seed=0, dtype=D):
    g = torch.Generator().manual_seed(seed)
    dense = torch.randn(m, k, generator=g, dtype=dtype)
    return FORMS[form](dense * (torch.rand(m, k, generator=g) < 0.4))


# name: (op of a matrix and x, shape of the matrix, shape of x, dim of x that it contracts)
OPS = {
    "S @ x": (lambda s, x: s @ x, (M, K), (K, C), 0),
    "S @ v": (lambda s, x: s @ x, (M, K), (K,), 0),
    "mm": (lambda s, x: torch.mm(s, x), (K, K), (K, C), 0),
    "sparse.mm": (lambda s, x: torch.sparse.mm(s, x), (M, K), (K, C), 0),
    "sparse.mm, T": (lambda s, x: torch.sparse.mm(s, x.T).T, (13, K), (C, K), 1),
    "S.t() @ x": (lambda s, x: s.t() @ x, (K, M), (K, C), 0),
    "S.t() by name": (lambda s, x: torch.mm(input=s.t(), mat2=x), (K, M), (K, C), 0),
    "x @ S": (lambda s, x: x @ s, (K, M), (C, K), 1),
    "x @ S, batch": (lambda s, x: x @ s, (K, M), (2, C, K), 2),
    "x @ S.t()": (lambda s, x: torch.matmul(x, s.t()), (M, K), (2, C, K), 2),
    "v @ S": (lambda s, x: x @ s, (K, M), (K,), 0),
    "linear": (lambda s, x: F.linear(x, s), (M, K), (C, K), 1),
    "linear, batch": (lambda s, x: F.linear(x, s, torch.ones(M, dtype=D)), (M, K), (2, C, K), 2),
    "addmm": (
        lambda s, x: torch.addmm(torch.ones(C, dtype=D), s, x, beta=2, alpha=3),
        (M, K), (K, C), 0,
    ),
    "sparse.addmm": (
        lambda s, x: torch.sparse.addmm(torch.ones(M, C, dtype=D), s, x, beta=2, alpha=3),
        (M, K), (K, C), 0,
    ),
}  # fmt: skip


def made(form, shape, op):
    """(op of values, of which the matrix is made, and x; those values), or (op of x; none)."""
    s = matrix(*shape, form)
    if form in ("csr", "csc"):
        return lambda x: op(s, x), []
    index = s._indices()
    return lambda v, x: op(torch.sparse_coo_tensor(index, v, shape), x), [s._values().clone()]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("form", FORMS)
def test_products(form, name):
    """On all cuts of the contracted dim: the value, all gradients, and where the result lies."""
    op, shape, of, d = OPS[name]
    torch.manual_seed(0)
    fn, values = made(form, shape, op)
    args = [*values, torch.randn(of, dtype=D)]
    for cut in T.cuts(K):
        if d < len(of) and of[d] == K:
            places = [*[None] * len(values), T.shard(d, cut)]
            (spec,) = T.hold(fn, args, places, (len(cut),))
            assert spec.varying == (0,) and not spec.partial
            if shape == (K, K):
                assert spec.dims[d].sizes == cut


ON_TWO = [
    T.On([Shard(0), Shard(0)], {0: (3, 0, 4, 2)}),
    T.On([Shard(0), Shard(1)], {0: (7, 2), 1: (3, 0)}),
    T.On([Shard(1), Shard(0)]),
    T.On([Shard(0), Replicate()], {0: (9, 0)}),
    T.On([Replicate(), Shard(1)]),
    T.On([Partial(), Shard(0)]),
    T.On([Shard(1), Partial()]),
]


@pytest.mark.parametrize("place", ON_TWO, ids=str)
def test_two_axes(place):
    torch.manual_seed(0)
    for form in ("coo", "csr"):
        fn, values = made(form, (M, K), lambda s, x: torch.sparse.mm(s, x))
        args = [*values, torch.randn(K, C, dtype=D)]
        T.hold(fn, args, [*[None] * len(values), place], (2, 2))


def learned():
    """A leaf's gradient by torch.sparse.mm keeps its layout; second derivatives of its values."""
    mesh = T.make_mesh((3,))
    torch.manual_seed(0)
    x = torch.randn(K, C, dtype=D)
    ways = (lambda t: t, lambda t: st.distribute_tensor(t, mesh, [Shard(0)]))
    for form in ("coo", "csr", "loose"):
        (y0, g0, s0), (y1, g1, s1) = (once(put(x.clone()), matrix(M, K, form)) for put in ways)
        assert s1.layout == s0.layout
        for a, b in ((y1, y0), (g1, g0), (s1.to_dense(), s0.to_dense())):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for form in ("coo", "loose"):
        want, got = (twice(put(x.clone()), matrix(M, K, form)) for put in ways)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    own = ways[1](x.clone()).requires_grad_()
    y = torch.sparse.mm(matrix(M, K).requires_grad_(), own)
    with pytest.raises(st.UnsupportedOpError, match="second derivatives through a sparse matrix"):
        torch.autograd.grad(y.square().sum(), own, create_graph=True)


def once(x, s):
    x, s = x.requires_grad_(), s.requires_grad_()
    y = torch.sparse.mm(s, x)
    y.square().sum().backward()
    return T.full(y), T.full(x.grad), s.grad


def twice(x, s):
    x, v = x.requires_grad_(), s._values().clone().requires_grad_()
    y = torch.sparse.mm(torch.sparse_coo_tensor(s._indices(), v, s.shape), x)
    grads = torch.autograd.grad(y.pow(3).sum(), [x, v], create_graph=True)
    sum(g.square().sum() for g in grads).backward()
    return T.full(x.grad), v.grad


def test_learned():
    st.simulate(3, learned)


def costs():
    """A banded matrix: the rows beside the cut, once, and nothing but them; a diagonal: nothing."""
    mesh = T.make_mesh((3,))
    n = 12
    i = torch.arange(n)
    band = torch.zeros(n, n, dtype=D)
    for k in (-1, 0, 1):
        band[i, (i + k) % n] = 1.0
    x = st.distribute_tensor(torch.randn(n, 5, dtype=D), mesh, [Shard(0)]).requires_grad_()
    for s in (band.to_sparse(), band.to_sparse_csr()):
        for _ in range(2):
            with st.trace() as t:
                y = s @ x
            # also at first: nothing is asked of other ranks
            assert [e.collective for e in t.sent] == ["take"] and t.bytes == 2 * 5 * 8
            assert y.spec == x.spec
        with st.trace() as b:
            y.backward(y.detach())
        assert [e.collective for e in b.sent] == ["put"] and b.bytes == t.bytes
    with st.trace() as t:
        torch.eye(n, dtype=D).to_sparse() @ x
    assert t.bytes == 0 and not t.sent


def test_sends_the_rows_that_are_named():
    st.simulate(3, costs)


def rewritten():
    """What was found of a matrix is not used for what its memory holds later."""
    mesh = T.make_mesh((2,))
    torch.manual_seed(0)
    x = torch.randn(4, 2, dtype=D)
    own = st.distribute_tensor(x, mesh, [Shard(0)])
    index = torch.tensor([[0, 1, 3], [3, 0, 2]])
    s = torch.sparse_coo_tensor(index, torch.ones(3, dtype=D), (4, 4), is_coalesced=True)
    for _ in range(3):
        torch.testing.assert_close((s @ own).full_tensor(), s @ x)
        s.values().mul_(3)
        s._indices()[1].copy_((s._indices()[1] + 1) % 4)


def test_a_matrix_that_is_written_to():
    st.simulate(2, rewritten)


@pytest.mark.parametrize("form", ["coo", "csr"])
def test_dtypes(form):
    """Under autocast and of other dtypes as torch: its value or its error, on every rank."""
    s = torch.eye(K)
    s[2, 5] = 3
    x = torch.arange(K * C).view(K, C).float()

    def on_rank():
        own = st.distribute_tensor(x, T.make_mesh((3,)), [Shard(0)], sizes={0: (K, 0, 0)})
        found = []
        for make in (
            torch.Tensor.half,
            torch.Tensor.long,
            torch.Tensor.cfloat,
            torch.Tensor.double,
        ):
            for also in (make, torch.Tensor.float):
                found.append(outcome(lambda y, m=make, n=also: FORMS[form](m(s)) @ n(y), own))
        with torch.autocast("cpu", torch.bfloat16):
            found.append(outcome(lambda y: FORMS[form](s) @ y, own))
        return found, None

    want = []
    for make in (torch.Tensor.half, torch.Tensor.long, torch.Tensor.cfloat, torch.Tensor.double):
        for also in (make, torch.Tensor.float):
            want.append(outcome(lambda y, m=make, n=also: FORMS[form](m(s)) @ n(y), x))
    with torch.autocast("cpu", torch.bfloat16):
        want.append(outcome(lambda y: FORMS[form](s) @ y, x))
    for got, _ in st.simulate(3, on_rank):
        for a, b in zip(got, want, strict=True):
            assert (a is None) == (b is None)
            assert b is None or (a.dtype == b.dtype and torch.equal(a, b))


def outcome(fn, x):
    try:
        return T.full(fn(x))
    except RuntimeError:
        return None


def refusals():
    mesh = T.make_mesh((2,))
    x = st.distribute_tensor(torch.ones(K, C, dtype=D), mesh, [Shard(0)])
    s = matrix(M, K).requires_grad_()
    batch = x[None].expand(2, K, C)
    for match, call in [
        ("use torch.sparse.mm, whose gradient is sparse", lambda: s @ x),
        ("use torch.sparse.mm, whose gradient is sparse", lambda: (s * 2) @ x),
        ("use torch.sparse.mm, whose gradient is sparse", lambda: F.linear(x.T, s)),
        ("use torch.sparse.mm.S, x. of a CSR", lambda: matrix(M, K, "csr").requires_grad_() @ x),
        ("a batch, which torch does not have", lambda: s.detach() @ batch),
        ("a batch, which torch does not have", lambda: batch.transpose(1, 2) @ s.detach().t()),
        ("reduce='mean'", lambda: torch.sparse.mm(s, x, "mean")),
        ("dense dims", lambda: torch.ones(K, K, 1, dtype=D).to_sparse(2) @ x),
    ]:
        with pytest.raises(st.UnsupportedOpError, match=match), st.trace() as t:
            call()
        assert not t.sent
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        matrix(M, K + 1) @ x


def test_refuses():
    st.simulate(2, refusals)


@pytest.mark.parametrize("form", FORMS)
def test_a_complex_matrix_that_an_op_made(form):
    """Its values are a view of it, which has no strides."""
    s = matrix(K, K, form).to(torch.complex128) * (1 + 2j)
    x = torch.randn(K, C, dtype=D, generator=torch.Generator().manual_seed(3))

    def product(x):
        return torch.view_as_real(s @ x.to(torch.complex128))

    for cut in ((5, 4), (0, 7, 2)):
        T.hold(product, [x], [T.shard(0, cut)], (len(cut),))


class Mixed(torch.nn.Module):
    """A layer beside a matrix that a buffer holds, of other numbers on each rank."""

    def __init__(self, s, rank):
        super().__init__()
        self.register_buffer("s", s.clone())
        self.s.values().mul_(1 + rank)
        self.layer = torch.nn.Linear(2, 2, dtype=torch.float64)

    def forward(self, x):
        return self.layer(self.s @ x)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_buffers_of_all_ranks_become_those_of_the_first(layout):
    whole = torch.eye(6, dtype=torch.float64).roll(1, 0) + torch.eye(6, dtype=torch.float64)
    s = whole.to_sparse(layout=layout)
    s, x = s.coalesce() if layout is torch.sparse_coo else s, torch.randn(6, 2).double()

    def run(entries):
        mesh = T.make_mesh((2,))
        given = s if entries is None or not mesh.get_rank() else entries
        model = st.parallelize(Mixed(given, mesh.get_rank()), mesh)
        y = model(st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None))
        return y.full_tensor().detach(), model.layer(whole @ x).detach()

    for y, want in st.simulate(2, run, None):
        torch.testing.assert_close(y, want)
    other = torch.eye(6, dtype=torch.float64).to_sparse(layout=layout)
    other = other.coalesce() if layout is torch.sparse_coo else other
    with pytest.raises(st.RankError, match="of the same places on all of them"):
        st.simulate(2, run, other)


@pytest.mark.parametrize("way", ["parallelize", "physicsnemo"])
def test_a_buffer_that_only_the_first_rank_has_twice_at_a_place(way):
    def run():
        mesh = T.make_mesh((2,))
        at = torch.tensor([[0, 2 * mesh.get_rank(), 1], [1, 1, 0]])
        s = torch.sparse_coo_tensor(at, torch.ones(3), (3, 2), dtype=torch.float64)
        model = torch.nn.Module()
        model.register_buffer("s", s.coalesce() if mesh.get_rank() else s)
        if way == "parallelize":
            st.parallelize(model, mesh)
        else:
            sync_module_over_mesh(model, mesh, verify=True)
        return model.s.coalesce().values().tolist()

    assert st.simulate(2, run) == [[2, 1]] * 2
