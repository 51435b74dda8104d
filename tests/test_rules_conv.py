"""Convolutions over sharded dims against plain torch."""

import copy
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
ONE_D = [
    (k, s, p, d)
    for k, s, p, d in itertools.product((1, 2, 3, 5), (1, 2, 3), (0, 1, 2), (1, 2))
    if 9 + 2 * p >= d * (k - 1) + 1
]


@pytest.mark.parametrize("cut", T.cuts(9))
def test_conv1d(cut):
    x = torch.randn(2, 4, 9, dtype=D)
    for i, (k, s, p, d) in enumerate(ONE_D):
        groups = 2 if i % 3 == 0 else 1
        conv = nn.Conv1d(4, 2, k, s, p, d, groups=groups, bias=i % 2 == 0, dtype=D)
        T.hold(conv, [x], [T.shard(2, cut)], (len(cut),))


@pytest.mark.parametrize("cut", T.cuts(7))
def test_conv_transpose1d(cut):
    x = torch.randn(2, 4, 7, dtype=D)
    for i, (k, s, p, d) in enumerate(ONE_D):
        if p > d * (k - 1):
            continue
        extra = i % max(s, d)
        if 6 * s - 2 * p + d * (k - 1) + 1 + extra <= 0:
            continue
        conv = nn.ConvTranspose1d(
            4, 2, k, s, p, extra, groups=2 if i % 3 == 0 else 1, dilation=d, bias=i % 2 == 0,
            dtype=D,
        )  # fmt: skip
        T.hold(conv, [x], [T.shard(2, cut)], (len(cut),))


TWO_AXES = [
    ([Shard(2), Shard(3)], {2: (5, 4), 3: (1, 7)}), ([Shard(3), Shard(2)], None),
    ([Shard(2), Shard(2)], {2: (3, 0, 5, 1)}), ([Shard(0), Shard(2)], None),
    ([Replicate(), Shard(3)], None), ([Shard(1), Shard(2)], None), ([Shard(1), Shard(1)], None),
]  # fmt: skip
MODULES = {
    "same": lambda: nn.Conv2d(4, 6, 3, padding=1, dtype=D),
    "strided": lambda: nn.Conv2d(4, 6, (3, 2), (2, 2), (1, 0), dtype=D),
    "auto": lambda: nn.Conv2d(4, 2, (4, 3), padding="same", dilation=(1, 2), groups=2, dtype=D),
    "patches": lambda: nn.Conv2d(4, 6, 2, 2, dtype=D),
    "pointwise": lambda: nn.Conv2d(4, 6, 1, dtype=D),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 2, 2, dtype=D),
    "transposed far": lambda: nn.ConvTranspose2d(4, 6, (4, 5), 2, 1, (1, 0), dtype=D),
    "depthwise": lambda: nn.Conv2d(4, 4, 5, padding=2, groups=4, bias=False, dtype=D),
}


@pytest.mark.parametrize("name", MODULES)
def test_two_axes(name):
    x = torch.randn(2, 4, 9, 8, dtype=D)
    for placements, sizes in TWO_AXES:
        T.hold(MODULES[name](), [x], [T.On(placements, sizes)], (2, 2))
    for d in range(4):
        T.hold(MODULES[name](), [x], [T.shard(d)], (3,))


def test_three_dims():
    x = torch.randn(1, 2, 5, 6, 4, dtype=D)
    for d in (2, 3, 4):
        T.hold(nn.Conv3d(2, 3, 3, padding=1, dtype=D), [x], [T.shard(d)], (2,))
        T.hold(nn.ConvTranspose3d(2, 3, 2, 2, dtype=D), [x], [T.shard(d)], (2,))
    T.hold(nn.Conv3d(2, 3, 3, dtype=D), [x], [T.On([Shard(2), Shard(4)])], (2, 2))


