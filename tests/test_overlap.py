"""Stencils whose halo travels while the interior is computed: against plain torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.utils.checkpoint import checkpoint

import shardtensor as st
from shardtensor import testing as T
from shardtensor.ranks.measure import saved_bytes
from shardtensor.rules import overlap, sliding
from shardtensor.rules.conv import halo
from shardtensor.rules.images import pool, pool_strips

D = torch.float64


@pytest.fixture
def taken(in_flight):
    """The calls that overlap."""
    return in_flight(overlap._Begin, pool_strips._Pool)


def max_pool(*args, **kwargs):
    return lambda x: F.max_pool2d(x, *args, **kwargs)


def avg_pool(*args, **kwargs):
    return lambda x: F.avg_pool2d(x, *args, **kwargs)


POOLS = {
    "max 3": max_pool(3, 1, 1),
    "max 3 by 2": max_pool(3, 2, 1),
    "max 5 dilated": max_pool((3, 2), 2, (1, 0), dilation=2),
    "max 3 dilated": max_pool(3, 1, 1, dilation=2),
    "max 2 by 3": max_pool(2, 3, ceil_mode=True),
    "avg 3": avg_pool(3, 1, 1),
    "avg 3 by 2": avg_pool(3, 2, 1, count_include_pad=False, ceil_mode=True),
    "avg 5": avg_pool(5, 2, 2, divisor_override=7),
    "avg 3, no padding": avg_pool(3, 1),
}


@pytest.mark.parametrize("cut", [(12,), (6, 6), (3, 9), (1, 10, 0, 1), (4, 0, 8), (5, 2, 2, 3)])
@pytest.mark.parametrize("name", POOLS)
def test_pools(name, cut, taken):
    x = torch.randn(2, 3, 12, 7, dtype=D)
    T.hold(POOLS[name], [x], [T.shard(2, cut)], (len(cut),))
    if name == "max 3" and len(cut) > 1 and 0 not in cut:
        assert len(taken) >= len(cut)


@pytest.mark.parametrize("name", ["max 3", "avg 3 by 2"])
def test_two_axes_and_the_last_dim(name, taken):
    x = torch.randn(2, 3, 9, 8, dtype=D)
    T.hold(POOLS[name], [x], [T.On([Shard(2), Shard(3)], {2: (5, 4), 3: (1, 7)})], (2, 2))
    T.hold(POOLS[name], [x], [T.shard(3, (2, 3, 3))], (3,))
    T.hold(POOLS[name], [x], [T.On([Shard(2), Shard(2)], {2: (3, 2, 0, 4)})], (2, 2))
    assert taken


@pytest.fixture
def twice(monkeypatch):
    """What is overlapped along two dims."""
    calls = []

    def counted(plain, both):
        return lambda *args: (both(args) and calls.append(1)) or plain(*args)

    monkeypatch.setattr(overlap, "WORTH", 0)
    stencils = counted(sliding.overlapped_twice, lambda args: True)
    monkeypatch.setattr(sliding, "overlapped_twice", stencils)
    pools = counted(pool.pool_strips, lambda args: len(args[1].sides) > 1)
    monkeypatch.setattr(pool, "pool_strips", pools)
    return calls


TWO = [
    ((2, 2), {2: (6, 6), 3: (5, 7)}),
    ((3, 2), {2: (4, 0, 8), 3: (1, 11)}),
    ((2, 3), {3: (6, 6), 2: (5, 2, 5)}),
]


@pytest.mark.parametrize("mesh, cut", TWO)
@pytest.mark.parametrize("name", [*POOLS, "lp"])
def test_pools_along_two_dims(name, mesh, cut, twice):
    """Corners come with what travels along the second; a rank may have no interior, or no rows."""
    pool = POOLS.get(name) or (lambda x: F.lp_pool2d(x.abs() + 1, 2, 3, 1))
    x = torch.randn(2, 3, 12, 12, dtype=D, generator=torch.Generator().manual_seed(0))
    place = T.On([Shard(d) for d in cut], cut)
    T.hold(pool, [x], [place], mesh)
    T.hold(pool, [x.contiguous(memory_format=torch.channels_last)], [place], mesh)
    # of kernels that begin where shards do nothing travels along a dim; the largest of shards that
    # are empty or smaller than a kernel are those of a copy, and of which more is read than is padded
    assert (
        twice
        or name in ("max 2 by 3", "max 3 dilated", "max 5 dilated")
        or ("max" in name and mesh != (2, 2))
    )


@pytest.mark.parametrize("mesh, cut", TWO)
def test_pools_along_two_dims_derived_twice_and_written_to(mesh, cut, twice):
    g = torch.Generator().manual_seed(0)
    x, place = torch.randn(1, 2, 12, 12, dtype=D, generator=g), T.On([Shard(d) for d in cut], cut)

    def penalty(x):
        (g,) = torch.autograd.grad(POOLS["max 3"](x * x).sum(), x, create_graph=True)
        return g.square() * F.max_pool2d(x, 3, 1, 1).mul_(x)

    T.hold(penalty, [x], [place], mesh)
    T.hold(lambda x: F.avg_pool2d(x, 3, 2).relu_(), [x], [place], mesh)
    T.hold(lambda x: F.avg_pool3d(x.unsqueeze(1), (2, 3, 3), 1, (0, 1, 1)), [x], [place], mesh)
    assert twice


def cost_of_two(pool):
    x = st.distribute_tensor(torch.randn(1, 2, 40, 64), T.make_mesh((2, 2)), [Shard(2), Shard(3)])
    x.requires_grad_()
    own, kept = x._local.untyped_storage().data_ptr(), {}

    def pack(t):
        storage = getattr(t, "_local", t).untyped_storage()
        if storage.data_ptr() != own and t.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), st.trace() as t:
        y = pool(x)
    with st.trace() as back:
        y.sum().backward()
    sent = [[s.bytes for s in of.sent if s.collective == "halo"] for of in (t, back)]
    return sent, sum(kept.values())


@pytest.mark.parametrize("name", ["max 3", "avg 3"])
def test_what_is_sent_and_kept_along_two_dims(name, twice):
    """A row, and a column with its ends, each way; beside the shard three of each by the rims."""
    row, column = 4 * 2 * 32, 4 * 2 * 22
    for (there, back), kept in st.simulate(4, cost_of_two, POOLS[name]):
        assert (there, back) == ([row, column], [column, row])
        # the window was a copy of the shard with two rows and columns more
        assert kept == 3 * (row + column) < 4 * 2 * 22 * 34 // 4
    assert len(twice) == 4


CONVS = {
    "3 by 2": dict(kernel_size=3, stride=2, padding=1),
    "4 by 2": dict(kernel_size=4, stride=2, padding=1),
    "3, no padding": dict(kernel_size=3),
    "5 dilated": dict(kernel_size=(5, 3), padding=(4, 1), dilation=2, stride=(2, 3)),
    "same": dict(kernel_size=(2, 3), padding="same", groups=3),
}


@pytest.mark.parametrize("cut", [(12,), (6, 6), (3, 9), (1, 10, 0, 1), (4, 0, 8), (5, 2, 2, 3)])
@pytest.mark.parametrize("name", CONVS)
def test_convs(name, cut, taken):
    conv = torch.nn.Conv2d(3, 6, dtype=D, **CONVS[name])
    T.hold(conv, [torch.randn(2, 3, 12, 7, dtype=D)], [T.shard(2, cut)], (len(cut),))
    if cut == (6, 6) and name in ("3, no padding", "same"):
        assert taken


@pytest.mark.parametrize("name", CONVS)
def test_convs_on_two_axes(name, taken):
    conv = torch.nn.Conv2d(3, 6, dtype=D, **CONVS[name])
    x = torch.randn(1, 3, 9, 11, dtype=D)
    T.hold(conv, [x], [T.On([Shard(2), Shard(3)], {2: (5, 4), 3: (3, 8)})], (2, 2))
    T.hold(conv, [x], [T.On([Shard(1), Shard(3)], {1: (1, 2), 3: (4, 7)})], (2, 2))
    T.hold(conv, [x], [T.On([Shard(2), Shard(2)], {2: (3, 2, 0, 4)})], (2, 2))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_rank_without_output_channels(channels, in_flight):
    """Its kernel would take no weight; all ranks go the other way."""
    taken = in_flight(halo._HaloConv)
    x, w = (torch.randn(*s, dtype=D) for s in ((2, 4, 8, 6), (channels, 4, 3, 3)))
    rows, columns = T.On([Shard(2), Replicate()]), T.On([Replicate(), Shard(0)])
    T.hold(lambda x, w: F.conv2d(x, w, padding=1), [x, w], [rows, columns], (2, 2))
    assert bool(taken) == (channels > 1)


@pytest.mark.parametrize("halo", [True, False])
def test_conv_on_two_axes_copies_one_halo(halo, monkeypatch):
    """The corners come with what travels along the second."""
    monkeypatch.setattr(overlap, "WORTH", 0 if halo else 2**30)

    def sent():
        x = st.distribute_tensor(
            torch.randn(1, 2, 8, 10), T.make_mesh((2, 2)), [Shard(2), Shard(3)]
        )
        conv = torch.nn.Conv2d(2, 2, 3, padding=1)
        with st.trace() as t:
            conv(x)
        return [(s.collective, s.bytes) for s in t.sent]

    name = "halo" if halo else "window"
    first, second = (name, 2 * 5 * 4), (name, 2 * 6 * 4)
    assert st.simulate(4, sent) == [[first, second]] * 4


def test_one_and_three_dims(taken):
    x = torch.randn(2, 3, 9, dtype=D)
    T.hold(lambda x: F.max_pool1d(x, 3, 1, 1), [x], [T.shard(2)], (3,))
    y = torch.randn(1, 2, 8, 5, 4, dtype=D)
    T.hold(lambda y: F.avg_pool3d(y, 3, 1, 1), [y], [T.shard(2, (3, 5))], (2,))
    T.hold(lambda y: F.max_pool3d(y, 3, 2, 1), [y], [T.shard(3)], (2,))
    assert taken


@pytest.mark.parametrize("name", ["max 3", "avg 3"])
def test_double_backward(name, taken):
    def penalty(x):
        (g,) = torch.autograd.grad(POOLS[name](x * x).square().sum(), x, create_graph=True)
        return g.square()

    T.hold(penalty, [torch.randn(1, 2, 8, 4, dtype=D)], [T.shard(2, (3, 5))], (2,))
    assert taken


@pytest.mark.parametrize("cut", [(2, 2), (0, 4), (2, 0, 2), (0, 1, 2, 1)])
@pytest.mark.parametrize("name", ["max 3", "avg 3", "avg 2", "conv"])
def test_a_constant_cotangent_twice(name, cut, taken):
    """Some ranks' gradients depend on no input then, but for what they exchange."""
    weight = torch.ones(2, 3, 3, 3, dtype=D)
    ops = {**POOLS, "avg 2": avg_pool(2, 1, 1), "conv": lambda x: F.conv2d(x, weight, padding=1)}

    def penalty(x):
        (g,) = torch.autograd.grad(ops[name](x).sum(), x, create_graph=True)
        return g.square() * x

    T.hold(penalty, [torch.randn(2, 3, 4, 5, dtype=D)], [T.shard(2, cut)], (len(cut),))
    # the largest of empty shards are those of a copy
    assert taken or cut == (2, 2) or name == "max 3"


