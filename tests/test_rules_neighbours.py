"""Differences and local response normalization over sharded dims, against plain torch."""

import pytest
import torch
import torch.nn.functional as F
from drawn import drawn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T

D = torch.float64


@pytest.mark.parametrize("cut", T.cuts(7))
@pytest.mark.parametrize("n", [0, 1, 2, 6, 7, 9])
def test_diff(cut, n):
    T.hold(torch.diff, [drawn(2, 7, 3), n, 1], [T.shard(1, cut), None, None], (len(cut),))


@pytest.mark.parametrize("cut", T.cuts(5))
def test_diff_with_more_at_the_ends(cut):
    x, a, b = drawn(2, 5), drawn(2, 2), drawn(2, 1)
    on, places = T.shard(1, cut), [T.shard(1), T.shard(0), None]
    for place in places:
        T.hold(torch.diff, [x, 2, -1, a, b], [on, None, None, place, None], (len(cut),))
    T.hold(torch.diff, [x, 1, 1, None, b], [on, None, None, None, T.shard(1)], (len(cut),))
    T.hold(torch.diff, [x, 1, 1, a], [None, None, None, T.shard(0)], (len(cut),))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.bfloat16])
def test_diff_of_other_dtypes(dtype):
    x = (drawn(9, 2) > 0).to(dtype)
    T.hold(lambda x: x.diff(dim=0), [x], [T.shard(0, (1, 0, 8))], (3,))


def test_diff_of_two_axes_sums_and_nothing():
    x = drawn(4, 6)
    T.hold(torch.diff, [x, 2], [T.On([Shard(1), Shard(1)]), None], (2, 2))
    T.hold(torch.diff, [x, 2], [T.On([Shard(0), Shard(1)]), None], (2, 2))
    T.hold(lambda x: x.sum(0).diff(), [x], [T.On([Shard(0), Shard(1)])], (2, 2))
    T.hold(torch.diff, [x[:, :0], 1, 1], [T.shard(1), None, None], (2,))
    T.hold(torch.diff, [x, 1, 1], [T.shard(0, (0, 4)), None, None], (2,))


@pytest.mark.parametrize("args", [(-1,), (1, 5), (1, 1, torch.zeros(3, 1)), (1, 1, torch.zeros(2))])
def test_diff_refuses_what_torch_refuses(args):
    with pytest.raises((RuntimeError, IndexError)) as plain:
        torch.diff(torch.zeros(4, 6), *args)

    def run():
        x = st.distribute_tensor(torch.zeros(4, 6), T.make_mesh((2,)), [Shard(1)])
        with pytest.raises(type(plain.value)):
            torch.diff(x, *args)

    st.simulate(2, run)


def test_differences_of_any_order_are_one_exchange():
    def run():
        x = st.distribute_tensor(drawn(12, 2), T.make_mesh((3,)), [Shard(0)])
        with st.trace() as t:
            y = torch.diff(x, 3, 0)
        assert y.spec.sizes == {0: (3, 4, 2)}
        return t.messages, t.bytes

    assert st.simulate(3, run)[:2] == [(1, 16), (2, 3 * 16)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_local_response_norm_lies_as_its_input(size):
    x = drawn(2, 6, 3, 2)
    for cut in T.cuts(6):
        (spec,) = T.hold(
            F.local_response_norm, [x, size], [T.shard(1, cut), None], (len(cut),)
        )  # fmt: skip
        assert spec.sizes == {1: cut}


def test_nothing_normalised_by_its_neighbours_keeps_its_dtype():
    none = torch.ones(0, 4, 2, dtype=torch.int64)

    def run():
        x = st.distribute_tensor(none, T.make_mesh((2,)), [Shard(1)], src_data_rank=None)
        return F.local_response_norm(x, 3).dtype

    assert st.simulate(2, run) == [F.local_response_norm(none, 3).dtype] * 2
