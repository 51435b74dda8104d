"""Padding over sharded dims against plain torch: every mode, growing and cropping."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64
MODES = ["constant", "reflect", "replicate", "circular"]
each = pytest.mark.parametrize("mode", MODES)
ENDS = [(1, 2), (0, 3), (6, 0), (2, -1), (-3, 2), (-2, -1), (-5, 0), (0, 0), (6, 6), (-1, -6)]


@each
def test_one_dim(mode):
    x = torch.randn(2, 3, 9, dtype=D)
    for cut in [*T.cuts(9), (0, 4, 5), (0, 0, 9, 0), (9, 0)]:
        for ends in ENDS:
            T.hold(lambda x, e=ends: F.pad(x, e, mode), [x], [T.shard(2, cut)], (len(cut),))


@each
def test_two_dims(mode):
    x = torch.randn(2, 3, 7, 6, dtype=D)
    for pad in [(1, 2, 3, 0), (2, 2, 2, 2), (0, 0, 1, 1), (-1, 2, 3, -2)]:
        for placements, sizes in [
            ([Shard(2), Shard(3)], {2: (1, 6), 3: (5, 1)}), ([Replicate(), Shard(2)], None),
            ([Shard(2), Shard(2)], {2: (3, 0, 3, 1)}),
            ([Shard(3), Shard(0)], {3: (6, 0), 0: (2, 0)}),
            ([Shard(1), Shard(2)], {1: (3, 0)}),
        ]:  # fmt: skip
            T.hold(lambda x, p=pad: F.pad(x, p, mode), [x], [T.On(placements, sizes)], (2, 2))


def test_what_only_constant_can():
    x = torch.randn(3, 4, 5, dtype=D)
    for pad in [(), (1, 1, 0, 2, 3, -1), (0, 0, -4, 1)]:
        for d in range(3):
            pad = pad if d != 2 else pad[2:]
            T.hold(lambda x, p=pad: F.pad(x, p, value=2.5), [x], [T.shard(d)], (3,))
    T.hold(lambda x: F.pad(x, (1, 2)), [torch.arange(5)], [T.shard(0)], (2,), grad=False)
    T.hold(lambda x: torch.constant_pad_nd(x, (1, 2), 7), [x], [T.shard(2)], (2,))
    T.hold(lambda x: F.pad(x, (1, 1)), [torch.randn(0, 4, dtype=D)], [T.shard(1)], (2,))


def test_leaf_ops():
    x = torch.randn(3, 4, 5, dtype=D)
    T.hold(lambda x: torch.ops.aten.reflection_pad1d(x, [2, 1]), [x], [T.shard(2)], (2,))
    T.hold(lambda x: torch.ops.aten.replication_pad2d(x, [2, 1, 0, 1]), [x], [T.shard(2)], (2,))


def test_result_is_a_copy():
    for mode in MODES:
        for pad in [(0, 0), (1, 1), (-1, 0)]:
            T.hold(
                lambda x, p=pad, m=mode: (x, F.pad(x.sin(), p, m).relu_().view(2, -1)),
                [torch.randn(2, 3, 9, dtype=D)], [T.shard(2)], (3,),
            )  # fmt: skip


@pytest.mark.parametrize(
    "pad, mode", [((5, 0), "reflect"), ((0, 6), "circular"), ((-3, -3), "constant"),
                  ((-2, 4), "circular"), ((-5, 0), "replicate"), ((1,), "constant")]
)  # fmt: skip
def test_too_much_raises(pad, mode):
    def run():
        x = st.distribute_tensor(torch.randn(1, 1, 5), T.make_mesh((2,)), [Shard(2)])
        with pytest.raises(RuntimeError, match="pad: "):
            F.pad(x, pad, mode)

    st.simulate(2, run)


@pytest.mark.parametrize("mode, rows", list(zip(MODES, (0, 0, 0, 4), strict=True)))
def test_what_is_sent(mode, rows):
    def bytes_sent():
        x = torch.randn(1, 3, 8, 5, requires_grad=True)
        x = st.distribute_tensor(x, T.make_mesh((2,)), [Shard(2)])
        with st.trace() as t:
            F.pad(x, (0, 0, 2, 2), mode).sum().backward()
        return sum(s.bytes for s in t.sent if s.collective.startswith("window"))

    # forward and backward: each end's two rows
    assert st.simulate(2, bytes_sent) == [rows * 3 * 5 * 4] * 2
