"""Large results that would be whole on every rank are cut along what is left, and right."""

import pytest
import torch
import torch.nn.functional as F
from drawn import drawn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import cache
from shardtensor import testing as T
from shardtensor._torch.world import silent_world
from shardtensor.ranks.measure import peak_bytes
from shardtensor.ranks.testing import make_mesh
from shardtensor.spec import Spec
from shardtensor.tensor import recut, wrap

D = torch.float64
CUTS = [(2, 1, 1, 1), (0, 3, 0, 2), (5,), (1, 4)]


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Every result is large."""
    cache.clear()
    monkeypatch.setattr(recut, "WHOLE", 1)
    yield
    cache.clear()


REDUCED = {
    "sum": lambda x: x.sum(0),
    "mean kept": lambda x: x.mean(0, keepdim=True),
    "amax": lambda x: x.amax(0),
    "amin of two": lambda x: x.amin((0, 2)),
    "max": lambda x: x.max(0),
    "argmin": lambda x: x.argmin(0),
    "prod": lambda x: x.prod(0),
    "logsumexp": lambda x: x.logsumexp(0),
    "var_mean": lambda x: torch.var_mean(x, 0),
    "norm": lambda x: x.norm(dim=0),
    "largest": lambda x: torch.linalg.vector_norm(x, float("inf"), 0),
    "any": lambda x: (x > 1).any(0),
    "select": lambda x: x[3] * x.select(0, -1),
    "unbind": lambda x: x.unbind(0)[2:4],
    "squeeze": lambda x: x[1:2].squeeze(0),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", REDUCED)
def test_what_is_left_is_cut(name, cut):
    T.hold(REDUCED[name], [drawn(5, 8, 6)], [T.shard(0, cut)], (len(cut),))


@pytest.mark.parametrize("name", sorted(REDUCED.keys() - {"amin of two"}))
def test_no_rank_has_it_whole(name):
    with silent_world(1, 4):
        x = wrap(drawn(2, 8, 6), Spec.of(make_mesh((4,)), [Shard(0)], (8, 8, 6)))
        for y in T.tensors(REDUCED[name](x)):
            assert y._spec.varying and y._local.numel() == y.numel() // 4


def test_two_axes():
    def run(x):
        return x.amax((0, 1)), x.select(0, 3).sum(0), x.max(1)[0]

    T.hold(run, [drawn(4, 4, 6, 8)], [T.On([Shard(0), Shard(1)])], (2, 2))
    T.hold(run, [drawn(4, 4, 6, 8)], [T.On([Shard(0), Shard(0)])], (2, 2))


def test_a_row_is_written_through():
    def run(x):
        y = x * 1
        y[3].mul_(2)
        y.select(0, 1).copy_(y.select(0, 4))
        y[2] += y[0]
        row = y[4]
        row.add_(1)
        return y, row, y.sum()

    for cut in CUTS:
        T.hold(run, [drawn(5, 8, 6)], [T.shard(0, cut)], (len(cut),))


PRODUCTS = {
    # features are cut, and their addends would be large
    "linear": (F.linear, [drawn(3, 9, 8), drawn(7, 8), drawn(7)], [T.shard(2), None, None]),
    "matmul": (torch.matmul, [drawn(3, 9, 8), drawn(8, 5)], [T.shard(2), None]),
    "of a view": (lambda x, w: x.mT @ w, [drawn(3, 8, 9), drawn(8, 5)], [T.shard(1), None]),
    "both": (torch.matmul, [drawn(3, 9, 8), drawn(3, 8, 9)], [T.shard(2), T.shard(1)]),
    # queries are cut along one label, and keys along another
    "scores": (
        lambda q, k: torch.einsum("b h i d, b h j d -> b h i j".replace(" ", ""), q, k),
        [drawn(8, 2, 5, 3), drawn(8, 2, 6, 3)],
        [T.shard(2), T.shard(2)],
    ),
    "bmm": (torch.bmm, [drawn(8, 5, 4), drawn(8, 4, 6)], [T.shard(1), T.shard(2)]),
    "few heads": (torch.matmul, [drawn(3, 5, 4), drawn(3, 4, 6)], [T.shard(1), T.shard(2)]),
}


def test_what_is_less_to_gather_is_gathered():
    with silent_world(1, 4), st.trace() as t:
        mesh = make_mesh((4,))
        x = wrap(drawn(4, 8, 6), Spec.of(mesh, [Shard(0)], (16, 8, 6)))
        y = wrap(drawn(2, 6), Spec.of(mesh, [Shard(0)], (8, 6)))
        assert (x + y)._spec == x._spec
    assert {s.collective for s in t.sent} == {"all_gather"}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name, ranks):
    fn, operands, places = PRODUCTS[name]
    T.hold(fn, operands, places, (ranks,))


def test_products_over_two_axes():
    fn, operands, _ = PRODUCTS["linear"]
    T.hold(fn, operands, [T.On([Shard(2), Shard(1)]), None, None], (2, 2))
    T.hold(fn, operands, [T.On([Shard(2), Shard(2)]), None, None], (2, 2))
    fn, operands, _ = PRODUCTS["scores"]
    T.hold(fn, operands, [T.On([Shard(2), Shard(0)]), T.On([Shard(0), Shard(2)])], (2, 2))
    T.hold(fn, operands, [T.On([Shard(1), Shard(2)])] * 2, (2, 2))


def windows(x):
    """Attention's grid: 2 windows on 4 ranks."""
    y = (x.view(3, 2, 6, 5).transpose(1, 2) * 2).contiguous()
    return y.transpose(1, 2).reshape(3, 12, 5)


