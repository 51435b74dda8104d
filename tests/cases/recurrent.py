"""RNN, GRU, LSTM and their cells."""

from layouts import two_dims
from torch import nn

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
