"""Sequences of several lengths: padded, packed by time step, jagged beside shards."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Partial, Shard
from torch.nn.attention.varlen import varlen_attn
from torch.nn.utils import rnn

import shardtensor as st
from shardtensor import testing as T
from shardtensor.ranks.testing import make_mesh

D = torch.float64
LENGTHS = torch.tensor([2, 3, 1])
LAYOUTS = [
    (T.shard(0), (2,)),
    (T.shard(1), (3,)),
    (T.shard(0, (1, 7, 0, 1)), (4,)),
    (T.On([Shard(0), Shard(1)]), (2, 2)),
    (T.On([Partial()]), (2,)),
]


def packed(x, **options):
    return rnn.pack_padded_sequence(x.view(3, 3, 4), LENGTHS, enforce_sorted=False, **options)


def again(x):
    """A gradient and its own gradient."""
    y = rnn.pad_sequence([x[:4], x[4:]]).sin()
    return torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]


CALLS = {
    "pad": lambda x: rnn.pad_sequence([x[:4], x[4:], x[5:6]], True, 2.5),
    "pad from the left": lambda x: rnn.pad_sequence([x[:4], x[4:4]], padding_side="left"),
    "pad to the dtype of the first": lambda x: rnn.pad_sequence([x[:4].float(), x[4:]]),
    "pad to whole numbers": lambda x: rnn.pad_sequence([(9 * x[4:]).long(), 9 * x[:4]]) + x.sum(),
    "pad with one feature for all": lambda x: rnn.pad_sequence([x[:4], x[4:, :1]]),
    "pad twice differentiated": again,
    "pack": lambda x: packed(x).data,
    "unpack": lambda x: rnn.pad_packed_sequence(
        packed(x, batch_first=True), True, -1.0, total_length=5
    ),
    "pack_sequence": lambda x: rnn.pad_packed_sequence(rnn.pack_sequence([x[:5], x[5:]]))[0],
    "unpad": lambda x: torch.cat(rnn.unpad_sequence(x.view(3, 3, 4), LENGTHS, True)),
}


@pytest.mark.parametrize("call", CALLS)
def test_values_and_gradients(call):
    x = torch.randn(9, 4, dtype=D, generator=torch.Generator().manual_seed(0))
    for place, mesh in LAYOUTS:
        T.hold(CALLS[call], [x], [place], mesh)


MISTAKES = {
    "lengths that are not sorted": lambda x: rnn.pack_padded_sequence(x.view(3, 3, 4), LENGTHS),
    "other features": lambda x: rnn.pad_sequence([x, x[:, :2]]),
    "no sequence": lambda x: rnn.pack_padded_sequence(x.view(3, 3, 4), torch.tensor([2, 1, 0])),
}


def _error(call, x):
    with pytest.raises(RuntimeError) as e:
        call(x)
    return str(e.value)


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_raise_what_torch_raises(what):
    want = _error(MISTAKES[what], torch.ones(9, 4))

    def rank():
        return _error(
            MISTAKES[what], st.distribute_tensor(torch.ones(9, 4), make_mesh((2,)), [Shard(0)])
        )

    assert st.simulate(2, rank) == [want] * 2


class Encoder(nn.Module):
    """Asks whether its mask is left-aligned, of what it does not gather for that."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True, dtype=D)
        self.layers = nn.TransformerEncoder(layer, 1).eval()

    def forward(self, x):
        hidden = torch.tensor([[False] * 3, [False, False, True]])
        with torch.no_grad():
            # torch has zeros in place of padded tokens
            return self.layers(x, src_key_padding_mask=hidden)[:, :2]


def test_an_encoder_with_a_mask_gathers_nothing():
    x = torch.randn(2, 3, 4, dtype=D, generator=torch.Generator().manual_seed(0))
    T.hold(Encoder(), [x], [T.shard(1)], (2,), grad=False)


JAGGED = {
    "first": lambda n, x: n * x[0],
    "second": lambda n, x: x[0] + n,
    "weight": lambda n, x: nn.functional.linear(n, x),
    "matrix": lambda n, x: n @ x.t(),
    "written": lambda n, x: n.add_(x[0]),
}


@pytest.mark.parametrize("call", JAGGED)
def test_jagged_beside_shards_is_refused(call):
    """Not a jagged tensor of shards, which autograd would not follow."""

    def rank():
        x = st.distribute_tensor(torch.ones(6, 4), make_mesh((2,)), [Shard(0)]).requires_grad_()
        n = torch.nested.nested_tensor_from_jagged(torch.ones(6, 4), torch.tensor([0, 2, 6]))
        with pytest.raises(st.UnsupportedOpError, match="jagged"):
            JAGGED[call](n, x)

    st.simulate(2, rank)


def test_a_composite_that_copies_shards_into_what_it_made():
    """C++ holds what it made below autograd, which would lose the gradient."""
    with torch.library._scoped_library("ragged_test", "DEF") as lib:
        lib.define("stacked(Tensor a, Tensor b) -> Tensor")

        def stacked(a, b):
            out = torch.zeros(2, *a.shape, dtype=a.dtype)
            out[0].copy_(a)
            out[1].copy_(b)
            return out

        lib.impl("stacked", stacked, "CompositeImplicitAutograd")

        def rank():
            x = st.distribute_tensor(torch.ones(6, 4), make_mesh((2,)), [Shard(0)])
            with torch.no_grad():
                assert torch.ops.ragged_test.stacked(x, x).sum() == 48
            with pytest.raises(st.UnsupportedOpError, match="gradient would be lost"):
                torch.ops.ragged_test.stacked(x, x.requires_grad_())

        st.simulate(2, rank)


def test_only_the_lengths_of_sequences_are_sharded():
    def rank():
        g = torch.Generator().manual_seed(0)
        x = torch.randn(13, 2, 4, dtype=D, generator=g)
        ends = torch.tensor([0, 4, 13], dtype=torch.int32)
        mesh = make_mesh((2,))
        sharded = st.distribute_tensor(ends, mesh, [Shard(0)])
        found = varlen_attn(x, x, x, sharded, sharded, 9, 9, scale=1.0)
        for a, b in ((0, 4), (4, 13)):
            q = x[a:b].transpose(0, 1)
            want = nn.functional.scaled_dot_product_attention(q, q, q, scale=1.0)
            torch.testing.assert_close(found[a:b].full_tensor(), want.transpose(0, 1))

    st.simulate(2, rank)
