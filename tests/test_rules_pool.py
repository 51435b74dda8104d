"""Padding and pooling over sharded dims against plain torch."""

import pytest
import torch
from cases import CASES
from torch import nn
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor._torch.world import silent_world
from shardtensor.ranks.measure import peak_bytes
from shardtensor.ranks.testing import make_mesh
from shardtensor.rules import flat, overlap
from shardtensor.spec import Spec
from shardtensor.tensor import wrap

torch.manual_seed(0)
D = torch.float64
x = torch.randn(2, 3, 9, 8, dtype=D)
LAYOUTS = [
    ([Shard(2), Shard(3)], {2: (5, 4), 3: (1, 7)}), ([Shard(2), Shard(2)], {2: (3, 0, 5, 1)}),
    ([Shard(0), Shard(2)], None), ([Replicate(), Shard(3)], None), ([Shard(3), Shard(2)], None),
]  # fmt: skip


def test_ties_and_nan():
    tied = torch.zeros(1, 1, 8, 4, dtype=D)
    T.hold(nn.MaxPool2d(3, 2, 1, return_indices=True), [tied], [T.shard(2)], (3,))
    T.hold(nn.AdaptiveMaxPool2d(1), [tied], [T.shard(2)], (2,))
    tied[0, 0, 3, 1] = float("nan")
    tied[0, 0, 6, 2] = float("nan")
    for m in (nn.MaxPool2d(3, 2, 1, return_indices=True), nn.AdaptiveMaxPool2d(1, True),
              nn.AdaptiveMaxPool2d((3, 1), True)):  # fmt: skip
        T.hold(m, [tied], [T.shard(2)], (3,), grad=False)
        T.hold(m, [tied], [T.On([Shard(3), Shard(2)])], (2, 2), grad=False)
    low = torch.full((1, 1, 9, 9), float("-inf"), dtype=D)
    for m in (nn.MaxPool2d(3, 2, 1, return_indices=True), nn.AdaptiveMaxPool2d((2, 5), True),
              nn.MaxPool2d(2, 1, 1, 2, return_indices=True)):  # fmt: skip
        T.hold(m, [low], [T.On([Shard(2), Shard(3)])], (2, 2), grad=False)


@pytest.mark.parametrize("cut", [(1, 1), (0, 1, 1)])
def test_a_row_of_a_volume_without_a_batch(cut):
    """It looks like images with the channels last, which torch does not take for a volume."""

    def pooled(a, b):
        x = torch.einsum("abc,z->azbc", a, b)
        return nn.MaxUnpool3d(1)(*nn.MaxPool3d(1, return_indices=True)(x))

    T.hold(
        pooled,
        [torch.randn(4, 3, 2).double(), torch.randn(2).double()],
        [None, T.shard(0, cut)],
        (len(cut),),
    )


def _to_nothing(pool, x):
    y = pool(x)
    (y.sum() + x.sum()).backward()
    return T.full(y).shape, T.full(x.grad)


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d((0, 2)), nn.AdaptiveMaxPool2d((1, 0))])
def test_adaptive_pooling_to_nothing(pool, dim):
    """Torch raises in backward; here ranks without rows would go on."""

    def run():
        y = st.distribute_tensor(x, make_mesh((4,)), [Shard(dim)], src_data_rank=None)
        return _to_nothing(pool, y.requires_grad_())

    for shape, grad in st.simulate(4, run):
        assert shape == pool(x).shape and torch.equal(grad, torch.ones_like(x))


def test_dtypes():
    whole, half = torch.randint(-50, 50, (2, 3, 9, 8)), (x * 2e4).half()
    for m in (nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1, False, False), nn.MaxPool2d(3, 2, 1)):
        T.hold(m, [whole], [T.shard(2)], (3,), grad=False)
        T.hold(m, [half], [T.shard(2)], (3,), rtol=2e-3)
    for m in (nn.AdaptiveAvgPool2d(2), nn.AdaptiveAvgPool2d((5, 3)), nn.AdaptiveMaxPool2d(4)):
        T.hold(m, [half], [T.shard(2)], (3,), rtol=2e-3)
        T.hold(m, [x.float()], [T.shard(2)], (3,))


def twice(a, op):
    y = a.sin()
    (g,) = torch.autograd.grad(op(y).square().sum(), y, create_graph=True)
    return g.square()


def test_double_backward():
    for op in (nn.AvgPool2d(3, 2, 1, True), nn.AdaptiveAvgPool2d((2, 5)), nn.AdaptiveMaxPool2d(5),
               nn.MaxPool2d(3, 2, 1)):  # fmt: skip
        T.hold(twice, [x, op], [T.shard(2, (4, 0, 5)), None], (3,))


