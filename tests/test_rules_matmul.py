"""Products, embedding: against plain torch."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64
x = torch.randn(2, 7, 6, dtype=D)
w, b = torch.randn(5, 6, dtype=D), torch.randn(5, dtype=D)


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


def kinds_of_products():
    """Results have one device's dtype, on a rank with one row or none, too."""
    mesh = T.make_mesh((3,))
    torch.manual_seed(0)
    a, b, c = torch.randn(6, 4), torch.randn(6, 5), torch.randn(6)
    calls = {
        "einsum": lambda x, y, z: torch.einsum("ki,kj->ij", x, y),
        "einsum of three": lambda x, y, z: torch.einsum("ki,kj,k->ij", x, y, z),
        "einsum to batches": lambda x, y, z: torch.einsum("ki,kj->kij", x, y),
        "bilinear": lambda x, y, z: F.bilinear(x, y, torch.ones(2, 4, 5)),
        "mv": lambda x, y, z: torch.mv(x.T, z),
        "dot": lambda x, y, z: torch.dot(z, x[:, 0]),
        "vdot": lambda x, y, z: torch.vdot(z, x[:, 0]),
        "vecdot": lambda x, y, z: torch.linalg.vecdot(x, y[:, :4], dim=0),
        "addmv": lambda x, y, z: torch.addmv(torch.ones(4), x.T, z),
        "outer": lambda x, y, z: torch.outer(z, z),
        "tensordot": lambda x, y, z: torch.tensordot(x, y, dims=([0], [0])),
    }
    for sizes in ((5, 0, 1), (2, 3, 1), (2, 2, 2)):
        given = [
            st.distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None, sizes={0: sizes})
            for t in (a, b, c)
        ]
        for name, call in calls.items():
            with torch.autocast("cpu", torch.bfloat16):
                got, want = call(*given), call(a, b, c)
            assert got.dtype is want.dtype, (name, sizes, got.dtype, want.dtype)
            near = 8 * torch.finfo(torch.bfloat16).eps * want.float().abs().max()
            assert (got.full_tensor() - want).abs().max() <= near, (name, sizes)


def test_autocast_of_products_of_few_rows():
    st.simulate(3, kinds_of_products)


def beyond(index):
    table = st.distribute_tensor(torch.randn(9, 4), T.make_mesh((2,)), [Shard(0)])
    for i in (index, -1):
        with pytest.raises(IndexError, match="out of range"):
            F.embedding(torch.tensor([0, i]), table)


def test_embedding_beyond_a_sharded_table():
    """Every rank raises; none waits for another."""
    st.simulate(2, beyond, 9)


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
