"""Convolutions whose halo travels while the shard is convolved: against plain torch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.ranks.measure import saved_bytes
from shardtensor.rules.conv import halo

D = torch.float64


@pytest.fixture(autouse=True)
def always(in_flight):
    calls = in_flight(halo._HaloConv)
    yield calls
    assert calls, "the halo path was not taken"


@pytest.mark.parametrize("sizes", [(9,), (5, 4), (3, 2, 4), (2, 2, 2, 3)])
@pytest.mark.parametrize("kernel, dilation", [(3, 1), (5, 1), (3, 2)])
def test_conv1d(sizes, kernel, dilation, always):
    x = torch.randn(2, 4, 9, dtype=D)
    width = dilation * (kernel - 1) // 2
    conv = nn.Conv1d(4, 6, kernel, padding=width, dilation=dilation, groups=2, dtype=D)
    T.hold(conv, [x], [T.shard(2, sizes)], (len(sizes),))
    if len(sizes) == 1:
        always.append(1)  # one shard has no halo


@pytest.mark.parametrize("dim", [2, 3])
def test_conv2d(dim):
    x = torch.randn(2, 3, 7, 8, dtype=D)
    for stride in ((1, 1), (1, 2) if dim == 2 else (2, 1)):
        conv = nn.Conv2d(3, 4, (3, 5), stride, (1, 2), dtype=D)
        T.hold(conv, [x], [T.shard(dim)], (2,))
        T.hold(conv, [x.contiguous(memory_format=torch.channels_last)], [T.shard(dim)], (3,))


ALONG_TWO = {
    "3": dict(kernel_size=3, padding=1),
    "5 by 3": dict(kernel_size=(5, 3), padding=(2, 1)),
    "3 by 1": dict(kernel_size=(3, 1), padding=(1, 0)),
    "1 by 3, padded": dict(kernel_size=(1, 3), padding=(2, 1)),
    "dilated": dict(kernel_size=3, padding=2, dilation=2),
    "by 2": dict(kernel_size=3, padding=1, stride=2),
    "4 by 2": dict(kernel_size=4, padding=1, stride=2),
    "not padded": dict(kernel_size=3),
}


@pytest.mark.parametrize("cut", [((6, 6), (8, 4)), ((4, 2, 6), (4, 8)), ((6, 6), (2, 4, 6))])
@pytest.mark.parametrize("name", ALONG_TWO)
def test_two_dims(name, cut, always):
    conv = nn.Conv2d(2, 4, groups=2, dtype=D, **ALONG_TWO[name])
    x = torch.randn(2, 2, 12, 12, dtype=D)
    place = T.On([Shard(2), Shard(3)], dict(zip((2, 3), cut, strict=True)))
    T.hold(conv, [x], [place], tuple(map(len, cut)))
    # rows that neighbours alone do not have are not theirs to give
    always.append(1) if "by 2" in name or name in ("not padded", "1 by 3, padded") else None


def test_three_dims_and_twice_derived():
    x, w = torch.randn(1, 2, 4, 5, 4, dtype=D), torch.randn(3, 2, 3, 3, 3, dtype=D)
    on = T.On([Shard(2), Shard(3), Shard(4)])
    T.hold(lambda x, w: F.conv3d(x, w, padding=1), [x, w], [on, None], (2, 2, 2))

    def penalty(x, w):
        y = F.conv3d(x * x, w, padding=1)
        (g,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        return g * g

    T.hold(penalty, [x, w], [T.On([Shard(2), Shard(4)]), None], (2, 2))


def test_two_dims_where_one_is_not_served():
    """A shard narrower than the halo, or none: its dim is fetched, along the other strips go."""
    conv = nn.Conv2d(2, 3, 5, padding=2, dtype=D)
    x = torch.randn(1, 2, 9, 8, dtype=D)
    for cut in [(4, 1, 4), (5, 0, 4)]:
        for dims in [(2, 3), (3, 2)]:
            place = T.On([Shard(d) for d in dims], {dims[0]: cut} | {dims[1]: (4, 4)})
            T.hold(conv, [x if dims[0] == 2 else x.mT], [place], (3, 2))


STRIDED = {
    "3 by 2": dict(kernel_size=3, stride=2, padding=1),
    "4 by 2": dict(kernel_size=4, stride=2, padding=1),
    "7 by 2": dict(kernel_size=7, stride=2, padding=3),
    "5 by 3": dict(kernel_size=5, stride=3, padding=2),
    "7 by 4": dict(kernel_size=7, stride=4, padding=3),
    "5 dilated by 2": dict(kernel_size=(5, 3), stride=(2, 3), padding=(4, 1), dilation=2),
}


@pytest.mark.parametrize(
    "rows, cut", [(24, (12, 12)), (24, (6, 10, 8)), (25, (8, 6, 11)), (24, (12, 6, 6))]
)
@pytest.mark.parametrize("name", STRIDED)
def test_strided(name, rows, cut, always):
    conv = nn.Conv2d(2, 4, groups=2, dtype=D, **STRIDED[name])
    T.hold(conv, [torch.randn(2, 2, rows, 11, dtype=D)], [T.shard(2, cut)], (len(cut),))
    # where starts are no multiples of the stride another way may serve it
    always.append(1) if rows % 2 or STRIDED[name]["stride"] in (3, 4) else None


def test_strided_twice_derived():
    x, w = torch.randn(2, 2, 16, 5, dtype=D), torch.randn(4, 2, 3, 3, dtype=D)

    def penalty(x, w):
        y = F.conv2d(x * x, w, stride=2, padding=1)
        (g,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        return g * g

    T.hold(penalty, [x, w], [T.shard(2, (6, 6, 4)), None], (3,))


def test_strided_sends_what_is_read():
    """Of a kernel of 3 rows by 2 one row goes down and none goes up."""

    def run():
        x = st.distribute_tensor(torch.ones(1, 2, 16, 4), T.make_mesh((2,)), [Shard(2)])
        x.requires_grad_()
        with st.trace() as t:
            y = nn.Conv2d(2, 2, 3, stride=2, padding=1)(x)
        with st.trace() as back:
            y.sum().backward()
        return [sum(s.bytes for s in of.sent if s.collective == "halo") for of in (t, back)]

    row = 4 * (2 * 4)
    assert st.simulate(2, run) == [[row, 0], [0, row]]


def test_conv3d_fp32_without_bias():
    conv = nn.Conv3d(2, 3, 3, padding=1, bias=False)
    T.hold(conv, [torch.randn(1, 2, 6, 4, 4)], [T.shard(2)], (3,))


def test_double_backward():
    x, w = torch.randn(2, 3, 8, 5, dtype=D), torch.randn(4, 3, 3, 3, dtype=D)

    def penalty(x, w):
        y = F.conv2d(x * x, w, padding=1)
        (g,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        return g * g

    T.hold(penalty, [x, w], [T.shard(2, (3, 5)), None], (2,))


def test_input_without_gradient():
    def run():
        x = st.distribute_tensor(torch.ones(1, 2, 8, 4), T.make_mesh((2,)), [Shard(2)])
        conv = nn.Conv2d(2, 2, 3, padding=1)
        with st.trace() as t:
            conv(x).sum().backward()
        return [s.collective for s in t.sent]

    assert st.simulate(2, run)[0] == ["halo", "all_reduce", "all_reduce"]


def test_autocast():
    x = torch.randn(1, 2, 8, 4)
    conv = nn.Conv2d(2, 3, 3, padding=1)

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return copy.deepcopy(conv)(x)

    T.hold(run, [x], [T.shard(2)], (2,), rtol=2e-2)


def test_keeps_the_input_and_two_strips():
    def run():
        x = st.distribute_tensor(torch.ones(1, 2, 16, 4), T.make_mesh((2,)), [Shard(2)])
        x.requires_grad_()
        conv = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        with st.trace() as t:
            kept = saved_bytes(lambda: conv(x))
        return kept, t.bytes, t.messages

    row, weight = 4 * (2 * 4), 4 * (2 * 2 * 9)
    # the input is a leaf, and alive anyway; so is the weight, but `vary` gives a view of it
    assert st.simulate(2, run) == [(row + weight, row, 1)] * 2


def test_keeps_the_input_and_strips_along_two_dims():
    def run():
        mesh = T.make_mesh((2, 2))
        x = st.distribute_tensor(torch.ones(1, 2, 16, 16), mesh, [Shard(2), Shard(3)])
        x.requires_grad_()
        conv = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        with st.trace() as t:
            kept = saved_bytes(lambda: conv(x))
        return kept, t.bytes, t.messages

    row, column, weight = 4 * (2 * 8), 4 * (2 * 10), 4 * (2 * 2 * 9)
    # a copy of the input with a row beside it was kept, too
    assert st.simulate(4, run) == [(row + column + weight, row + column, 2)] * 4


def test_double_backward_where_the_weight_comes_from_the_input():
    def penalty(x, w):
        y = F.conv2d(x, w * x.mean(), padding=1)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return g.square().sum()

    x, w = torch.randn(1, 2, 8, 5, dtype=D), torch.randn(2, 2, 3, 3, dtype=D)
    T.hold(penalty, [x, w], [T.shard(2), None], (2,))
