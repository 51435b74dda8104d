"""What a caller's mistake says on sharded tensors: torch's kind of error, the same on every rank.

Each line is a call that torch refuses on one device, too.
"""

import pytest
import torch
import torch.nn.functional as F
from raising import raised
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import spectral
from shardtensor.ranks.testing import make_mesh

X = torch.arange(24, dtype=torch.float64).reshape(4, 6)
I = torch.tensor([[0, 1], [1, 0]])  # noqa: E741
MISTAKES = {
    "conv, same and strided": (
        lambda x: F.conv1d(x[None], x.new_ones(1, 4, 3), stride=2, padding="same"),
        "padding='same' is not supported for strided convolutions",
    ),
    "conv_transpose, output_padding": (
        lambda x: F.conv_transpose1d(x[None], x.new_ones(4, 1, 3), output_padding=2),
        "output padding",
    ),
    "max_pool, padding": (
        lambda x: F.max_pool1d(x[None], 3, padding=2), "pad should be at most half"
    ),
    "adaptive pool to less than nothing": (
        lambda x: F.adaptive_max_pool2d(x[None], (-1, 2)), "size is zero"
    ),
    "avg_pool, divisor": (
        lambda x: F.avg_pool2d(x[None], 2, divisor_override=0), "divisor must be not zero"
    ),
    "avg_pool, padding": (lambda x: F.avg_pool1d(x[None], 2, padding=-1), "negative padding"),
    "max_pool, dilation": (lambda x: F.max_pool1d(x[None], 2, dilation=0), "greater than zero"),
    "conv, stride": (lambda x: F.conv1d(x, x.new_ones(1, 4, 3), stride=0), "greater than zero"),
    "conv, padding": (lambda x: F.conv1d(x, x.new_ones(1, 4, 3), padding=-1), "negative padding"),
    "conv_transpose, stride": (
        lambda x: F.conv_transpose1d(x, x.new_ones(4, 1, 3), stride=0), "greater than zero"
    ),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x[None], 0), "positive upscale_factor"),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x[None], 0), "positive downscale_factor"),
    "gather, out of another dtype": (
        lambda x: torch.gather(x, 0, I, out=x[:2, :2].float()), "dtype"
    ),
    "index_select, out of another dtype": (
        lambda x: torch.index_select(x, 0, I[0], out=x[:2].float()), "scalar type|dtype"
    ),
    "nonzero, out of several": (
        lambda x: torch.nonzero(x, as_tuple=True, out=x.long()), "out"
    ),
    "matmul with a number": (lambda x: torch.matmul(x, x.sum()), "at least 1D"),
    "matmul, sizes": (lambda x: x @ x, "do not fit"),
    "einsum, operands": (lambda x: torch.einsum("ij,jk->ik", x), "operands"),
    "einsum, dims": (lambda x: torch.einsum("ijk->ik", x), "labels and dims"),
    "expand to fewer dims": (lambda x: x.expand(6), "fewer dims"),
    "view to another size": (lambda x: x.view(5, 5), r"shape '\[5, 5\]' is invalid"),
    "flatten backwards": (lambda x: x.flatten(1, 0), "start_dim cannot come after end_dim"),
    "glu of an odd dim": (lambda x: F.glu(x[:, :3]), "must be even"),
    "narrow too far": (lambda x: x.narrow(0, 2, 5), "exceeds"),
    "circular padding of all dims": (
        lambda x: F.pad(x, (1, 1, 0, 0), mode="circular"), "of the last 2 dims"
    ),
    "narrow from before the first": (lambda x: x.narrow(0, -5, 1), "start out of range"),
    "narrow to less than nothing": (lambda x: x.narrow(0, 1, -1), "must be non-negative"),
    "an index too large": (lambda x: x[9], "out of bounds"),
    "rot90, dims": (lambda x: x.rot90(1, (0, 1, 1)), "rotation dims"),
    "rot90, one dim twice": (lambda x: x.rot90(1, (0, 0)), "rotation dims to be different"),
    "rot90 of a vector": (lambda x: x[:, 0].rot90(), "total dims"),
    "diagonal of one dim": (lambda x: x.diagonal(0, 1, 1), "cannot be identical"),
    "diag_embed into one dim": (lambda x: x.diag_embed(0, 1, 1), "cannot be identical"),
    "diag of three dims": (lambda x: torch.diag(x[None]), "1D or 2D"),
    "trace of a vector": (lambda x: x[:, 0].trace(), "expected a matrix"),
    "tril of a vector": (lambda x: x[:, 0].tril(), "at least 2 dimensions"),
    "block_diag of three dims": (lambda x: torch.block_diag(x[None]), "2 or fewer"),
    "searchsorted, boundaries": (
        lambda x: torch.searchsorted(x.new_ones(3, 4), x), "boundaries tensor"
    ),
    "bucketize, boundaries": (lambda x: torch.bucketize(x, x.new_ones(2, 2)), "must be 1 dim"),
    "kthvalue": (lambda x: x.kthvalue(9, 0), "out of range"),
    "masked_select by numbers": (lambda x: x.masked_select(x.to(torch.int64)), "BoolTensor"),
    "masked_scatter by numbers": (
        lambda x: x.clone().masked_scatter_(x.to(torch.int64), x), "boolean masks"
    ),
    "nonzero_static": (lambda x: torch.nonzero_static(x, size=-2), "non-negative"),
    "repeats of another size": (
        lambda x: x.repeat_interleave(torch.tensor([1, 2, 3]), 0), "same size as input"
    ),
    "index_select by a matrix": (lambda x: x.index_select(0, I), "vector"),
    "index_select by floats": (lambda x: x.index_select(0, torch.ones(2)), "int32/int64"),
    "index_reduce": (
        lambda x: x.clone().index_reduce_(0, I[0], x[:2], "sum"), "Expected reduce to be"
    ),
    "index_add, dtype": (lambda x: x.index_add(0, I[0], x[:2].float()), "same (dtype|scalar type)"),
    "index_fill by a vector": (
        lambda x: x.index_fill(0, I[0], torch.ones(2, dtype=x.dtype)), "0-dimensional"
    ),
    "put_, elements": (lambda x: x.clone().put_(I, x[0, :3]), "same number of elements"),
    "scatter, dims": (lambda x: x.scatter(0, I[0], x), "same number of dim"),
    "scatter, dtype": (lambda x: x.scatter(0, I, x.float()), "self.dtype"),
    "scatter, reduce": (
        lambda x: x.scatter(0, I, x, reduce="sum"), "must be either add or multiply"
    ),
    "select_scatter": (lambda x: x.select_scatter(x[:2, 0], 1, 0), "size equal to the slice"),
    "dropout": (lambda x: F.dropout(x, 1.5), "between 0 and 1"),
    "view_as_complex": (lambda x: torch.view_as_complex(x), "last dimension of size 2"),
    "grid_sample": (lambda x: F.grid_sample(x, x, align_corners=False), "4 or 5 dims|4D or 5D"),
    "stft": (
        lambda x: torch.stft(x, 9, return_complex=True, center=False), "n_fft"
    ),
    "max_unpool": (lambda x: F.max_unpool1d(x[None], I[None], 2), "shape of indices"),
    "cross": (lambda x: torch.linalg.cross(x, x[0]), "number of dimensions"),
    "cross without a dim of 3": (lambda x: torch.cross(x, x), "size 3"),
    "attention, vectors": (
        lambda x: F.scaled_dot_product_attention(x[0], x[0], x[0]), "at least 2-D"
    ),
    "grad of a matrix": (
        lambda x: torch.autograd.grad(x.requires_grad_() * 2, x), "only for scalar outputs"
    ),
    "len of a number": (lambda x: len(x.sum()), "0-d"),
}  # fmt: skip
OURS = {
    "truncated_irfftn, lengths": (
        lambda x: spectral.truncated_irfftn(x, (1, 2), (2,), (0, 1)),
        "lengths",
    ),
    "truncated_rfftn, modes": (
        lambda x: spectral.truncated_rfftn(x, (1, 2, 3), (0, 1)),
        "numbers of modes",
    ),
}


