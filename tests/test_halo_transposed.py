"""Transposed convolutions whose halo travels while the shard is convolved: against plain torch."""

import pytest
import torch
import torch.nn.functional as F
from drawn import drawn
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.ranks.measure import saved_bytes
from shardtensor.rules import overlap
from shardtensor.rules.conv import halo

D = torch.float64


@pytest.fixture
def taken(in_flight):
    """The convolutions by strips."""
    return in_flight(halo._HaloConv)


def module(*args, **kwargs):
    torch.manual_seed(3)
    return nn.ConvTranspose2d(*args, dtype=D, **kwargs)


KINDS = {
    "3 by 2": dict(kernel_size=3, stride=2, padding=1, output_padding=1),
    "4 by 2": dict(kernel_size=4, stride=2, padding=1),
    "4 by 1": dict(kernel_size=4, padding=1),
    "3 without padding": dict(kernel_size=3, groups=2),
    "5 by 2, and 2 by 2": dict(kernel_size=(5, 2), stride=2, padding=(2, 0), output_padding=1),
    "dilated": dict(kernel_size=3, padding=2, dilation=2, bias=False),
}


@pytest.mark.parametrize("cut", [(5, 7), (3, 4, 5)])
@pytest.mark.parametrize("name", KINDS)
def test_one_dim(name, cut, taken):
    x = drawn(2, 4, 12, 5)
    T.hold(module(4, 6, **KINDS[name]), [x], [T.shard(2, cut)], (len(cut),))
    assert len(taken) >= len(cut)
    last = x.mT.contiguous(memory_format=torch.channels_last)
    T.hold(module(4, 6, **KINDS[name]), [last], [T.shard(3, cut)], (len(cut),))


@pytest.mark.parametrize("dims", [(2, 3), (3, 2)])
@pytest.mark.parametrize("name", KINDS)
def test_two_dims(name, dims, taken):
    """What comes along the second has what came along the first at its ends; so has its adjoint."""
    place = T.On([Shard(d) for d in dims], {dims[0]: (5, 6), dims[1]: (3, 4, 5)})
    x = drawn(2, 4, 12, 12)[:, :, : 11 if dims[0] == 2 else 12, : 11 if dims[0] == 3 else 12]
    T.hold(module(4, 4, **KINDS[name]), [x], [place], (2, 3))
    assert taken


def test_groups_that_lie_on_one_rank_each(taken):
    place = T.On([Shard(1), Shard(2)], {1: (1, 3), 2: (3, 5)})
    conv = module(4, 8, **KINDS["3 by 2"], groups=4)
    T.hold(conv, [drawn(2, 4, 8, 6)], [place], (2, 2))
    assert taken


@pytest.mark.parametrize("name", ["3 by 2", "4 by 1"])
def test_twice_derived(name, taken):
    kinds = {k: v for k, v in KINDS[name].items() if k != "kernel_size"}
    size = KINDS[name]["kernel_size"]

    def penalty(x, w):
        y = F.conv_transpose2d(x * x, w, **kinds)
        (g,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        return g * g

    x, w = drawn(1, 2, 8, 6), drawn(2, 3, size, size)
    T.hold(penalty, [x, w], [T.shard(2, (3, 5)), None], (2,))
    T.hold(penalty, [x, w], [T.On([Shard(2), Shard(3)]), None], (2, 2))
    assert taken


def test_one_and_three_dims(taken):
    fns = {
        3: lambda x, w: F.conv_transpose1d(x, w, stride=2, padding=1),
        5: lambda x, w: F.conv_transpose3d(x, w, stride=2, padding=1),
    }
    for n, dims in [(3, (2,)), (5, (3,)), (5, (2, 4))]:
        x, w = drawn(2, 2, *[6, 4, 4][: n - 2]), drawn(2, 3, *[3] * (n - 2))
        T.hold(fns[n], [x, w], [T.On([Shard(d) for d in dims]), None], (2,) * len(dims))
    assert taken


NOT_SERVED = {
    "narrower than the halo": (drawn(1, 2, 8, 4), (1, 6, 0, 1), dict(kernel_size=5)),
    "rows that nothing reaches": (drawn(1, 2, 8, 4), (3, 5), dict(kernel_size=2, stride=3)),
    "more output padding than padding": (
        drawn(1, 2, 8, 4), (3, 5), dict(kernel_size=3, stride=3, output_padding=2),
    ),
    "no batch": (drawn(2, 8, 4), (3, 5), dict(kernel_size=3, stride=2)),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_SERVED)
def test_what_strips_do_not_serve(name, taken):
    x, cut, kind = NOT_SERVED[name]
    T.hold(module(2, 3, **kind), [x], [T.shard(x.ndim - 2, cut)], (len(cut),))
    assert not taken


def cost():
    x = st.distribute_tensor(torch.ones(1, 4, 32, 64), T.make_mesh((4,)), [Shard(2)])
    x.requires_grad_()
    conv = nn.ConvTranspose2d(4, 2, 3, 2, 1, 1)
    kept = saved_bytes(lambda: conv(x))
    with st.trace() as t:
        y = conv(x)
    with st.trace() as back:
        y.sum().backward()
    sent, returned = (
        sum(s.bytes for s in of.sent if s.collective in ("halo", "window", "window_add"))
        for of in (t, back)
    )
    return kept, sent, returned


@pytest.mark.parametrize("small", [True, False])
def test_what_is_sent_and_kept(small, monkeypatch):
    """The shard itself and a row, where the window is a copy of it with a row more."""
    monkeypatch.setattr(overlap, "WORTH", 2**30 if small else 0)
    row = 4 * 64 * 4
    found = st.simulate(4, cost)
    for rank, (kept, sent, back) in enumerate(found):
        assert (sent, back) == (0 if rank == 0 else row, 0 if rank == 3 else row)
        # beside the input, and the weights, which are less than a row
        assert kept // row == (9 if small else rank < 3)
