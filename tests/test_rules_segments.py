"""segment_reduce, softmax's backward called by name, and what is made for the sums of messages."""

import pytest
import torch
from torch.distributed.tensor import Shard
from torch_geometric.utils import segment, softmax

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64
ROWS = 14
LENGTHS = {
    "some empty": [0, 3, 0, 5, 1, 0, 4, 1, 0],
    "one": [14],
    "each row": [1] * 14,
    "long": [1, 12, 1],
}
X = torch.randn(ROWS, 3, dtype=D)


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "min", "prod"])
@pytest.mark.parametrize("initial", [None, 0.25])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_segments(reduce, lengths, initial):
    n = torch.tensor(lengths)
    offsets = torch.cat([n.new_zeros(1), n.cumsum(0)])

    def by_lengths(x, n):
        with st.fallback("error"):
            return torch.segment_reduce(x, reduce, lengths=n, initial=initial)

    def by_offsets(x, n):
        with st.fallback("error"):
            return torch.segment_reduce(x, reduce, offsets=n, initial=initial)

    for cut in T.cuts(ROWS):
        T.hold(by_lengths, [X, n], [T.shard(0, cut), None], (len(cut),))
        T.hold(by_offsets, [X[:, 0], offsets], [T.shard(0, cut), T.shard(0)], (len(cut),))


def test_two_axes():
    n = torch.tensor(LENGTHS["some empty"])
    for on in ([Shard(0), Shard(0)], [Shard(0), Shard(1)], [Shard(1), Shard(0)]):
        T.hold(
            lambda x, n: torch.segment_reduce(x, "max", lengths=n), [X, n], [T.On(on), None], (2, 2)
        )


def test_what_torch_refuses():
    for x, reduce, lengths in (
        (X, "sum", [3, 4]), (X, "sum", [20, -6]), (X, "other", [14]), (X.long(), "sum", [14])
    ):  # fmt: skip
        n = torch.tensor(lengths)
        with pytest.raises((RuntimeError, ValueError)):
            torch.segment_reduce(x, reduce, lengths=n)

        def run(x=x, reduce=reduce, n=n):
            s = st.distribute_tensor(x, T.make_mesh((2,)), [Shard(0)])
            torch.segment_reduce(s, reduce, lengths=n)

        with pytest.raises(st.RankError):
            T.simulate(2, run)


def test_of_pytorch_geometric():
    ptr = torch.tensor([0, 0, 3, 8, 8, 14])
    for cut in ((7, 7), (2, 0, 12)):
        place = [T.shard(0, cut), None]
        T.hold(lambda x, p: segment(x, p, "mean").nan_to_num(), [X, ptr], place, (len(cut),))
        T.hold(lambda x, p: softmax(x, ptr=p), [X, ptr], place, (len(cut),))


def test_softmax_backward_by_name():
    y = X.softmax(1)

    def fn(g, y, d):
        with st.fallback("error"):
            return torch._softmax_backward_data(g, y, d, D)

    for cut in T.cuts(ROWS):
        for d in (0, 1):
            T.hold(fn, [X, y, d], [T.shard(0, cut), T.shard(0, cut), None], (len(cut),))


def test_large_sums_of_messages_are_cut():
    """Nobody read rows of so many nodes before: what each of them gets is cut all the same."""
    n, width = 2**15, 8
    source = torch.randn(64, width, dtype=D)
    at = torch.randint(0, n, (64,))

    def run(x, index):
        index = index.view(-1, 1).expand_as(x)
        out = x.new_zeros(n, width).scatter_add_(0, index, x)
        if isinstance(out, st.ShardTensor):
            assert out.spec.dims[0].is_cut
        return out

    T.hold(run, [source, at], [T.shard(0), T.shard(0)], (3,))