def test_forms():
    x, w = torch.randn(4, 9, dtype=D), torch.randn(2, 4, 3, dtype=D)
    T.hold(F.conv1d, [x, w], [T.shard(1), None], (2,))
    T.hold(F.conv1d, [x, w], [T.shard(1), T.shard(0)], (2,))
    T.hold(F.conv1d, [x, w], [None, T.replicated()], (2,))
    y = torch.randn(2, 4, 9, 8).to(memory_format=torch.channels_last)
    T.hold(nn.Conv2d(4, 6, 3, padding=1), [y], [T.shard(2)], (3,))
    with pytest.raises(st.RankError, match="Kernel size"):
        st.simulate(2, too_short)


def too_short():
    mesh = T.make_mesh((2,))
    x = st.distribute_tensor(torch.zeros(1, 1, 2), mesh, [Shard(2)])
    F.conv1d(x, torch.zeros(1, 1, 5))


def autocast():
    mesh = T.make_mesh((2,))
    conv = nn.Conv2d(3, 4, 3, padding=1)
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = conv(st.distribute_tensor(x, mesh, [Shard(2)]))
        want = conv(x)
    T.same(got, want.detach(), "autocast", 1e-2)


def test_autocast():
    st.simulate(2, autocast)


def sent(conv, rows):
    conv = copy.deepcopy(conv)  # a simulated rank's own
    mesh = T.make_mesh((2,))
    x = st.distribute_tensor(torch.randn(1, 3, rows, 8), mesh, [Shard(2)]).requires_grad_()
    with st.trace() as forward:
        y = conv(x)
    with st.trace() as backward:
        y.sum().backward()
    return (
        [(s.collective, s.bytes, s.messages) for s in forward.sent],
        [s.bytes for s in backward.sent if s.collective == "window_add"],
    )


def test_only_the_halo_is_sent():
    row = 3 * 8 * 4
    for rows in (8, 64):
        for forward, backward in st.simulate(2, sent, nn.Conv2d(3, 4, 3, padding=1), rows):
            assert forward == [("window", row, 1)] and backward == [row]
    for conv in (nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 2, 2), nn.Conv2d(3, 4, (1, 3))):
        assert all(f == [] for f, _ in st.simulate(2, sent, conv, 8))
    assert all(f == [] for f, _ in st.simulate(2, sent, nn.ConvTranspose2d(3, 4, 2, 2), 8))


SIZES = {
    "3 same": (nn.Conv1d(1, 1, 3, padding=1), (5, 0, 4, 7), (5, 0, 4, 7)),
    "4 same": (nn.Conv1d(1, 1, 4, padding="same"), (5, 0, 4, 7), (5, 0, 4, 7)),
    "dilated": (nn.Conv1d(1, 1, 5, padding=4, dilation=2), (5, 1, 10), (5, 1, 10)),
    "halved": (nn.Conv1d(1, 1, 3, 2, 1), (4, 6, 2), (2, 3, 1)),
    "halved by 4": (nn.Conv1d(1, 1, 4, 2, 1), (4, 6, 2), (2, 3, 1)),
    "valid": (nn.Conv1d(1, 1, 3), (4, 4, 4), (3, 4, 3)),
    "patches": (nn.Conv1d(1, 1, 4, 4), (4, 8, 6), (1, 2, 1)),
    "doubled": (nn.ConvTranspose1d(1, 1, 2, 2), (4, 0, 2), (8, 0, 4)),
    "doubled by 4": (nn.ConvTranspose1d(1, 1, 4, 2, 1), (4, 0, 2), (8, 0, 4)),
    "doubled by 3": (nn.ConvTranspose1d(1, 1, 3, 2, 1, 1), (4, 0, 2), (8, 0, 4)),
    "spread": (nn.ConvTranspose1d(1, 1, 1, 3, 0, 2), (4, 0, 2), (12, 0, 6)),
}


