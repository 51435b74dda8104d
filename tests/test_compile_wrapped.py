"""Functions that torch.fx.wrap was told of are others while a graph is traced: it holds all the same."""

import warnings

import torch
import torch.fx
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh

SHIFT = [1.0]


@torch.fx.wrap
def shifted(x):
    return x + SHIFT[0]


class Shifting(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(shifted(x))


def test_a_graph_of_a_wrapped_function_holds_and_for_what_it_reads():
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1))

    def run():
        net = Shifting().double()
        s = st.distribute_tensor(x.double(), make_mesh((1,)), [Shard(1)], src_data_rank=None)
        compiled = st.compile(net, backend="eager", fullgraph=True)
        before = shifted
        for shift, traces in ((1.0, 1), (2.0, 2), (1.0, 2)):
            SHIFT[0] = shift
            for _ in range(3):
                torch.testing.assert_close(
                    compiled(s).full_tensor(), net.linear(x.double() + shift)
                )
            assert compiled.traces == traces
        assert shifted is before

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            st.simulate(1, run)
        finally:
            SHIFT[0] = 1.0