def _on_rank(fn, dim):
    return raised(fn, st.distribute_tensor(X, make_mesh((2,)), [Shard(dim)]))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", MISTAKES)
def test_torchs_kind_of_error(name, dim):
    fn, match = MISTAKES[name]
    alone = raised(fn, X.clone())
    assert alone is not None
    for e in st.simulate(2, _on_rank, fn, dim):
        assert isinstance(e, type(alone)), repr(e)
        with pytest.raises(type(e), match=match):
            _raise(e)


def _raise(e):
    raise e


# which kernels do not see on shards without rows, or of one
UNSEEN = {
    "channel_shuffle, groups": lambda x: torch.channel_shuffle(x[:, :, None], 4),
    "channel_shuffle, no groups": lambda x: torch.channel_shuffle(x[:, :, None], 0),
    "channel_shuffle, dims": lambda x: torch.channel_shuffle(x, 2),
    "einsum, dtypes": lambda x: torch.einsum("ij,jk->ik", x, torch.ones(6, 2)),
    "bmm, dtypes": lambda x: torch.bmm(x[:, :, None], x[:, None].float()),
    "matmul, dtypes": lambda x: x[:, None] @ torch.ones(4, 6, 2),
    "bilinear, dtypes": lambda x: F.bilinear(x, x, torch.ones(3, 6, 6)),
}


def _raises(fn, sizes):
    x = st.distribute_tensor(X, make_mesh((len(sizes),)), [Shard(0)], sizes={0: sizes})
    return raised(fn, x)


@pytest.mark.parametrize("sizes", [(0, 4), (1, 3), (4, 0, 0)], ids=str)
@pytest.mark.parametrize("name", UNSEEN)
def test_all_ranks_raise_whatever_their_rows(name, sizes):
    alone = raised(UNSEEN[name], X.clone())
    assert alone is not None
    found = st.simulate(len(sizes), _raises, UNSEEN[name], sizes)
    assert {type(e) for e in found} == {type(alone)} and len({str(e) for e in found}) == 1


@pytest.mark.parametrize("name", OURS)
def test_our_own_functions(name):
    fn, match = OURS[name]
    for e in st.simulate(2, _on_rank, fn, 0):
        assert isinstance(e, ValueError), e
        with pytest.raises(ValueError, match=match):
            _raise(e)
