"""Counts and lookups on shards, against plain torch."""

import pytest
import torch
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
F64 = torch.float64
X = torch.randn(3, 7, dtype=F64)
N = torch.randint(0, 6, (19,))
EDGES = torch.tensor([-1.0, 0.0, 0.3, 2.0], dtype=F64)
OPS = {
    "histc": lambda x: torch.histc(x, 5), "histc within": lambda x: torch.histc(x, 4, -1, 1),
    "histogram": lambda x: torch.histogram(x, 5), "edges": lambda x: torch.histogram(x, EDGES),
    "density": lambda x: torch.histogram(x, 4, range=(-1.0, 1.0), density=True),
    "bucketize": lambda x: torch.bucketize(x, EDGES, right=True),
    "searchsorted": lambda x: torch.searchsorted(EDGES, x),
    "isin": lambda x: torch.isin((x * 2).long(), torch.tensor([0, 1])),
}  # fmt: skip
INTEGERS = {
    "bincount": lambda x: torch.bincount(x), "minlength": lambda x: torch.bincount(x, minlength=9),
    "weights": lambda x: torch.bincount(x, torch.linspace(0, 1, 19)),
    "unique": lambda x: torch.unique(x, return_inverse=True, return_counts=True),
    "unique of bools": lambda x: torch.unique(x > 2, return_counts=True),
    "consecutive": lambda x: torch.unique_consecutive(x.sort().values, return_counts=True),
    "isin": lambda x: torch.isin(x, 3), "invert": lambda x: torch.isin(x, torch.tensor([1, 3]), invert=True),
}  # fmt: skip


@pytest.mark.parametrize("cut", T.cuts(7))
@pytest.mark.parametrize("name", OPS)
def test_counts(name, cut):
    T.hold(OPS[name], [X], [T.shard(1, cut)], (len(cut),), grad=False)


@pytest.mark.parametrize("cut", T.cuts(19))
@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name, cut):
    T.hold(
        INTEGERS[name],
        [N],
        [T.shard(0, cut)],
        (len(cut),),
        grad=False,
        gather=name == "consecutive",
    )


def test_two_axes():
    for fn in (OPS["histc"], OPS["bucketize"]):
        T.hold(fn, [X], [T.On([Shard(0), Shard(1)])], (2, 2), grad=False)


@pytest.mark.parametrize("cut", T.cuts(9))
def test_sharded_sequence(cut):
    """A place is the number of smaller elements: one all-reduce of counts."""
    sequence = torch.sort(torch.randint(0, 9, (9,))).values
    values = torch.arange(-1, 11).reshape(3, 4)
    for right in (False, True):
        T.hold(
            lambda s, v, right=right: torch.searchsorted(s, v, right=right), [sequence, values],
            [T.shard(0, cut), None], (len(cut),), grad=False,
        )  # fmt: skip


def test_rows_of_sequences():
    rows, values = X.sort(1).values, torch.randn(3, 4, dtype=F64)
    T.hold(torch.searchsorted, [rows, values], [T.shard(0), None], (2,), grad=False)
    T.hold(torch.searchsorted, [rows, values], [None, T.shard(0)], (3,), grad=False)


def test_only_counts_travel():
    def run():
        x = st.distribute_tensor(torch.randn(1000), T.make_mesh((2,)), [Shard(0)])
        with st.trace() as t:
            torch.histc(x, 10, -1, 1)
        return t.bytes

    assert st.simulate(2, run) == [40, 40]


def test_negative_counts_are_refused_as_by_torch():
    def run():
        x = st.distribute_tensor(torch.tensor([1, 2, -1, 3]), T.make_mesh((2,)), [Shard(0)])
        with pytest.raises(RuntimeError, match="non-negative"):
            torch.bincount(x)

    st.simulate(2, run)
