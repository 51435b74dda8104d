"""Orders of points by their definitions; partitions that shard and restore."""

import importlib
import itertools

import pytest
import torch
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import points as P
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64
ORDERS = ["hilbert", "morton", "kd"]


def cells(bits, dims):
    return torch.cartesian_prod(*[torch.arange(2**bits)] * dims).reshape(-1, dims)


@pytest.mark.parametrize("bits, dims", [(1, 2), (4, 2), (5, 2), (1, 3), (3, 3), (4, 3)])
def test_hilbert_is_a_continuous_curve(bits, dims):
    """Every cell once, each beside the one before; so too the 2**dims parts of each part."""
    x = cells(bits, dims)
    x = x[torch.randperm(len(x))]
    path = x[P.hilbert_order(x.to(D), bits)]
    assert torch.equal(path.unique(dim=0), x.unique(dim=0))
    assert ((path[1:] - path[:-1]).abs().sum(1) == 1).all()
    for level in range(bits):
        parts = (path >> level).reshape(-1, 2 ** (level * dims), dims)
        assert (parts == parts[:, :1]).all()
    assert torch.equal(path[0], torch.zeros(dims, dtype=torch.int64))


@pytest.mark.parametrize("bits, dims", [(4, 2), (3, 3), (2, 4), (5, 1)])
def test_morton_interleaves_bits(bits, dims):
    x = cells(bits, dims)
    x = x[torch.randperm(len(x))]

    def key(row):
        return int(
            "".join("".join(c) for c in zip(*(f"{v:0{bits}b}" for v in row), strict=True)), 2
        )

    want = sorted(range(len(x)), key=lambda i: key(x[i].tolist()))
    assert P.morton_order(x.to(D), bits).tolist() == want


def test_fine_and_flat_clouds():
    x = torch.rand(500, 3, dtype=D)
    for order in (P.hilbert_order, P.morton_order):
        # 21 bits tell all of them apart, and a shift or a scale changes nothing
        assert torch.equal(order(x), order(x * 4 + 1))
        same = torch.ones(6, 2, dtype=D)
        assert order(same).tolist() == [0, 1, 2, 3, 4, 5]
        assert order(x[:0]).shape == (0,)
        step = x[order(x)].diff(dim=0).norm(dim=1).mean()
        assert step < 0.4 * x.diff(dim=0).norm(dim=1).mean()


