"""Products, embedding: against plain torch."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64
x = torch.randn(2, 7, 6, dtype=D)
w, b = torch.randn(5, 6, dtype=D), torch.randn(5, dtype=D)


@pytest.mark.parametrize("cut", T.cuts(7))
def test_linear_over_tokens(cut):
    T.hold(F.linear, [x, w, b], [T.shard(1, cut), None, None], (len(cut),))
    T.hold(F.linear, [x, w], [T.shard(1, cut), T.replicated()], (len(cut),))


@pytest.mark.parametrize("cut", T.cuts(6))
def test_linear_over_features(cut):
    T.hold(F.linear, [x, w, b], [T.shard(2, cut), None, None], (len(cut),))
    T.hold(F.linear, [x, w, b], [T.shard(2, cut), T.shard(1), None], (len(cut),))
    T.hold(F.linear, [x, w, b], [None, T.shard(1, cut), None], (len(cut),))


@pytest.mark.parametrize("dims", [(0, 0), (1, 2), (2, 1), (1, 1), (2, 2), (0, None), (None, 2)])
@pytest.mark.parametrize("n", [2, 3])
def test_matmul_any_dims(dims, n):
    y = torch.randn(2, 6, 7, dtype=D)
    places = [None if d is None else T.shard(d) for d in dims]
    T.hold(torch.matmul, [x, y], places, (n,))
    T.hold(lambda a, c: a @ c, [x, y[0]], [places[0] or T.shard(1), None], (n,))


@pytest.mark.parametrize(
    "shapes",
    [
        ((6,), (6,)),
        ((7, 6), (6,)),
        ((6,), (6, 7)),
        ((3, 1, 7, 6), (2, 6, 4)),
        ((1, 7, 6), (5, 6, 4)),
    ],
)
def test_matmul_broadcasting(shapes):
    p, q = (torch.randn(s, dtype=D) for s in shapes)
    for d in range(p.ndim):
        T.hold(torch.matmul, [p, q], [T.shard(d), None], (2,))
    for d in range(q.ndim):
        T.hold(torch.matmul, [p, q], [T.replicated(), T.shard(d)], (3,))


@pytest.mark.parametrize(
    "placements",
    [[Shard(1), Shard(2)], [Shard(1), Shard(1)], [Replicate(), Shard(1)], [Shard(0), Shard(2)]],
)
def test_two_axes(placements):
    T.hold(F.linear, [x, w, b], [T.On(placements), None, None], (2, 2))
    T.hold(lambda a: a @ a.mT, [x], [T.On(placements)], (2, 2))


EQUATIONS = [
    ("bnc,oc->bno", (2, 7, 6), (5, 6)),
    ("bnc,bmc->bnm", (2, 7, 6), (2, 5, 6)),
    ("bnc,bng->bgc", (2, 7, 6), (2, 7, 3)),
    ("...nc,c->...n", (2, 7, 6), (6,)),
    ("bnc,bnc->", (2, 7, 6), (2, 7, 6)),
    ("bnc,bnc", (2, 7, 6), (2, 7, 6)),
    ("bnc,d->dn", (2, 7, 6), (3,)),
]


@pytest.mark.parametrize("case", EQUATIONS)
def test_einsum(case):
    eq, *shapes = case
    p, q = (torch.randn(s, dtype=D) for s in shapes)
    for d in range(3):
        T.hold(lambda a, c: torch.einsum(eq, a, c), [p, q], [T.shard(d), None], (2,))
        if d < q.ndim:
            T.hold(lambda a, c: torch.einsum(eq, a, c), [p, q], [T.shard(0), T.shard(d)], (3,))


def test_einsum_one_and_three_operands():
    y = torch.randn(7, 3, dtype=D)
    for d in range(3):
        T.hold(lambda a: torch.einsum("bnc->cb", a), [x], [T.shard(d)], (2,))
        T.hold(
            lambda a, c, e: torch.einsum("bnc,oc,ng->bgo", a, c, e),
            [x, w, y], [T.shard(d), None, None], (2,),
        )  # fmt: skip


def test_kin():
    m = torch.randn(7, 5, dtype=D)
    v = torch.randn(7, dtype=D)
    for d in (1, 2):
        T.hold(lambda a, c: torch.tensordot(a, c, 1), [x, w.T], [T.shard(d), None], (2,))
        T.hold(torch.bilinear, [x, x, torch.randn(3, 6, 6, dtype=D), None],
               [T.shard(d), T.shard(d), None, None], (2,))  # fmt: skip
    T.hold(torch.outer, [v, v], [T.shard(0), T.shard(0)], (2,))
    T.hold(torch.addmm, [m, x[0], w.T], [T.shard(0), T.shard(0), None], (2,))
    T.hold(lambda i, p, q: torch.addmm(i, p, q, beta=0.5, alpha=2), [m[0], x[0], w.T],
           [None, T.shard(1), None], (3,))  # fmt: skip
    T.hold(torch.inner, [x, w], [T.shard(1), None], (2,))
    T.hold(torch.bmm, [x, x.mT.contiguous()], [T.shard(1), T.shard(1)], (2,))
    T.hold(torch.mv, [x[0], x[1, 0]], [T.shard(0), None], (2,))


@pytest.mark.parametrize("cut", T.cuts(7))
def test_embedding(cut):
    index = torch.randint(0, 5, (2, 7))
    table = torch.nn.Embedding(5, 4, padding_idx=2, dtype=D)
    T.hold(table, [index], [T.shard(1, cut)], (len(cut),))


def test_fp32():
    T.hold(F.linear, [x.float(), w.float(), b.float()], [T.shard(1), None, None], (3,))


def _bytes(n):
    mesh = T.make_mesh((2,))
    a = st.distribute_tensor(
        torch.randn(1, n, 6), mesh, [Shard(1)], src_data_rank=None
    ).requires_grad_()
    weight = torch.nn.Parameter(w.float())
    bias = torch.nn.Parameter(b.float())
    with st.trace() as forward:
        out = F.linear(a, weight, bias)
    with st.trace() as backward:
        out.sum().backward()
    return forward.bytes, [(s.collective, s.bytes) for s in backward.sent]


def test_weight_gradients_travel_in_one_message():
    for n in (4, 64):
        for forward, backward in st.simulate(2, _bytes, n):
            assert forward == 0
            # the sum's all-reduce, then weight and bias in one: 35 floats there and back
            assert [c for c, _ in backward] == ["all_reduce"] * 2
            assert backward[-1][1] == 35 * 4


def test_a_large_weight_is_not_cut():
    """Sharded features before a classifier are gathered: a cut would copy the weight."""

    def run():
        x = st.distribute_tensor(torch.randn(1, 64), T.make_mesh((2,)), [Shard(1)])
        weight = torch.randn(32, 64, requires_grad=True)
        with st.trace() as t:
            F.linear(x, weight).sum().backward()
        return [s.collective for s in t.sent], t.bytes

    for names, sent in st.simulate(2, run):
        assert names == ["all_gather"] and sent == 4 * 32


def products():
    """Of a contracted dim that is cut: the addend is cast as the factors are."""
    mesh = T.make_mesh((2,))
    torch.manual_seed(0)
    a, b, bias = torch.randn(3, 4, 6), torch.randn(3, 6, 5), torch.randn(5)
    s = st.distribute_tensor(a, mesh, [Shard(2)], src_data_rank=None)
    for cast in (torch.bfloat16, torch.float16):
        for call in (
            lambda x: F.linear(x, b[0].T, bias),
            lambda x: torch.addmm(bias, x[0], b[0]),
            lambda x: torch.baddbmm(bias, x, b),
        ):
            with torch.autocast("cpu", cast):
                got, want = call(s), call(a)
            assert got.dtype is want.dtype
            near = 4 * torch.finfo(cast).eps * want.float().abs().max()
            assert (got.full_tensor() - want).abs().max() <= near


def test_autocast_of_a_cut_product():
    st.simulate(2, products)


@pytest.mark.parametrize("cut", T.cuts(9))
@pytest.mark.parametrize("dim", [0, 1])
def test_embedding_of_a_sharded_table(dim, cut):
    """Indices are whole: each rank looks up its own rows, or columns."""
    table, i = torch.randn(9, 9, dtype=D), torch.tensor([[0, 8, 4], [4, 3, 7]])
    T.hold(F.embedding, [i, table, 4], [None, T.shard(dim, cut), None], (len(cut),))
    T.hold(F.embedding, [i, table, 4], [T.replicated(), T.shard(dim, cut), None], (len(cut),))


def beyond(index):
    table = st.distribute_tensor(torch.randn(9, 4), T.make_mesh((2,)), [Shard(0)])
    for i in (index, -1):
        with pytest.raises(IndexError, match="out of range"):
            F.embedding(torch.tensor([0, i]), table)


def test_embedding_beyond_a_sharded_table():
    """Every rank raises; none waits for another."""
    st.simulate(2, beyond, 9)


@pytest.mark.parametrize("equation", ["ik,kj->ij", "ik,kj->kij", "...k,kj->...j", "ik,kj->"])
@pytest.mark.parametrize("shapes", [((5, 1), (6, 4)), ((5, 6), (1, 4)), ((1, 6), (6, 4))])
@pytest.mark.parametrize("dims", [(0, 0), (1, 0), (1, 1), (None, 0), (1, None)])
def test_einsum_broadcasts(equation, shapes, dims):
    torch.manual_seed(0)
    a, b = (torch.randn(*s, dtype=torch.float64) for s in shapes)
    places = [None if d is None else T.shard(d) for d in dims]
    T.hold(torch.einsum, [equation, a, b], [None, *places], (3,))


@pytest.mark.parametrize("dims", [(0, None), (1, None), (None, 0), (1, 0)])
def test_a_summed_dim_of_one_row_does_not_broadcast(dims):
    """A shard of one row must not pass for a dim of size 1."""
    a, b = torch.randn(3, 1), torch.randn(2, 4)
    places = [None if d is None else T.shard(d) for d in dims]
    with pytest.raises(st.RankError, match="do not fit"):
        T.hold(_matmul_on_ranks, [a, b], places, (2,), grad=False)


def _matmul_on_ranks(a, b):
    # torch raises on one device, too
    sharded = isinstance(a, st.ShardTensor) or isinstance(b, st.ShardTensor)
    return a @ b if sharded else a.sum()