def test_what_windows_left_lopsided():
    for cut in ([3, 3, 3, 3], [1, 5, 6, 0]):
        T.hold(windows, [drawn(3, 12, 5)], [T.shard(1, cut)], (4,))
    cache.clear()
    with silent_world(3, 4):
        x = wrap(drawn(3, 3, 5), Spec.of(make_mesh((4,)), [Shard(1)], (3, 12, 5)))
        assert list(windows(x)._spec.dims[1].sizes) == [3, 3, 3, 3]


# a shape, its cut dim, what takes it elsewhere and which dim is cut then
FEW = {
    # 2 windows of 8 rows on 4 ranks: the rows are
    "split": ((3, 16, 8), 1, lambda x: x.view(3, 2, 8, 8), 2),
    # by samples, of which there are as many
    "split, samples": ((4, 12, 8), 1, lambda x: x.view(4, 2, 6, 8), 0),
    # 2 levels beside rows
    "merge": ((1, 2, 10, 8), 2, lambda x: x.reshape(1, 20, 8), 1),
    "merge, samples": ((8, 2, 10, 3), 2, lambda x: x.view(8, 20, 3), 0),
    "merge of three": ((1, 3, 4, 8, 4), 3, lambda x: x.flatten(1, 3), 1),
    "both": ((1, 2, 12, 8), 2, lambda x: x.view(1, 3, 8, 8), 2),
    # neither part has rows for all
    "windows": ((1, 4, 16, 4), 1, lambda x: x.view(1, 2, 2, 8, 2, 4), 3),
    "windows and back": ((1, 4, 16, 4), 1, lambda x: x.view(1, 2, 2, 8, 2, 4).view(1, 4, 16, 4), 2),
}


@pytest.mark.parametrize("name", FEW)
def test_few_rows_in_front_leave_no_rank_without(name):
    shape, dim, fn, cut = FEW[name]
    x = drawn(*shape)
    for sizes in (None, [0, shape[dim] - 2, 1, 1]):
        T.hold(lambda x: fn(x * 2).sin(), [x], [T.shard(dim, sizes)], (4,))
    cache.clear()
    with silent_world(2, 4):
        spec = Spec.of(make_mesh((4,)), [Shard(dim)], shape)
        y = fn(wrap(torch.zeros(spec.local_shape), spec))
        assert [i for i, d in enumerate(y._spec.dims) if d.axes] == [cut]
        # all have a share, or nearly
        assert max(y._spec.dims[cut].sizes) <= 1.25 * y.shape[cut] / 4


def test_few_rows_in_front_on_two_axes():
    x = drawn(3, 12, 8, 8)
    for on in ([Shard(1), Shard(2)], [Shard(2), Shard(1)], [Shard(1), Shard(1)]):
        T.hold(lambda x: x.view(3, 1, 12, 1, 8, 8) * 2, [x], [T.On(on)], (2, 2))
        T.hold(lambda x: x.view(3, 2, 6, 64) * 2, [x], [T.On(on)], (2, 2))
        T.hold(lambda x: x.transpose(1, 3).reshape(3, 2, 32, 12) * 2, [x], [T.On(on)], (2, 2))


def test_a_view_that_went_around_is_one():
    """What is written to its base later is not read from it, as of every view that moved."""

    def run(x):
        y = x * 1
        z = y.view(3, 2, 6, 8)
        y.mul_(2)
        return z

    with pytest.raises(st.RankError, match="view"):
        T.hold(run, [drawn(3, 12, 8)], [T.shard(1)], (4,))


PEAKS = {
    # of 8 ranks, in shares of what the op reads; the second: of the result whole, at least
    "amax": (lambda x: x.view(8, 256, 512).amax(0), 3.5),
    "select": (lambda x: x.view(8, 256, 512)[5], 1.5),
    "linear": (lambda x: F.linear(x.view(8, 256, 512).transpose(0, 2), torch.ones(8, 8)), 3.5),
}


@pytest.mark.parametrize("name", PEAKS)
def test_peaks(name):
    fn, most = PEAKS[name]
    with silent_world(4, 8), torch.no_grad():
        spec = Spec.of(make_mesh((8,)), [Shard(0)], (8 * 256, 512))
        x = wrap(torch.ones(spec.local_shape), spec)
        fn(x)
        assert peak_bytes(lambda: fn(x)) <= most * x._local.nbytes


def test_results_of_their_usual_size_stay(monkeypatch):
    monkeypatch.setattr(recut, "WHOLE", 2**18)
    cache.clear()
    with silent_world(0, 4), st.trace() as t:
        x = wrap(drawn(2, 8, 6), Spec.of(make_mesh((4,)), [Shard(0)], (8, 8, 6)))
        for y in (x.sum(0), x.amax(0), x[5]):
            assert not y._spec.varying
    assert "swap" not in {s.collective for s in t.sent}
