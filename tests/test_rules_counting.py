"""Counts and lookups on shards, against plain torch."""

import pytest
import torch
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T


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


def test_isin_of_a_number_that_the_dtype_does_not_hold():
    def run():
        x = st.distribute_tensor(torch.arange(6, dtype=torch.int32), T.make_mesh((2,)), [Shard(0)])
        for call in (lambda: torch.isin(x, 1 << 40), lambda: torch.isin(1 << 40, x)):
            with pytest.raises(st.UnsupportedOpError, match="does not hold"):
                call()

    st.simulate(2, run)
