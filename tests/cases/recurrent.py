"""RNN, GRU, LSTM and their cells."""

import torch
from layouts import two_dims
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .table import D, case, cases, normal

MODULES = {
    "lstm": nn.LSTM(5, 7, 2, batch_first=True, bidirectional=True),
    "relu": nn.RNN(5, 7, nonlinearity="relu", batch_first=True),
    "lstm_proj": nn.LSTM(5, 7, proj_size=3),
    "gru": nn.GRU(5, 7, 2, bias=False),
    "rnn": nn.RNN(5, 7, bidirectional=True),
}
CELLS = {"lstm": nn.LSTMCell(5, 7), "gru": nn.GRUCell(5, 7), "rnn": nn.RNNCell(5, 7)}


class WithStates(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.LSTM(5, 7, 2, batch_first=True, bidirectional=True)

    def forward(self, x, h, c):
        return self.inner(x, (h, c))


for name, module in MODULES.items():
    dims = (0, 1, 2) if module.batch_first else (1, 0, 2)
    case("recurrent", normal(6, 6, 5), dims=[dims], name=name, skip=two_dims)(module.to(D))
cases("cell", {k: m.to(D) for k, m in CELLS.items()}, normal(6, 5), skip=two_dims)
case(
    "recurrent",
    normal(4, 3, 5),
    normal(4, 4, 7),
    normal(4, 4, 7),
    dims=[(0, 1), 1, 1],
    name="states",
    skip=two_dims,
)(WithStates().to(D))


class Packed(nn.Module):
    """Sequences of several lengths, in any order."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        first = self.inner.batch_first
        lengths = torch.tensor([2, 4, 1, 3, 4])
        rows = pack_padded_sequence(x, lengths, first, enforce_sorted=False)
        out, states = self.inner(rows)
        return pad_packed_sequence(out, first)[0], states


PACKED = {
    "gru": nn.GRU(5, 4, 2, batch_first=True, bidirectional=True),
    "lstm_proj": nn.LSTM(5, 4, proj_size=3),
    "rnn": nn.RNN(5, 4, nonlinearity="relu"),
}
for name, module in PACKED.items():
    shape, dims = ((5, 4, 5), (0, 1, 2)) if module.batch_first else ((4, 5, 5), (1, 0, 2))
    case("recurrent", normal(*shape), dims=[dims], name=f"packed {name}", skip=two_dims)(
        Packed(module).to(D)
    )
