"""Draws: alike on replicas, independent on shards, of the distribution that was asked for."""

import torch
from torch.distributed.tensor import Replicate, Shard
from torch.nn import functional as F

import shardtensor as st
from shardtensor.ranks.testing import make_mesh

ROWS = (Shard(0),)


def drawn(draw, placements=ROWS, mesh_shape=(2,), shape=(400, 50), fill=torch.zeros):
    def run():
        torch.manual_seed(3)
        x = st.distribute_tensor(fill(shape), make_mesh(mesh_shape), list(placements))
        y = draw(x)
        return y.to_local(), y.full_tensor(), y.spec

    return st.simulate(torch.Size(mesh_shape).numel(), run)


def test_normal_of_means_and_deviations():
    for draw in (lambda x: torch.normal(x + 2, 3.0), lambda x: torch.normal(2.0, x + 3)):
        (a, whole, _), (b, _, _) = drawn(draw)
        assert not torch.equal(a, b)
        assert abs(whole.mean() - 2) < 0.1 and abs(whole.std() - 3) < 0.1


def test_normal_broadcasts_a_plain_deviation():
    (_, whole, spec), _ = drawn(lambda x: torch.normal(x, torch.arange(1.0, 51.0)))
    assert spec.dims[0].sizes == (200, 200)
    assert torch.allclose(whole.std(0), torch.arange(1.0, 51.0), rtol=0.2)


def test_rrelu():
    (a, whole, _), (b, _, _) = drawn(lambda x: F.rrelu(x - 1, 0.1, 0.3, training=True))
    assert not torch.equal(a, b)
    assert whole.min() >= -0.3 and whole.max() <= -0.1 and abs(whole.mean() + 0.2) < 0.01
    (_, whole, _), _ = drawn(lambda x: F.rrelu(x - 1, 0.1, 0.3))
    assert torch.allclose(whole, torch.tensor(-0.2))


def test_multinomial():
    weights = torch.tensor([0.0, 1.0, 3.0])
    for dim in (0, 1):
        (_, whole, spec), _ = drawn(
            lambda x: torch.multinomial(x, 50, replacement=True),
            [Shard(dim)],
            shape=(400, 3),
            fill=lambda shape: weights.expand(shape).clone(),
        )
        assert spec.dims[0].sizes == (200, 200) and whole.shape == (400, 50)
        assert whole.min() == 1 and abs((whole == 2).double().mean() - 0.75) < 0.02
    (_, whole, _), (_, other, _) = drawn(
        lambda x: torch.multinomial(x, 3), shape=(3,), fill=torch.ones
    )
    assert whole.sort().values.tolist() == [0, 1, 2] and torch.equal(whole, other)


def test_replicas_draw_alike():
    found = drawn(lambda x: torch.normal(x, 1.0), [Shard(0), Replicate()], (2, 2))
    assert torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][0], found[2][0])
