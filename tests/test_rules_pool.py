"""Padding and pooling over sharded dims against plain torch."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64
x = torch.randn(2, 3, 9, 8, dtype=D)
LAYOUTS = [
    ([Shard(2), Shard(3)], {2: (5, 4), 3: (1, 7)}), ([Shard(2), Shard(2)], {2: (3, 0, 5, 1)}),
    ([Shard(0), Shard(2)], None), ([Replicate(), Shard(3)], None), ([Shard(3), Shard(2)], None),
]  # fmt: skip
PADS = {
    "constant": lambda a: F.pad(a, (1, 2, 3, 1)),
    "value": lambda a: F.pad(a, (0, 0, 2, 0, 1, 1), value=2.5),
    "crop": lambda a: F.pad(a, (-1, 2, -2, -3)),
    "crop and pad": lambda a: F.pad(a, (0, 0, -6, 4)),
    "circular": lambda a: F.pad(a, (2, 1, 4, 9), mode="circular"),
    "reflect": lambda a: F.pad(a, (2, 1, 5, 8), mode="reflect"),
    "replicate": lambda a: F.pad(a, (0, 3, 4, 2), mode="replicate"),
    "one dim": lambda a: F.pad(a[0], (1, 1), mode="reflect"),
}
POOLS = {
    "max": nn.MaxPool2d(2), "max 3": nn.MaxPool2d(3, 2, 1), "max indices": nn.MaxPool2d(
        3, 2, 1, return_indices=True),
    "max ceil": nn.MaxPool2d((2, 3), (2, 2), (1, 0), ceil_mode=True, return_indices=True),
    "max dilated": nn.MaxPool2d(2, 1, 1, dilation=3, return_indices=True),
    "avg": nn.AvgPool2d(2), "avg pad": nn.AvgPool2d(3, 2, 1),
    "avg inside": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "avg ceil": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "avg ceil inside": nn.AvgPool2d((3, 2), 2, 1, ceil_mode=True, count_include_pad=False),
    "avg divisor": nn.AvgPool2d(2, divisor_override=3), "lp": nn.LPPool2d(2, 2),
    "mean": nn.AdaptiveAvgPool2d(1), "thirds": nn.AdaptiveAvgPool2d((3, 4)),
    "odd": nn.AdaptiveAvgPool2d((5, None)), "most": nn.AdaptiveMaxPool2d(1, return_indices=True),
    "max thirds": nn.AdaptiveMaxPool2d((3, 2), return_indices=True),
    "max odd": nn.AdaptiveMaxPool2d((4, 5), return_indices=True),
    "more": nn.AdaptiveAvgPool2d((13, 11)), "one": nn.AdaptiveAvgPool2d((1, 3)),
    "max more": nn.AdaptiveMaxPool2d((13, 11), return_indices=True),
    "max row": nn.AdaptiveMaxPool2d((1, None), return_indices=True),
}  # fmt: skip


@pytest.mark.parametrize("name", [*PADS, *POOLS])
def test_rows_over_ranks(name):
    fn = PADS.get(name) or POOLS[name]
    for cut in T.cuts(9):
        T.hold(fn, [x], [T.shard(2, cut)], (len(cut),))
    for d in (0, 1, 3):
        T.hold(fn, [x], [T.shard(d)], (3,))


@pytest.mark.parametrize("name", [*PADS, *POOLS])
def test_two_axes(name):
    for placements, sizes in LAYOUTS:
        T.hold(PADS.get(name) or POOLS[name], [x], [T.On(placements, sizes)], (2, 2))


@pytest.mark.parametrize("cut", T.cuts(11))
def test_one_dim(cut):
    y = torch.randn(2, 3, 11, dtype=D)
    n = (len(cut),)
    for k, s, p, ceil in itertools.product((2, 3, 5), (1, 2, 3), (0, 1), (False, True)):
        T.hold(nn.MaxPool1d(k, s, p, ceil_mode=ceil), [y], [T.shard(2, cut)], n)
        T.hold(nn.AvgPool1d(k, s, p, ceil, False), [y], [T.shard(2, cut)], n)
        T.hold(nn.AvgPool1d(k, s, p, ceil), [y], [T.shard(2, cut)], n)
    for m in (1, 2, 5, 11, 14):
        T.hold(nn.AdaptiveAvgPool1d(m), [y], [T.shard(2, cut)], n)
        T.hold(nn.AdaptiveMaxPool1d(m), [y], [T.shard(2, cut)], n)


def test_three_dims():
    y = torch.randn(1, 2, 6, 5, 4, dtype=D)
    for m in (nn.MaxPool3d(2), nn.AvgPool3d(3, 2, 1), nn.AdaptiveAvgPool3d((2, 1, 2)),
              nn.AdaptiveAvgPool3d(1), nn.ReplicationPad3d(1)):  # fmt: skip
        for d in (2, 4):
            T.hold(m, [y], [T.shard(d)], (3,))
        T.hold(m, [y], [T.On([Shard(2), Shard(3)])], (2, 2))


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


@pytest.mark.parametrize("op", [F.adaptive_avg_pool2d, F.adaptive_max_pool2d])
def test_adaptive_bins(op):
    """Ties between ranks, bins over several ranks, few and sharded channels, no batch."""
    y = torch.randint(0, 3, (2, 4, 10, 7)).to(D)
    both = (lambda a, m: op(a, m, True)) if op is F.adaptive_max_pool2d else op
    for m in ((3, 4), (2, 2), (7, 1), (1, 7), (10, 3), (12, 9), (5, None)):
        for placements, sizes in LAYOUTS[:2]:
            sizes = {2: (9, 1), 3: (1, 6)} if 3 in sizes else {2: (1, 0, 8, 1)}
            T.hold(both, [y, m], [T.On(placements, sizes), None], (2, 2))
        T.hold(both, [y, m], [T.On([Shard(1), Shard(2)]), None], (2, 2))
        T.hold(both, [y[:, :1], m], [T.shard(3, (2, 2, 3)), None], (3,))
        T.hold(both, [y[0], m], [T.shard(1), None], (4,))


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
    st.simulate(2, compiled, POOLS[name])


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


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_conv_padding_modes(mode):
    conv = nn.Conv2d(3, 2, (3, 5), padding=(1, 2), padding_mode=mode, dtype=D)
    for cut in T.cuts(9):
        T.hold(conv, [x], [T.shard(2, cut)], (len(cut),))
    T.hold(conv, [x], [T.On([Shard(2), Shard(3)])], (2, 2))
