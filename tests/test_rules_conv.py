"""Convolutions over sharded dims against plain torch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64


def test_forms():
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


def test_no_samples_of_no_rows():
    w = torch.randn(2, 1, 2, 2, dtype=D)
    x = torch.randn(0, 1, 5, 0, dtype=D)
    T.hold(lambda x: F.conv2d(x, w, padding=3), [x], [T.shard(2)], (2,))
