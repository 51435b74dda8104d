"""`rules.labels`: the laws of labelled dims, on ops of a reader's own."""

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.rules import labels


def _pairs(a, b):
    """Of all pairs of rows, the largest feature of their sum; rows of b are learned points."""
    return labels.run("... p M, ... r M -> ... p r", _largest, a, b)


def _largest(a, b):
    return (a.unsqueeze(-2) + b.unsqueeze(-3)).amax(-1)


def _weighted(a, w, b):
    return labels.run(
        "... i k, k, ... k -> ... i", lambda a, w, b: ((a * w) @ b[..., None])[..., 0], a, w, b
    )


def _numbers(*shape):
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape))
    )


@pytest.mark.parametrize("cut", T.cuts(7))
@pytest.mark.parametrize("places", ["p", "r", "M", "both", "batch", "partial"])
def test_a_pairwise_op(cut, places):
    on = {
        "p": [T.shard(1, cut), None], "r": [None, T.shard(0)], "M": [T.shard(2), T.shard(1)],
        "both": [T.shard(1, cut), T.shard(0)], "batch": [T.shard(0), None],
        "partial": [T.On([Replicate()]), T.shard(0)],
    }[places]  # fmt: skip
    T.hold(_pairs, [_numbers(2, 7, 3), _numbers(5, 3)], on, (len(cut),))


@pytest.mark.parametrize(
    "dims", [(2, 0, 1), (1, None, None), (2, None, 1), (0, None, 0), (None, 0, None)]
)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_contraction_of_three(dims, ranks):
    places = [None if d is None else T.shard(d) for d in dims]
    T.hold(_weighted, [_numbers(2, 5, 3), _numbers(3), _numbers(2, 3)], places, (ranks,))


def test_two_axes():
    on = [T.On([Shard(1), Shard(0)]), T.On([Replicate(), Shard(0)])]
    T.hold(_pairs, [_numbers(2, 7, 3), _numbers(5, 3)], on, (2, 2))


def test_a_summed_label_costs_one_all_reduce():
    def run():
        mesh = T.make_mesh((2,))
        a = st.distribute_tensor(_numbers(2, 5, 4), mesh, [Shard(2)])
        w = st.distribute_tensor(_numbers(4), mesh, [Shard(0)])
        b = st.distribute_tensor(_numbers(2, 4), mesh, [Shard(1)])
        with st.trace() as t:
            _weighted(a, w, b)
        return t.messages, t.bytes

    assert st.simulate(2, run)[0] == (1, 2 * 5 * 8)


@pytest.mark.parametrize(
    ("pattern", "shapes", "error"),
    [
        ("a b, b c -> a c", [(4, 2), (3, 2)], RuntimeError),
        ("a b -> a", [(4, 2), (3, 2)], ValueError),
        ("a b c, a -> a", [(4, 2), (4,)], RuntimeError),
    ],
)
def test_what_does_not_fit_raises_on_every_rank(pattern, shapes, error):
    def run():
        mesh = T.make_mesh((2,))
        given = [st.distribute_tensor(torch.ones(s), mesh, [Shard(0)]) for s in shapes]
        with pytest.raises(error):
            labels.run(pattern, lambda *x: x[0], *given)

    st.simulate(2, run)