def stem_pool(x):
    return F.max_pool2d(x, 3, 2, 1)


@pytest.mark.gloo
def test_processes():
    x = torch.randn(1, 16, 512, 256)
    T.hold(stem_pool, [x], [T.shard(2, (200, 312))], (2,), run=T.run_workers)


def cost(pool):
    x = st.distribute_tensor(torch.randn(1, 4, 40, 64), T.make_mesh((4,)), [Shard(2)])
    x.requires_grad_()
    with st.trace() as t:
        y = pool(x)
        kept = saved_bytes(lambda: pool(x))
    sent = [s for s in t.sent if s.collective in ("halo", "window")]
    with st.trace() as back:
        y.sum().backward()
    returned = [s.bytes for s in back.sent if s.collective in ("halo", "window_add")]
    return [(s.bytes, s.messages) for s in sent], kept, returned


@pytest.mark.parametrize("small", [True, False])
def test_what_is_sent_and_kept(small, monkeypatch):
    """A row each way, and no copy of the shard beside the halo's rows."""
    row = 4 * 64 * 4
    monkeypatch.setattr(overlap, "WORTH", 2**30 if small else 0)
    found = st.simulate(4, cost, POOLS["avg 3"])
    for rank, (sent, kept, back) in enumerate(found):
        n = 1 if rank in (0, 3) else 2
        assert sent == [(n * row, n)] * 2
        assert sum(back) == n * row
        # the window keeps a copy of 12 rows; else the 10 rows themselves and 3 beside each rim
        assert kept <= (12 if small else 10 + 6) * row


