"""Sorting along sharded dims, against plain torch."""

import pytest
import torch
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T

D = torch.float64
torch.manual_seed(0)
X = torch.randn(3, 7, 4, dtype=D)
V = torch.randn(23, dtype=D)
OPS = {
    "sort": lambda x: x.sort(-1), "descending": lambda x: torch.sort(x, dim=-1, descending=True, stable=True),
    "topk": lambda x: x.topk(3, -1), "smallest": lambda x: torch.topk(x, 2, dim=-1, largest=False),
    "all": lambda x: x.topk(x.shape[-1], -1), "none": lambda x: x.topk(0, -1),
    "argsort": lambda x: x.argsort(-1), "kthvalue": lambda x: x.kthvalue(2, -1),
    "median": lambda x: x.median(-1), "quantile": lambda x: x.quantile(0.3, -1),
}  # fmt: skip
WHOLE = {
    "median": torch.median, "nanmedian": torch.nanmedian, "quantile": lambda x: x.quantile(0.37),
    "quantiles": lambda x: x.quantile(torch.tensor([0.1, 0.5, 1.0], dtype=D), interpolation="lower"),
    "midpoint": lambda x: x.quantile(0.4, interpolation="midpoint"), "msort": torch.msort,
}  # fmt: skip


@pytest.mark.parametrize("cut", T.cuts(7))
@pytest.mark.parametrize("name", OPS)
def test_rows(name, cut):
    T.hold(lambda x: OPS[name](x.transpose(1, 2)), [X], [T.shard(1, cut)], (len(cut),))


@pytest.mark.parametrize("cut", [*T.cuts(23), (0, 23), (23, 0, 0), (1, 1, 1, 20)])
@pytest.mark.parametrize("name", OPS)
def test_vectors(name, cut):
    T.hold(OPS[name], [V], [T.shard(0, cut)], (len(cut),))


@pytest.mark.parametrize("name", WHOLE)
def test_over_all_elements(name):
    for cut in T.cuts(23):
        T.hold(WHOLE[name], [V], [T.shard(0, cut)], (len(cut),))
    T.hold(WHOLE[name], [X], [T.shard(1)], (3,))


def test_placements():
    for place in ([Shard(0), Shard(1)], [Shard(1), Shard(1)]):
        T.hold(lambda x: x.sort(1), [X], [T.On(place)], (2, 2))
    T.hold(lambda x: x.sort(), [V], [T.On([Shard(0), Shard(0)])], (2, 2))
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