@pytest.mark.parametrize("n, parts", [(17, 1), (17, 4), (23, 5), (12, 7), (3, 5), (0, 3)])
def test_kd(n, parts):
    x = torch.randn(n, 3, dtype=D) * torch.tensor([1.0, 3.0, 2.0])
    order = P.kd_order(x, parts)
    assert order.sort().values.tolist() == list(range(n))
    found = P.partition(x, None, "kd", axes=()) if parts == 1 else None
    assert found is None or found.sizes == (n,)
    sizes = [n // parts + (i < n % parts) for i in range(parts)]
    leaves = x[order].split(sizes)

    def split(first, stop):
        """Each split leaves smaller coordinates left, along the widest axis."""
        if stop - first == 1:
            return
        half = first + (stop - first) // 2
        here = torch.cat(leaves[first:stop])
        if len(here):
            axis = (here.amax(0) - here.amin(0)).argmax()
            left, right = torch.cat(leaves[first:half]), torch.cat(leaves[half:stop])
            if len(left) and len(right):
                assert left[:, axis].max() <= right[:, axis].min()
        split(first, half)
        split(half, stop)

    split(0, parts)


def cloud(order, weighted, shape):
    x = torch.randn(29, 3, dtype=D)
    w = torch.rand(29, dtype=D) * (x[:, 0] > 0) * 5 + 0.1 if weighted else None
    mesh = T.make_mesh(shape)
    part = P.partition(x, mesh, order, w)
    n = len(part.sizes)
    assert sum(part.sizes) == 29
    assert part.order[part.inverse].tolist() == list(range(29))
    if w is None:
        assert max(part.sizes) - min(part.sizes) <= 1
        want = {"hilbert": P.hilbert_order(x), "morton": P.morton_order(x), "kd": P.kd_order(x, n)}
        assert torch.equal(part.order, want[order])
    else:
        # a cut is off by at most half a point; a box of the tree by that for each level
        loads = torch.stack([s.sum() for s in w[part.order].split(part.sizes)])
        assert (loads - w.sum() / n).abs().max() <= w.max() * (2 if order == "kd" else 1)
        assert len(set(part.sizes)) > 1
    with st.trace() as t:
        y = part.shard(x)
    assert not t.bytes and y.spec.dims[0].sizes == part.sizes
    T.same(y, x[part.order], "shard")
    with st.trace() as t:
        back = part.restore(y)
    T.same(back, x, "restore")
    # at most the rows of this rank, their numbers, and how many they are
    assert t.bytes <= 30 * 4 * 8 + n * 8 and not any(s.collective == "all_gather" for s in t.sent)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_partition(order, weighted):
    for shape in ((2,), (3,), (4,), (2, 2)):
        n = torch.Size(shape).numel()
        st.simulate(n, cloud, order, weighted, shape)


def round_trip(x, f):
    """In the order of a partition and back: a function of every row, in the end."""
    cloud = torch.randn(11, 2, dtype=D, generator=torch.Generator().manual_seed(1))
    if not isinstance(x, st.ShardTensor):
        order = P.hilbert_order(cloud)
        return (x * f)[order], x * f
    part = P.partition(cloud, x.device_mesh, axes=x.spec.dims[0].axes)
    y = part.shard(x) * part.shard(f)
    return y, part.restore(y)


@pytest.mark.parametrize("cut", T.cuts(11))
def test_gradients(cut):
    x, f = torch.randn(11, 4, dtype=D), torch.randn(11, 1, dtype=D)
    T.hold(round_trip, [x, f], [T.shard(0, cut), None], (len(cut),))


def test_gradients_on_meshes():
    x, f = torch.randn(11, 4, dtype=D), torch.randn(11, 1, dtype=D)
    for a, b in itertools.product([[Shard(0)] * 2, [Shard(0), Shard(1)]], [None, [Shard(0)] * 2]):
        if b is None or a == b:
            T.hold(round_trip, [x, f], [T.On(a), b and T.On(b)], (2, 2))


def test_one_axis_and_mistakes():
    def on_rank():
        x = torch.randn(9, 3)
        mesh = T.make_mesh((2, 2))
        part = P.partition(x, mesh, axes=[1])
        assert part.sizes == (5, 4) and part.shard(x).spec.varying == (1,)
        with pytest.raises(ValueError, match="order"):
            P.partition(x, mesh, "peano")
        with pytest.raises(ValueError, match="full_tensor"):
            P.partition(part.shard(x), mesh)
        with pytest.raises(ValueError, match="9 points"):
            part.shard(x[:8])
        with pytest.raises(ValueError, match="weights"):
            P.partition(x, mesh, weights=x)
        with pytest.raises(ValueError, match="axes"):
            P.partition(x, mesh, axes=[3])
        return True

    assert all(st.simulate(4, on_rank))


@pytest.mark.parametrize("curve", ["hilbert", "morton"])
@pytest.mark.parametrize("n", [8, 101])
def test_ranks_share_out_a_curve(curve, n, monkeypatch):
    module = importlib.import_module("shardtensor.ops.points.partition")
    monkeypatch.setattr(module, "SHARED", 8)
    # points of one cell keep their order
    x = torch.randint(4, (n, 2), generator=torch.Generator().manual_seed(0)).to(D)
    want = getattr(P, f"{curve}_order")(x)

    def run():
        alike = P.partition(x, T.make_mesh((2, 2)), order=curve)
        one = P.partition(x, T.make_mesh((2, 2)), order=curve, axes=[1])
        return alike.order, alike.inverse, one.order

    for order, inverse, one in st.simulate(4, run):
        assert torch.equal(order, want) and torch.equal(one, want)
        assert torch.equal(inverse[want], torch.arange(n))
