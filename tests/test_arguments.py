"""Arguments that torch refuses: refused here, too, on every rank, whatever dim is cut."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from raising import raised
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh, simulate

D = torch.float64
MISTAKES = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)


def of(*shape):
    return torch.linspace(0.1, 0.9, max(1, torch.Size(shape).numel()), dtype=D)[
        : torch.Size(shape).numel()
    ].reshape(shape)


NONE, K1, K2 = torch.tensor([0]), of(2, 3, 3), of(2, 3, 3, 3)
# name: (call, shape of the operand that is cut)
CASES = {
    "padding of no name": (lambda x: F.conv1d(x, K1, padding="some"), (2, 3, 8)),
    "two paddings of one dim": (lambda x: F.conv1d(x, K1, padding=(1, 1)), (2, 3, 8)),
    "three paddings of two dims": (lambda x: F.conv2d(x, K2, padding=(1, 1, 1)), (2, 3, 8, 8)),
    "three strides of two dims": (lambda x: F.conv2d(x, K2, stride=(1, 1, 1)), (2, 3, 8, 8)),
    "stride 0": (lambda x: F.conv2d(x, K2, stride=0), (2, 3, 8, 8)),
    "groups": (lambda x: F.conv2d(x, K2, groups=2), (2, 3, 8, 8)), "bias of a convolution": (lambda x: F.conv2d(x, K2, of(3)), (2, 3, 8, 8)),
    "pooling in three dims": (lambda x: F.max_pool2d(x, (2, 2, 2)), (2, 3, 8, 8)),
    "H of a batch": (lambda x: x.H, (2, 3, 4)), "H of a vector": (lambda x: x.H, (4,)), "mH of a vector": (lambda x: x.mH, (4,)),
    "index_add to a number": (lambda x: x.sum().index_add(0, NONE, of(1)), (4,)),
    "index_reduce to a number": (lambda x: x.sum().index_reduce(0, NONE, of(1), "mean"), (4,)), "minlength": (lambda x: x.long().bincount(minlength=-1), (4,)),
    "take at int32": (lambda x: x.take(NONE.int()), (2, 4)), "put at floats": (lambda x: x.put(NONE[:0].double(), x.reshape(-1)[:0]), (2, 4)),
    "tensor_split at int32": (lambda x: x.tensor_split(NONE.int()), (4,)), "tensor_split at a matrix": (lambda x: x.tensor_split(NONE[None]), (4,)),
    "index_add of a number": (lambda x: x[:1].index_add(0, NONE[0], x[0]), (4,)),
    "rms_norm, longer": (lambda x: F.rms_norm(x, (4,), of(3)), (2, 3, 4)), "rms_norm, one": (lambda x: F.rms_norm(x, (4,), of(1)), (2, 3, 4)),
    "rms_norm, a row more": (lambda x: F.rms_norm(x, (4,), of(1, 4)), (2, 3, 4)), "layer_norm": (lambda x: F.layer_norm(x, (4,), of(3)), (2, 3, 4)),
    "layer_norm, one": (lambda x: F.layer_norm(x, (4,), of(1)), (2, 3, 4)), "layer_norm, bias": (lambda x: F.layer_norm(x, (4,), None, of(1)), (2, 3, 4)),
    "batch_norm": (lambda x: F.batch_norm(x, None, None, of(1), training=True), (2, 4, 5)),
    "batch_norm, bias": (lambda x: F.batch_norm(x, None, None, None, of(1), training=True), (2, 4, 5)),
    "group_norm": (lambda x: F.group_norm(x, 2, of(1)), (2, 4, 5)), "instance_norm": (lambda x: F.instance_norm(x, weight=of(1)), (2, 4, 5)),
    "tensordot": (lambda x: torch.tensordot(x, of(3, 5), dims=([1], [0])), (2, 4)),
    "tensordot of one": (lambda x: torch.tensordot(x, of(1, 5), dims=([2], [0])), (2, 4)),
    "einsum": (lambda x: torch.einsum("ij,jk->ik", x, of(3, 5)), (2, 4)), "bmm": (lambda x: torch.bmm(x, of(1, 4, 5)), (2, 3, 4)),
    "linear": (lambda x: F.linear(x, of(1, 4), of(5)), (2, 4)), "rows of a bias": (lambda x: F.linear(x, of(5, 4), of(2, 5)), (4,)), "bias of a vector": (lambda x: F.linear(x, of(5, 4), of(1, 1)), (4,)), "addmm": (lambda x: torch.addmm(of(3, 3), x, of(4, 5)), (2, 4)),
    "soft_margin_loss": (lambda x: F.soft_margin_loss(x, of(2, 2, 4)), (2, 4)), "mse_loss": (lambda x: F.mse_loss(x, of(3, 4)), (2, 4)),
    "no chunks": (lambda x: x.chunk(0), (4, 4)), "fewer chunks": (lambda x: x.unsafe_chunk(-1), (4, 4)), "split": (lambda x: x.split([1, 2]), (4, 4)),
    "max of a number": (lambda x: x.sum().max(9), (4,)), "min of a number": (lambda x: x.sum().min(1), (4,)),
    "argmax of a number": (lambda x: x.sum().argmax(9), (4,)), "squeeze of a number": (lambda x: x.sum().squeeze(2), (4,)),
    "softmax of a number": (lambda x: x.sum().softmax(9), (4,)), "sum of a number": (lambda x: x.sum().sum(9), (4,)),
    "glu of integers": (lambda x: F.glu(x.long()), (2, 4)), "glu of an odd dim": (lambda x: F.glu(x), (2, 3)),
    "padding by a value": (lambda x: F.pad(x, (1, 1), "reflect", 2.0), (1, 3, 3)), "one padding": (lambda x: F.pad(x, (1,)), (1, 3, 3)),
    "a padding of a half": (lambda x: F.pad(x, (0.5, 1)), (1, 3, 3)), "stft of integers": (lambda x: torch.stft(x.int(), 4, return_complex=True), (2, 12)),
    "narrow from a vector": (lambda x: x.narrow(0, NONE, 1), (2, 4)), "narrow from a half": (lambda x: x.narrow(0, 0.5, 1), (2, 4)),
    "repeats": (lambda x: x.repeat(2), (2, 4)), "expand": (lambda x: x.expand(4), (2, 4)), "permute": (lambda x: x.permute(0, 0), (2, 4)),
    "dropout of attention": (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=2.0), (2, 3, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_torch_refuses(name):
    fn, shape = CASES[name]
    x = of(*shape)
    assert isinstance(raised(fn, x), MISTAKES)

    def run():
        for d in range(x.ndim):
            s = st.distribute_tensor(x, make_mesh((2,)), [Shard(d)], src_data_rank=None)
            error = raised(fn, s)
            assert isinstance(error, MISTAKES), f"dim {d}: {error!r}"

    simulate(2, run)


def test_what_torch_takes():
    """As near to the mistakes as can be."""
    for fn, shape in (
        (lambda x: F.conv1d(x, K1, padding="valid"), (2, 3, 8)), (lambda x: F.conv2d(x, K2, padding=(1,)), (2, 3, 8, 8)),
        (lambda x: x.H, (3, 4)), (lambda x: x.sum().H, (4,)), (lambda x: x.sum().max(-1).values, (4,)), (lambda x: x.sum().squeeze(0), (4,)),
        (lambda x: x.sum().index_add(0, NONE, x[0]), (4,)), (lambda x: F.layer_norm(x, (3, 4), of(3, 4), of(3, 4)), (2, 3, 4)),
        (lambda x: F.rms_norm(x, (4,), of(4)), (2, 3, 4)), (lambda x: F.linear(x, of(5, 4), of(1)), (2, 4)),
        (lambda x: F.soft_margin_loss(x, of(1, 4)), (2, 4)), (lambda x: x.tile(2), (2, 4)), (lambda x: x.tile((2, 1, 2)), (2, 4)),
        (lambda x: x.repeat((1, 2, 3)), (2, 4)), (lambda x: x.narrow(0, NONE[0], 1), (2, 4)), (lambda x: F.pad(x, (1, 1), "reflect", 0.0), (1, 3, 3)),
        (lambda x: F.batch_norm(x, None, None, of(4, 1)[:, 0], training=True), (2, 4, 5)),
        (lambda x: F.linear(x, of(5, 4), of(1, 5)), (4,)), (lambda x: torch.stack(x.tensor_split(np.int64(2))), (4,)),
        (lambda x: x.min(axis=0, keepdims=True).values, (2, 4)), (lambda x: x.swapaxes(axis0=0, axis1=1), (2, 4)),
        (lambda x: x.sum().mT, (4,)), (lambda x: x.sum().mH, (4,)), (lambda x: (x.sum() * 1j).adjoint(), (4,)), (lambda x: (x.sum() * 1j).H, (4,)),
    ):  # fmt: skip
        x = of(*shape)
        want = fn(x)

        def run(fn=fn, x=x, want=want):
            for d in range(x.ndim):
                s = st.distribute_tensor(x, make_mesh((2,)), [Shard(d)], src_data_rank=None)
                torch.testing.assert_close(fn(s).full_tensor(), want, rtol=1e-12, atol=1e-12)

        simulate(2, run)
