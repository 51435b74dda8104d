"""RNN, GRU, LSTM and their cells on shards of the batch, against plain PyTorch."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import cuts, hold, make_mesh, shard

torch.manual_seed(0)
MODULES = {
    "lstm": lambda: nn.LSTM(5, 7, 2, batch_first=True, bidirectional=True),
    "lstm_proj": lambda: nn.LSTM(5, 7, proj_size=3),
    "gru": lambda: nn.GRU(5, 7, 2, bias=False),
    "rnn": lambda: nn.RNN(5, 7, bidirectional=True),
    "relu": lambda: nn.RNN(5, 7, nonlinearity="relu", batch_first=True),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("sizes", cuts(6))
def test_batch(name, sizes):
    module = MODULES[name]().double()
    batch = 0 if module.batch_first else 1
    x = torch.randn(6, 6, 5, dtype=torch.float64)
    outs = hold(module, [x], [shard(batch, sizes)], (len(sizes),))
    assert outs[0].dims[batch].sizes == sizes
    assert all(s.dims[1].sizes == sizes for s in outs[1:])


@pytest.mark.parametrize("name", ["lstm", "gru"])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_any_dim(name, dim):
    hold(MODULES[name]().double(), [torch.randn(4, 6, 5, dtype=torch.float64)], [shard(dim)], (3,))


def test_states_and_plain_input():
    module = MODULES["lstm"]().double()
    x, h, c = (torch.randn(s, dtype=torch.float64) for s in ((4, 3, 5), (4, 4, 7), (4, 4, 7)))

    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x, h, c):
            return self.inner(x, (h, c))

    for places in ([shard(0), shard(1), None], [None, shard(1, (3, 1)), shard(1, (1, 3))]):
        hold(Called(), [x, h, c], places, (2,))


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(cell):
    hold(cell(5, 7).double(), [torch.randn(4, 5, dtype=torch.float64)], [shard(0, (1, 0, 3))], (3,))


def test_two_axes():
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    hold(MODULES["lstm"]().double(), [x], [st.testing.On([Shard(0), Shard(0)])], (2, 2))


def test_sends_weight_gradients_only():
    def run():
        x = st.distribute_tensor(torch.randn(4, 3, 5), make_mesh((2,)), [Shard(0)])
        module = nn.LSTM(5, 7, batch_first=True)
        with st.trace() as t:
            out, _ = module(x)
            assert t.messages == 0
            out.sum().backward()
        return t.bytes, sum(p.numel() for p in module.parameters())

    for sent, numel in st.simulate(2, run):
        assert sent == 4 * numel + 4  # two ranks: each sends what it has once; and the sum


def test_dropout_between_layers():
    """Each rank draws for itself, the expected value stays, and no layer is left out."""

    def run():
        torch.manual_seed(1)
        module = nn.GRU(4, 4, 2, dropout=0.5)
        x = st.distribute_tensor(torch.ones(1, 64, 4), make_mesh((2,)), [Shard(1)])
        out, state = module(x)
        assert state.shape == (2, 64, 4)
        return out.to_local()

    a, b = st.simulate(2, run)
    assert not torch.equal(a, b)
    assert a.var(1).sum() > 0
