"""`rules.labels`: the laws of labelled dims, on ops of a reader's own."""

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard

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

    assert st.simulate(2, run, transport="plain")[0] == (1, 2 * 5 * 8)


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


def _ordered(x, y):
    """Rows in order, and where they were; y tells how far along the first dim."""
    return labels.run("n M, n -> n M, n M", lambda x, y: (x * y[:, None]).sort(-1), x, y)


def _best(x, y):
    return labels.run("n k, k -> n", lambda x, y: (x * y).amax(-1), x, y, op="max")


@pytest.mark.parametrize("cut", T.cuts(7))
@pytest.mark.parametrize("places", ["n", "M", "y", "other", "both"])
def test_several_results_of_a_whole_label(cut, places):
    on = {
        "n": [T.shard(0, cut), None], "M": [T.shard(1), None], "y": [None, T.shard(0, cut)],
        "other": [T.shard(1), T.shard(0, cut)], "both": [T.shard(0, cut), T.shard(0)],
    }[places]  # fmt: skip
    T.hold(_ordered, [_numbers(7, 4), _numbers(7)], on, (len(cut),))


def test_a_whole_label_gives_its_axes_to_the_largest_other():
    def run():
        mesh = T.make_mesh((2, 2))
        x = st.distribute_tensor(_numbers(3, 5, 4), mesh, [Replicate(), Shard(2)])
        y = st.distribute_tensor(_numbers(5, 4), mesh, [Shard(0), Shard(1)])
        with st.trace() as t:
            (out,) = labels.run("b n M -> b n M", lambda x: (x * 2,), x)
        assert t.messages == 1 and out.placements == (Replicate(), Shard(1))
        p = labels.plan("b n M, n M -> b n", x, y)
        # n of x is taken first: y's own axis of it moves nowhere
        assert p.out.placements == (Replicate(), Shard(1)) and not p.gathered
        assert labels.plan("M N -> M N", y).gathered == {"M", "N"}
        q = labels.plan("n M, n M -> n", y, y)
        assert q.out.placements == (Shard(0), Replicate()) and q.gathered == {"M"}

    st.simulate(4, run)


def test_an_order_and_an_operand_that_is_none():
    def run():
        mesh = T.make_mesh((2,))
        small, large = _numbers(4), _numbers(4, 6)
        x = st.distribute_tensor(small, mesh, [Shard(0)])
        y = st.distribute_tensor(large, mesh, [Shard(1)])
        pattern = "a, a b, c -> a b"
        assert labels.plan(pattern, x, y, None).out.placements == (Shard(1),)
        assert labels.plan(pattern, x, y, None, order=(0, 1)).out.placements == (Shard(0),)
        both = labels.run(pattern, lambda x, y, z: x[:, None] * y, x, y, None, order=(0, 1))
        assert torch.equal(both.full_tensor(), small[:, None] * large)
        assert labels.run(pattern, lambda x, y, z: z, small, large, None) is None
        # addends are added up where they are wanted
        p = st.ShardTensor.from_local(large, mesh, [Partial()])
        doubled = labels.run("a b, a -> a b", lambda x, y: x * y[:, None], p, x)
        assert doubled.placements == (Shard(0),)
        assert torch.equal(doubled.full_tensor(), 2 * large * small[:, None])
        # what comes together need not be a sum
        w = st.distribute_tensor(_numbers(5, 4), mesh, [Shard(1)])
        best = _best(w, x)
        assert torch.equal(best.full_tensor(), (_numbers(5, 4) * small).amax(-1))

    st.simulate(2, run)


def test_a_result_cannot_be_cut_along_a_label_twice():
    def run():
        x = st.distribute_tensor(_numbers(4, 6), T.make_mesh((2,)), [Shard(1)])
        with pytest.raises(ValueError, match="give the operand twice, with two labels"):
            labels.run("n p -> p p", lambda a: a.mT @ a, x)
        both = labels.run("n p, n q -> p q", lambda a, b: a.mT @ b, x, x)
        whole = labels.run("n P -> P P", lambda a: a.mT @ a, x)
        for y in (both, whole):
            T.same(y, _numbers(4, 6).mT @ _numbers(4, 6), "products")

    st.simulate(2, run)