def several_times(x, w):
    """Gradients of gradients of gradients, beside the result: each exchange meets its own."""
    y = F.conv1d(x, w, stride=1).tanh()
    gx, gw = torch.autograd.grad(y.square().sum(), [x, w], create_graph=True)
    (again,) = torch.autograd.grad(gx.square().sum() + gw.square().sum(), x, create_graph=True)
    return y, gx, gw, again


@pytest.mark.parametrize("cut", [(8, 8), (4, 4, 4, 4), (1, 9, 6), (5, 0, 1, 10)])
@pytest.mark.parametrize("kernel", [2, 4])
def test_rows_of_one_neighbour_only(kernel, cut, taken):
    """Where a rank gets none, it sends gradients of any order all the same."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*s, dtype=D, generator=g) for s in ((2, 1, 16), (2, 1, kernel)))
    T.hold(several_times, [x, w], [T.shard(2, cut), None], (len(cut),))
    assert taken


IN_PLACE = {
    "conv": lambda x, w: F.relu_(F.conv2d(x, w, stride=2)),
    "conv, 2 taps": lambda x, w: F.conv2d(x, w[:, :, :2]).mul_(2).sigmoid_(),
    "max pool": lambda x, w: F.max_pool2d(x, 3, 2).add_(w.sum()),
    "avg pool": lambda x, w: F.avg_pool2d(x * x, 2, 1).exp_(),
}


@pytest.mark.parametrize("cut", [(6, 6), (4, 4, 4), (8, 0, 4)])
@pytest.mark.parametrize("name", IN_PLACE)
def test_a_result_is_written_to_where_no_rows_came(name, cut, taken):
    """Rows of the next rank only are read: the last one has its result as the others have."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*s, dtype=D, generator=g) for s in ((2, 1, 12, 5), (2, 1, 3, 3)))
    T.hold(IN_PLACE[name], [x, w], [T.shard(2, cut), None], (len(cut),))
    assert taken