@pytest.mark.parametrize("name", SIZES)
def test_output_is_cut_where_the_input_is(name):
    conv, before, after = SIZES[name]
    x = torch.randn(2, 1, sum(before), dtype=D)
    (spec,) = T.hold(conv.to(D), [x], [T.shard(2, before)], (len(before),))
    assert spec.dims[2].sizes == after


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_modes(mode):
    x = torch.randn(2, 3, 9, 8, dtype=D)
    conv = nn.Conv2d(3, 4, (3, 5), padding=(1, 2), padding_mode=mode, dtype=D)
    for cut in T.cuts(9):
        (spec,) = T.hold(conv, [x], [T.shard(2, cut)], (len(cut),))
        # the padding went to the first and the last shard, and the convolution took it away again
        assert spec.dims[2].sizes == cut
    for placements, sizes in TWO_AXES[:3]:
        T.hold(conv, [x.repeat(1, 1, 1, 1)], [T.On(placements, sizes)], (2, 2))


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_sharded_channels(groups):
    x = torch.randn(2, 8, 5, 4, dtype=D)
    conv = nn.Conv2d(8, 16, 3, padding=1, groups=groups, dtype=D)
    up = nn.ConvTranspose2d(8, 16, 3, 2, 1, groups=groups, dtype=D)
    for cut in [(4, 4), (2, 6), (0, 8), (3, 1, 4)]:
        for module in (conv, up):
            T.hold(module, [x], [T.shard(1, cut)], (len(cut),))
    for module in (conv, up):
        T.hold(module, [x], [T.On([Shard(1), Shard(2)])], (2, 2))
    w = torch.randn(16, 8 // groups, 3, 3, dtype=D)
    T.hold(lambda x, w: F.conv2d(x, w, None, 1, 1, 1, groups), [x, w], [T.shard(1)] * 2, (2,))


def test_rows_between_kernels():
    x = torch.randn(2, 4, 7, dtype=D)
    for k, s, p, extra in [(1, 3, 1, 0), (1, 4, 2, 3), (2, 4, 1, 2), (2, 5, 3, 0)]:
        conv = nn.ConvTranspose1d(4, 2, k, s, p, extra, dtype=D)
        for cut in T.cuts(7):
            T.hold(conv, [x], [T.shard(2, cut)], (len(cut),))


def test_other_entries():
    x, w, b = (torch.randn(s, dtype=D) for s in [(2, 4, 9, 8), (4, 4, 3, 3), (4,)])
    place = [T.shard(2, (2, 6, 1)), None, None]
    for transposed in (False, True):
        T.hold(
            lambda x, w, b, t=transposed: torch.convolution(
                x, w, b, [2, 1], [1, 1], [1, 1], t, [0, 0], 1
            ),
            [x, w, b], place, (3,),
        )  # fmt: skip
    T.hold(torch.ops.aten.conv2d.default, [x, w, b], place, (3,))
    T.hold(lambda x, w, b: F.conv2d(x, w, b).relu_().flatten(1), [x, w, b], place, (3,))
    T.hold(
        lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, 1).relu_().view(2, 4, 1, -1),
        [x, w], place[:2], (3,),
    )  # fmt: skip


def second_order(x, w):
    """The gradient of a gradient penalty."""
    y = F.conv1d(x, w, padding=1).tanh()
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return (g * g).sum()


def test_double_backward():
    x, w = torch.randn(2, 3, 9, dtype=D), torch.randn(2, 3, 3, dtype=D)
    for cut in T.cuts(9):
        T.hold(second_order, [x, w], [T.shard(2, cut), None], (len(cut),))


def sent_in_bf16():
    mesh = T.make_mesh((2,))
    x = st.distribute_tensor(torch.randn(1, 3, 8, 8), mesh, [Shard(2)])
    with torch.autocast("cpu", dtype=torch.bfloat16), st.trace() as t:
        F.conv2d(x, torch.randn(4, 3, 3, 3), padding=1)
    return t.bytes


def test_autocast_halves_what_is_sent():
    assert st.simulate(2, sent_in_bf16) == [3 * 8 * 2] * 2


def test_halos_of_two_dims():
    def bytes_sent():
        x = st.distribute_tensor(
            torch.randn(1, 1, 8, 12), T.make_mesh((2, 2)), [Shard(2), Shard(3)]
        )
        with st.trace() as t:
            F.conv2d(x, torch.randn(1, 1, 3, 3), padding=1)
        return t.bytes, t.messages

    # a row of 6, then a column of 4 rows and 2 halo rows
    assert st.simulate(4, bytes_sent) == [((6 + 6) * 4, 2)] * 4
