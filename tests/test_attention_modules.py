"""Torch's attention modules on sharded tokens."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64
tokens = torch.randn(3, 7, 8, dtype=D)
other = torch.randn(3, 5, 8, dtype=D)
upper = torch.ones(7, 7, dtype=torch.bool).triu(1)
padding = torch.zeros(3, 7, dtype=torch.bool)
padding[1, 5:] = True


class Attention(nn.Module):
    def __init__(self, first, weights, **how):
        super().__init__()
        torch.manual_seed(3)
        self.inner = nn.MultiheadAttention(8, 2, batch_first=first, dtype=D, **how)
        self.weights = weights

    def forward(self, x, mask=None, pad=None):
        out, w = self.inner(
            x, x, x, attn_mask=mask, key_padding_mask=pad, need_weights=self.weights
        )
        return (out, w) if self.weights else out


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_multihead_attention(first, weights):
    x = tokens if first else tokens.transpose(0, 1).contiguous()
    d = 1 if first else 0
    for module in (Attention(first, weights), Attention(first, weights).eval()):
        for cut in T.cuts(7):
            T.hold(module, [x], [T.shard(d, cut)], (len(cut),))
        T.hold(module, [x, upper, padding], [T.shard(d), None, None], (3,))
        T.hold(module, [x, None, padding], [T.shard(d), None, T.shard(1)], (3,))
        T.hold(module, [x], [T.shard(1 - d)], (2,))
        T.hold(module, [x], [T.On([Shard(d), Shard(1 - d)])], (2, 2))


class Plainly(nn.Module):
    """Runs without gradients, where torch has fused layers that must not be taken."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        with torch.no_grad():
            return self.inner(*args, **kwargs)


LAYER = dict(d_model=8, nhead=2, dim_feedforward=12, dtype=D)


@pytest.mark.parametrize("first", [False, True])
def test_transformer_layers(first):
    x, y = (t if first else t.transpose(0, 1).contiguous() for t in (tokens, other))
    on = T.shard(1 if first else 0, (3, 0, 4))
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        for fused in ("_native_multi_head_attention", "_transformer_encoder_layer_fwd"):
            patch.setattr(torch, fused, _never(getattr(torch, fused)))
        for p, mode in ((0.0, True), (0.1, False)):
            encoder = nn.TransformerEncoderLayer(**LAYER, dropout=p, batch_first=first).train(mode)
            decoder = nn.TransformerDecoderLayer(**LAYER, dropout=p, batch_first=first).train(mode)
            stack = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False).train(mode)
            T.hold(encoder, [x], [on], (3,))
            T.hold(stack, [x, upper, padding], [on, None, None], (3,))
            T.hold(decoder, [x, y], [on, T.shard(1 if first else 0)], (3,))
            T.hold(decoder, [x, y], [on, None], (3,))
            T.hold(Plainly(encoder), [x], [on], (3,), grad=False)
            T.hold(Plainly(stack), [x, None, padding], [on, None, None], (3,), grad=False)
            T.hold(Plainly(Attention(first, False)).eval(), [x], [on], (3,), grad=False)


def _never(fused):
    """The fused layer, for plain tensors only."""

    def run(*args, **kwargs):
        assert not any(isinstance(a, st.ShardTensor) for a in args)
        return fused(*args, **kwargs)

    return run


def trains():
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(**LAYER, batch_first=True)
    x = st.distribute_tensor(tokens, T.make_mesh((3,)), [Shard(1)])
    net(x).square().mean().backward()
    return [p.grad for p in net.parameters()]


def test_training_with_dropout_gives_equal_gradients():
    first, *rest = st.simulate(3, trains)
    for grads in rest:
        assert all(torch.equal(a, b) for a, b in zip(first, grads, strict=True))