def read_after_a_write(x):
    y = x * 1
    windows = y.unfold(0, 2, 1)
    y.add_(1)
    return windows * 2


@pytest.mark.parametrize("cut", [(6, 6), (1, 10, 0, 1), (5, 2, 2, 3)])
def test_windows_are_copies_on_all_ranks_or_none(cut, taken):
    x = torch.randn(12, 3, dtype=D, generator=torch.Generator().manual_seed(0))

    def run():
        s = st.distribute_tensor(x, T.make_mesh((len(cut),)), [Shard(0)], sizes={0: cut})
        with pytest.raises(st.UnsupportedOpError, match="take it anew"):
            read_after_a_write(s)

    st.simulate(len(cut), run)
    assert taken


class Again(nn.Module):
    """Computed again in backward."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x.tanh(), use_reentrant=False)


@pytest.mark.parametrize(
    "inner",
    [max_pool(3, (2, 1), (0, 1)), avg_pool(2, 3), nn.Conv2d(3, 2, 3, 2, 1, padding_mode="circular", dtype=D)],
    ids=["max", "avg", "conv"],
)  # fmt: skip
def test_a_checkpoint_computes_again_before_any_rank_sends_back(inner, taken):
    # ranks that read no others' rows had sent gradients before they computed the op again
    x = torch.randn(2, 3, 11, 12, dtype=D, generator=torch.Generator().manual_seed(0))
    T.hold(Again(inner), [x], [T.shard(2, (3, 4, 4))], (3,))
    T.hold(Again(inner), [x], [T.shard(3, (9, 3))], (2,))
    T.hold(Again(inner), [x], [T.On([Shard(2), Shard(3)], {2: (4, 7)})], (2, 2))
    assert taken
