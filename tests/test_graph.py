"""Message passing over shards of nodes against plain tensors."""

import pytest
import torch
import torch.nn as nn
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.ops.graph import Topology

torch.manual_seed(0)
D = torch.float64
N, M, E = 13, 7, 40
X, Y, F = torch.randn(N, 3, dtype=D), torch.randn(M, 2, dtype=D), torch.randn(E, 4, dtype=D)
# node 5 has no edges
EDGES = torch.stack([torch.randint(0, N, (E,)), torch.randint(0, 5, (E,))])
EDGES[1][::3] = torch.randint(6, M, (len(EDGES[1][::3]),))


def plain_scatter(messages, at, n, reduce):
    rows = []
    for i in range(n):
        some = messages[at == i]
        zero = messages.new_zeros(messages.shape[1:])
        rows.append(
            zero if not len(some) else {
                "sum": some.sum(0), "mean": some.mean(0), "max": some.amax(0), "min": some.amin(0)
            }[reduce]
        )  # fmt: skip
    return torch.stack(rows)


def passed(x, y, f, edges, reduce):
    """Messages from sources, targets and edges, reduced; and the messages in their first order."""
    if any(isinstance(t, st.ShardTensor) for t in (x, y, f, edges)):
        t = Topology(edges, x, y)
        messages = torch.cat([t.gather(x), t.gather_targets(y), t.edges(f)], 1).sin()
        return t.scatter(messages, reduce), t.original(messages)
    messages = torch.cat([x[edges[0]], y[edges[1]], f], 1).sin()
    return plain_scatter(messages, edges[1], len(y), reduce), messages


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "min"])
def test_bipartite(reduce):
    for cut in T.cuts(M):
        n = len(cut)
        own = (N - n + 1, *[1] * (n - 1))
        for edges, features in ((None, None), (T.shard(1), None), (None, T.shard(0)),
                                (T.shard(1, (*[0] * (n - 1), E)), T.shard(0))):  # fmt: skip
            T.hold(
                passed,
                [X, Y, F, EDGES, reduce],
                [T.shard(0, own), T.shard(0, cut), features, edges, None],
                (n,),
            )


def test_two_axes_and_beside_one():
    both = T.On([Shard(0), Shard(0)])
    for edges in (None, T.On([Shard(1), Shard(1)]), T.On([Shard(1), Replicate()])):
        T.hold(passed, [X, Y, F, EDGES, "sum"], [both, both, None, edges, None], (2, 2))
    one = T.On([Replicate(), Shard(0)])
    T.hold(passed, [X, Y, F, EDGES, "mean"], [one, one, None, None, None], (2, 2))


class MeshGraphNet(nn.Module):
    """Edge and node updates (Pfaff et al. 2021) on a topology."""

    def __init__(self, width=4):
        super().__init__()
        self.edge = nn.Sequential(nn.Linear(3 * width, 8), nn.GELU(), nn.Linear(8, width))
        self.node = nn.Sequential(nn.Linear(2 * width, 8), nn.GELU(), nn.Linear(8, width))

    def forward(self, x, e, edges):
        if isinstance(x, st.ShardTensor):
            t = Topology(edges, x)
            e = t.edges(e)
            source, target, total = t.gather, t.gather_targets, t.scatter
        else:
            source, target = (lambda x: x[edges[0]]), (lambda x: x[edges[1]])

            def total(e):
                return torch.zeros_like(x).index_add(0, edges[1], e)

        for _ in range(2):
            e = e + self.edge(torch.cat([e, source(x), target(x)], -1))
            x = x + self.node(torch.cat([x, total(e)], -1))
        return x


def test_mesh_graph_net():
    net = MeshGraphNet().double()
    x, edges = torch.randn(N, 4, dtype=D), torch.randint(0, N, (2, E))
    for cut in T.cuts(N):
        T.hold(net, [x, F, edges], [T.shard(0, cut), None, None], (len(cut),))


def ring(n, rows, width, forward):
    """Nodes in a ring, each linked to the next, thrice."""
    x = torch.randn(n * rows, width)
    at = torch.arange(n * rows).repeat(3)
    edges = torch.stack([at, (at + 1) % (n * rows)])
    s = st.distribute_tensor(x, T.make_mesh((n,)), [Shard(0)], src_data_rank=None)
    t = Topology(edges, s.requires_grad_())
    with st.trace() as there:
        y = t.scatter(t.gather(s))
    with st.trace() as back:
        y._local.sum().backward()
    return [[(c.collective, c.bytes, c.messages) for c in trace.sent] for trace in (there, back)]


def test_a_halo_row_travels_once():
    for there, back in st.simulate(4, ring, 4, 10, 6, True):
        assert there == [("take", 6 * 4, 1)]
        assert back == [("put", 6 * 4, 1)]


def test_refusals():
    with pytest.raises(ValueError, match="edge_index"):
        Topology(EDGES.float(), X)
    with pytest.raises(IndexError, match="nodes"):
        Topology(EDGES + N, X)
    t = Topology(EDGES, X, Y)
    with pytest.raises(ValueError, match="rows"):
        t.gather(Y)
    with pytest.raises(ValueError, match="reduce"):
        t.scatter(F, "median")

    def mixed():
        mesh = T.make_mesh((2, 2))
        x = st.distribute_tensor(X, mesh, [Shard(0), Replicate()])
        y = st.distribute_tensor(Y, mesh, [Replicate(), Shard(0)])
        Topology(EDGES, x, y)

    def outside():
        x = st.distribute_tensor(X, T.make_mesh((2,)), [Shard(0)])
        bad = EDGES.clone()
        bad[0, -1] = N
        Topology(st.distribute_tensor(bad, T.make_mesh((2,)), [Shard(1)]), x)

    with pytest.raises(st.RankError, match="sharded by mesh axes"):
        st.simulate(4, mixed)
    with pytest.raises(st.RankError, match="IndexError"):
        st.simulate(2, outside)


def test_plain_topology():
    t = Topology(EDGES, X, Y)
    f = t.edges(F)
    assert torch.equal(t.gather(X), X[EDGES[0]][t.order]) and torch.equal(f, F[t.order])
    assert torch.equal(t.edge_index, EDGES[:, t.order]) and (t.edge_index[1].diff() >= 0).all()
    for reduce in ("sum", "mean", "max", "min"):
        want = plain_scatter(F, EDGES[1], M, reduce)
        assert torch.allclose(t.scatter(f, reduce), want, rtol=1e-12)
    assert torch.equal(t.original(f), F)


@pytest.mark.parametrize("place", [Shard(0), Shard(1), Replicate()])
def test_edges_that_are_cut_anywhere(place):
    index = torch.tensor([[0, 1, 2, 3, 1], [1, 2, 3, 0, 0]])
    x = torch.arange(8.0, dtype=torch.float64).view(4, 2)
    want = torch.zeros(4, 2, dtype=torch.float64).index_add(0, index[1], x[index[0]])

    def run():
        mesh = T.make_mesh((3,))
        nodes = st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)
        edges = st.distribute_tensor(index, mesh, [place], src_data_rank=None)
        t = st.graph.Topology(edges, nodes)
        T.same(t.scatter(t.gather(nodes)), want, "messages")

    T.simulate(3, run)