def compiled(module):
    s = st.distribute_tensor(x.float(), T.make_mesh((2,)), [Shard(2)]).requires_grad_()
    found = []
    for run in (st.compile(module, backend="aot_eager", fullgraph=True), module):
        out = run(s)
        out = out[0] if isinstance(out, tuple) else out
        out.square().sum().backward()
        found.append((out.full_tensor(), s.grad.full_tensor()))
        s.grad = None
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["max 3", "avg ceil inside", "thirds", "odd", "mean", "max odd"])
def test_compiled(name):
    st.simulate(2, compiled, CASES[f"pool: {name}"].fn)


def costs(module):
    mesh = T.make_mesh((2,))
    s = st.distribute_tensor(torch.randn(2, 3, 16, 8), mesh, [Shard(2)])
    with st.trace() as t:
        module(s)
    return t.bytes


def test_what_is_sent():
    assert st.simulate(2, costs, nn.MaxPool2d(2)) == [0, 0]
    assert st.simulate(2, costs, nn.ZeroPad2d(3)) == [0, 0]
    row = 2 * 3 * 8 * 4
    assert sum(st.simulate(2, costs, nn.MaxPool2d(3, 2, 1))) == row
    # the mean of (B, C) there and back
    assert st.simulate(2, costs, nn.AdaptiveAvgPool2d(1)) == [24, 24]
    # the middle bin of three, as sums; a value and a position of 8 bytes for each candidate
    assert sum(st.simulate(2, costs, nn.AdaptiveAvgPool2d((3, 1)))) == 24
    assert sum(st.simulate(2, costs, nn.AdaptiveMaxPool2d((3, 1)))) == 3 * 24
    assert st.simulate(2, costs, nn.AdaptiveMaxPool2d(1)) == [3 * 24, 3 * 24]


@pytest.fixture(params=[0, 2**30], ids=["strips", "windows"])
def strips_from(request, monkeypatch):
    monkeypatch.setattr(overlap, "WORTH", request.param)


@pytest.mark.parametrize("cut", [(5, 4), (1, 0, 6, 2), (3, 4, 2)])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_places_of_what_is_largest(n, cut, strips_from):
    """Of windows that begin before the first row, too, and hold nothing above the fill."""
    a = torch.randn(2, *[9, 5, 4][:n], dtype=D)
    a[0] = float("-inf")
    pool = getattr(nn, f"MaxPool{n}d")
    for m in (pool(3, 2, 1, return_indices=True), pool(2, 1, 1, 2, return_indices=True)):
        T.hold(m, [a], [T.shard(1, cut)], (len(cut),))


@pytest.mark.parametrize(("n", "large"), [(2, 2**18), (3, 0)])
def test_places_of_what_is_largest_along_other_dims(n, large, monkeypatch, strips_from):
    monkeypatch.setattr(flat, "_LARGE", large)
    a = torch.randn(2, *[4, 7, 9][-n:], dtype=D)
    a[0] = float("-inf")
    pool = getattr(nn, f"MaxPool{n}d")
    for m in (pool(3, 2, 1, return_indices=True), pool(2, 1, 1, 2, return_indices=True)):
        for places, mesh in (
            (T.shard(n, (5, 0, 4)), (3,)),
            (T.On([Shard(n), Shard(n - 1)], {n: (2, 7), n - 1: (4, a.shape[n - 1] - 4)}), (2, 2)),
            (T.On([Shard(n - 1), Shard(n - 1)]), (2, 2)),
        ):
            T.hold(m, [a], [places], mesh)


@pytest.mark.parametrize("dim", [2, 3])
def test_places_take_no_memory_beside_them(dim, monkeypatch):
    monkeypatch.setattr(flat, "_LARGE", 0)
    monkeypatch.setattr(overlap, "WORTH", 0)
    with silent_world(4, 8):
        shape = [1, 16, 128, 128]
        shape[dim] *= 8
        spec = Spec.of(make_mesh((8,)), [Shard(dim)], tuple(shape))
        a = wrap(torch.randn(spec.local_shape), spec)
        pool = nn.MaxPool2d(3, 1, 1, return_indices=True)
        # of the largest, their places in 8 bytes, and the gradient
        assert peak_bytes(lambda: pool(a)) < 3.6 * a._local.nbytes
        a.requires_grad_()
        assert peak_bytes(lambda: pool(a)[0].sum().backward()) < 4.5 * a._local.nbytes
