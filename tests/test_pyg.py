"""PyTorch Geometric's layers, unmodified, on sharded nodes."""

import pytest
import torch
import torch.nn as nn
from torch.distributed.tensor import Shard
from torch_geometric import nn as pyg
from torch_geometric.utils import to_dense_batch

import shardtensor as st
from shardtensor import testing as T
from shardtensor.ranks.testing import make_mesh
from shardtensor.rules import nodes

torch.manual_seed(0)
D = torch.float64
N, E = 17, 60
X, EDGES = torch.randn(N, 6, dtype=D), torch.randint(0, N, (2, E))
FEATURES = torch.randn(E, 4, dtype=D)


def mlp(n, out):
    return nn.Sequential(nn.Linear(n, 8), nn.ReLU(), nn.Linear(8, out))


LAYERS = {
    "GCN": lambda: pyg.GCNConv(6, 5), "SAGE": lambda: pyg.SAGEConv(6, 5),
    "SAGE max": lambda: pyg.SAGEConv(6, 5, aggr="max"), "Graph": lambda: pyg.GraphConv(6, 5),
    "GAT": lambda: pyg.GATConv(6, 5, heads=2), "GATv2": lambda: pyg.GATv2Conv(6, 5, heads=2),
    "Transformer": lambda: pyg.TransformerConv(6, 5, heads=2),
    "Edge": lambda: pyg.EdgeConv(mlp(12, 5)), "GIN": lambda: pyg.GINConv(mlp(6, 5)),
    "GINE": lambda: pyg.GINEConv(mlp(6, 5), edge_dim=4),
    "NN": lambda: pyg.NNConv(6, 5, mlp(4, 30)), "CG": lambda: pyg.CGConv(6, 4),
    "Cheb": lambda: pyg.ChebConv(6, 5, 3), "APPNP": lambda: pyg.APPNP(3, 0.1),
    "Gated": lambda: pyg.GatedGraphConv(6, 2), "GEN": lambda: pyg.GENConv(6, 6),
    "TAG": lambda: pyg.TAGConv(6, 5), "ARMA": lambda: pyg.ARMAConv(6, 5),
}  # fmt: skip


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, sharded):
    layer = LAYERS[name]().double()
    more = [FEATURES] if name in ("GINE", "NN", "CG") else []
    edges, features = (T.shard(1), T.shard(0)) if sharded else (None, None)
    for cut in ((9, 8), (5, 0, 12), (1, 14, 1, 1)):
        places = [T.shard(0, cut), edges, *[features] * len(more)]
        # atol: the gradient of a bias in front of a softmax is zero but for rounding
        T.hold(layer, [X, EDGES, *more], places, (len(cut),), atol=1e-13)


class Bipartite(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = pyg.SAGEConv((6, 4), 5).double()

    def forward(self, x, y, edges):
        return self.layer((x, y), edges)


def test_bipartite():
    y, edges = torch.randn(7, 4, dtype=D), torch.stack([EDGES[0], EDGES[1] % 7])
    for sizes in ((4, 3), (7, 0)):
        T.hold(Bipartite(), [X, y, edges], [T.shard(0), T.shard(0, sizes), None], (2,))


def sent(width):
    """Collectives of the first and the second call of a layer on a ring of nodes."""
    n = 40
    at = torch.arange(n).repeat(5)
    edges = torch.stack([at, (at + 1) % n])
    layer = pyg.GraphConv(width, width, bias=False)
    x = st.distribute_tensor(torch.randn(n, width), T.make_mesh((2,)), [Shard(0)])
    x.requires_grad_()
    found = []
    for _ in range(2):
        with st.trace() as t:
            y = layer(x, edges)
        with st.trace() as back:
            y.sum().backward()
        kinds = "take", "put"
        found.append(
            [(s.collective, s.bytes) for s in [*t.sent, *back.sent] if s.collective in kinds]
        )
    return found


def test_halo_found_once():
    """Every remote row that edges name travels once, however many do; asked for on the first call.

    Edges are shared out by number, 100 of 200 on each rank: two rounds and a half of the ring.
    """
    row = 8 * 4
    for first, again in st.simulate(2, sent, 8):
        assert len(first) > len(again)
        # 20 rows of the other rank to its edges and 20 sums of messages to it, and both back
        assert [b for _, b in again if b >= row] == [20 * row] * 4
        assert len(again) == 4


def test_an_index_that_changes_is_asked_anew():
    def run():
        x = st.distribute_tensor(torch.arange(8.0), T.make_mesh((2,)), [Shard(0)])
        index = torch.tensor([0, 7, 3, 3])
        a = x[index].full_tensor()
        b = x[index].full_tensor()
        index[0] = 5
        c = x[index].full_tensor()
        # a write that torch does not count
        index.numpy()[1] = 6
        e = x[index].full_tensor()
        index.data[1] = 7
        sharded = st.distribute_tensor(index, T.make_mesh((2,)), [Shard(0)], sizes={0: (0, 4)})
        d = x[sharded].full_tensor()
        sharded.add_(-3)
        return [t.tolist() for t in (a, b, c, e, d, x[sharded].full_tensor())]

    for found in st.simulate(2, run):
        assert found == [
            [0, 7, 3, 3], [0, 7, 3, 3], [5, 7, 3, 3], [5, 6, 3, 3], [5, 7, 3, 3], [2, 4, 0, 0],
        ]  # fmt: skip


@pytest.fixture
def small_is_large(monkeypatch):
    """Tensors of any size are cut rather than whole."""
    monkeypatch.setattr(nodes, "WHOLE", 1)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    "most", [{}, {"max_num_nodes": 4, "batch_size": 5}, {"fill_value": 2.0, "max_num_nodes": 9}]
)
def test_dense_batches(most, sharded, small_is_large):
    """Samples of different sizes, one without nodes, side by side: nodes go to where they belong."""
    of = torch.tensor([0] * 6 + [1] + [3] * 8 + [4] * 2)
    mask = to_dense_batch(X, of, **most)[1]

    def dense(x, of):
        out, found = to_dense_batch(x, of, **most)
        return out, found.double()

    for cut in ((9, 8), (5, 0, 12), (1, 14, 1, 1)):
        places = [T.shard(0, cut), T.shard(0, cut) if sharded else None]
        specs = T.hold(dense, [X, of], places, (len(cut),))
        assert specs[0].varying, (mask.shape, specs)


def test_dense_batches_gather_no_nodes(small_is_large):
    of = torch.tensor([0] * 9 + [1] * 8)

    def rank():
        x = st.distribute_tensor(X, make_mesh((2,)), [Shard(0)], src_data_rank=None)
        index = st.distribute_tensor(of, make_mesh((2,)), [Shard(0)], src_data_rank=None)
        with st.fallback("error"), st.trace() as t:
            to_dense_batch(x, index)
        return t.gathered

    assert st.simulate(2, rank) == [[], []]
