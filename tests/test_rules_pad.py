"""Padding over sharded dims against plain torch: every mode, growing and cropping."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64


def test_result_is_a_copy():
    for mode in ("constant", "reflect", "replicate", "circular"):
        for pad in [(0, 0), (1, 1), (-1, 0)]:
            T.hold(
                lambda x, p=pad, m=mode: (x, F.pad(x.sin(), p, m).relu_().view(2, -1)),
                [torch.randn(2, 3, 9, dtype=D)],
                [T.shard(2)],
                (3,),
            )


@pytest.mark.parametrize(
    "pad, mode", [((5, 0), "reflect"), ((0, 6), "circular"), ((-3, -3), "constant"),
                  ((-2, 4), "circular"), ((-6, 0), "circular"), ((-5, 0), "replicate"), ((1,), "constant"),
                  ((-5, 0), "reflect")]
)  # fmt: skip
def test_too_much_raises(pad, mode):
    def run():
        x = st.distribute_tensor(torch.randn(1, 1, 5), T.make_mesh((2,)), [Shard(2)])
        with pytest.raises(RuntimeError, match="pad: "):
            F.pad(x, pad, mode)

    st.simulate(2, run)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_cropped_to_nothing_or_to_too_few_rows(dim):
    x = torch.randn(2, 3, 4, dtype=D)
    T.hold(lambda x: F.pad(x, (-2, -2), "circular"), [x], [T.shard(dim)], (3,))

    def run():
        y = st.distribute_tensor(x, T.make_mesh((3,)), [Shard(dim)], src_data_rank=None)
        with pytest.raises(st.UnsupportedOpError, match="too few rows to repeat"):
            F.pad(y, (4, -1), "circular")

    st.simulate(3, run)


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_dim_of_two_cropped_to_nothing(dim, mode):
    x = torch.randn(2, 3, 4, 3, dtype=D)
    T.hold(lambda x: F.pad(x, (1, -1, -4, 0), mode), [x], [T.shard(dim)], (3,))


@pytest.mark.parametrize("shape", [(2, 0, 4, 3), (2, 3, 0, 3), (0, 4, 3)])
def test_nothing_to_repeat_raises_as_in_torch(shape):
    def run():
        x = torch.randn(shape)
        y = st.distribute_tensor(x, T.make_mesh((2,)), [Shard(x.ndim - 1)])
        for z in (x, y):
            with pytest.raises(RuntimeError):
                F.pad(z, (0, 1, 1, 1), "replicate")

    st.simulate(2, run)


@pytest.mark.parametrize(
    "mode, rows", [("constant", 0), ("reflect", 0), ("replicate", 0), ("circular", 4)]
)
def test_what_is_sent(mode, rows):
    def bytes_sent():
        x = torch.randn(1, 3, 8, 5, requires_grad=True)
        x = st.distribute_tensor(x, T.make_mesh((2,)), [Shard(2)])
        with st.trace() as t:
            F.pad(x, (0, 0, 2, 2), mode).sum().backward()
        return sum(s.bytes for s in t.sent if s.collective.startswith("window"))

    # forward and backward: each end's two rows
    assert st.simulate(2, bytes_sent) == [rows * 3 * 5 * 4] * 2
