"""Sorting along sharded dims, against plain torch."""

import pytest
import torch
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor._torch.world import silent_world
from shardtensor.comm import groups
from shardtensor.ranks.measure import peak_bytes
from shardtensor.ranks.testing import make_mesh
from shardtensor.spec import Spec
from shardtensor.tensor import wrap

D = torch.float64
torch.manual_seed(0)
X = torch.randn(3, 7, 4, dtype=D)


def test_stays_cut_as_it_was():
    (spec, _) = T.hold(lambda x: x.sort(1), [X], [T.shard(1, (5, 2))], (2,))
    assert spec.dims[1].sizes == (5, 2)


@pytest.mark.parametrize("descending", [False, True])
def test_ties_keep_their_order(descending):
    """As torch's stable sort: a place decides between equal values; NaN above all; -0.0 is 0.0."""
    special = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0]
    x = torch.tensor(special * 5)[torch.randperm(35)]
    for values in (x, torch.randint(0, 4, (35,)), x.bfloat16(), torch.randint(0, 2, (35,)).bool()):
        for cut in T.cuts(35):
            T.hold(
                lambda x: torch.sort(x, dim=0, descending=descending, stable=True),
                [values], [T.shard(0, cut)], (len(cut),), grad=False,
            )  # fmt: skip


def test_no_rank_holds_all():
    """Of 4 ranks each receives about a quarter: keys and places, and rows by place."""

    def run():
        x = st.distribute_tensor(torch.randn(40000), T.make_mesh((4,)), [Shard(0)])
        with st.trace() as t:
            x.sort()
        return t.bytes, {s.collective for s in t.sent}

    for sent, names in st.simulate(4, run):
        assert sent < 3 * 10000 * (8 + 8 + 8 + 8) and "sort" in names


def test_topk_sends_candidates():
    def run():
        x = st.distribute_tensor(torch.randn(1000), T.make_mesh((2,)), [Shard(0)])
        with st.trace() as t:
            x.topk(5)
        return t.bytes

    assert st.simulate(2, run) == [5 * (4 + 8)] * 2


@pytest.mark.parametrize("cut", [(5000, 5000), (9000, 0, 1000)])
@pytest.mark.parametrize("shape", [(10000,), (2, 10000), (5, 10000)])
def test_many_numbers(shape, cut):
    """Blocks of several lanes and ranks, of which some have none, and indices in fewer bytes."""
    torch.manual_seed(0)
    x = torch.randint(0, 400, shape, dtype=D)
    T.hold(lambda x: x.sort(dim=-1, stable=True), [x], [T.shard(len(shape) - 1, cut)], (len(cut),))


def test_a_sort_along_one_of_two_dims_releases_what_has_moved():
    with silent_world(4, 8):
        spec = Spec.of(make_mesh((8,)), [Shard(1)], (8, 8192))
        x = wrap(torch.randn(spec.local_shape), spec)
        # values and 8-byte indices of the lanes are not held beside those that have moved
        assert peak_bytes(lambda: x.sort()) < 6.5 * x._local.nbytes


def test_what_a_sort_takes_both_ways():
    ranks, n = 8, 2**19
    with silent_world(1, ranks), groups.taken_spread():
        spec = Spec.of(T.make_mesh((ranks,)), [Shard(0)], (n,))
        x = wrap(torch.arange(n // ranks, dtype=torch.float32), spec).requires_grad_()

        def both():
            values = x.sort()[0]
            torch.autograd.grad(values, x, values.detach())

        both()
        # torch's sort of one device takes 5; elements that came, where they go
        assert peak_bytes(both) < 7.2 * x._local.nbytes
