"""A graph cut by one call, kept in files, and its layers in chunks, against plain tensors."""

import pytest
import torch
import torch.nn as nn
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64
N, M, E, F = 17, 9, 50, 40
X, Y = torch.randn(N, 3, dtype=D), torch.randn(M, 2, dtype=D)
VALUES = torch.randn(E, 2, dtype=D)
# some nodes of each kind have no edges
THERE = torch.stack([torch.randint(0, N - 2, (E,)), torch.randint(0, M - 2, (E,))])
BACK = torch.stack([torch.randint(0, M, (F,)), torch.randint(1, N, (F,))])
EDGES = {("grid", "mesh"): THERE, ("mesh", "grid"): BACK}
CUTS = [(17,), (9, 8), (5, 0, 12), (1, 14, 1, 1)]


def grid(cut, mesh=None, on=None):
    mesh = mesh or T.make_mesh((len(cut),))
    return st.distribute_tensor(X, mesh, on or [Shard(0)], src_data_rank=None, sizes={0: cut})


def there_and_back(x, y, values, graph=None):
    """Messages to the mesh, and what it makes of them back."""
    if graph is None:
        messages = torch.cat([x[THERE[0]], y[THERE[1]], values], 1).sin()
        y = torch.zeros(M, messages.shape[1], dtype=D).index_add(0, THERE[1], messages)
        return torch.zeros(N, y.shape[1], dtype=D).index_add(0, BACK[1], y[BACK[0]].tanh())
    t = graph.edges["grid", "mesh"]
    messages = torch.cat([t.gather(x), t.gather_targets(y), t.edges(values)], 1).sin()
    y, t = t.scatter(messages), graph.edges["mesh", "grid"]
    return t.scatter(t.gather(y).tanh())


def run(cut, folder=None):
    """(the result, gradients, indices of halos that were asked for)."""
    x, y, values = grid(cut).requires_grad_(), Y.clone().requires_grad_(), VALUES.clone()
    with st.trace() as t:
        graph = st.graph.cut({"grid": x, "mesh": M}, EDGES, folder=folder)
    out = there_and_back(x, graph.shard("mesh", y), values, graph)
    (out**2).sum().backward()
    assert torch.equal(graph.restore("mesh", graph.shard("mesh", Y)).full_tensor(), Y)
    asked = sum(c.bytes for c in t.sent if c.collective == "take")
    return out.detach(), x.grad, y.grad, asked


def wanted():
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    out = there_and_back(x, y, VALUES)
    (out**2).sum().backward()
    return out.detach(), x.grad, y.grad


def held(found, what):
    for got in found:
        for a, b in zip(got, wanted(), strict=False):
            T.same(a, b, what)
    return [got[-1] for got in found]


@pytest.mark.parametrize("cut", CUTS)
def test_cut(cut):
    held(st.simulate(len(cut), run, cut), "cut")


def test_files(tmp_path):
    first = held(T.simulate(3, run, (5, 0, 12), tmp_path), "made")
    again = held(T.simulate(3, run, (5, 0, 12), tmp_path), "read")
    assert any(first) and not any(again)
    # for another cut, and another number of ranks, it is made anew
    assert any(held(T.simulate(3, run, (6, 6, 5), tmp_path), "another cut"))
    assert any(held(T.simulate(2, run, (9, 8), tmp_path), "fewer ranks"))
    assert not any(held(T.simulate(2, run, (9, 8), tmp_path), "fewer ranks, read"))
    file = tmp_path / "graph-1-of-2.pt"
    for damaged in (b"", file.read_bytes()[:200], b"no file at all"):
        file.write_bytes(damaged)
        assert any(held(T.simulate(2, run, (9, 8), tmp_path), "damaged"))


def test_files_of_other_edges(tmp_path):
    T.simulate(2, run, (9, 8), tmp_path)

    def other(edges):
        graph = st.graph.cut({"grid": grid((9, 8)), "mesh": M}, edges, folder=tmp_path)
        found = graph.edges["grid", "mesh"].edge_index.full_tensor()
        return torch.stack([found[0], graph.nodes["mesh"].order[found[1]]])

    changed = THERE.clone()
    changed[0, 7] = (changed[0, 7] + 1) % N
    for edges in (changed, THERE[:, :-1], THERE.flip(1)):
        (found, _) = T.simulate(2, other, {("grid", "mesh"): edges})
        assert sorted(found.T.tolist()) == sorted(edges.T.tolist())


@pytest.mark.parametrize("error", [OSError("no space"), RuntimeError("PytorchStreamWriter failed")])
def test_nothing_is_left_of_a_file_that_was_not_written(tmp_path, monkeypatch, error):
    save, turns = torch.save, []

    def on_one_rank(kept, file):
        turns.append(kept)
        if len(turns) == 2:
            file.write(b"a part")
            raise error
        save(kept, file)

    monkeypatch.setattr(torch, "save", on_one_rank)
    with pytest.raises(st.RankError, match="cannot be written"):
        T.simulate(2, run, (9, 8), tmp_path)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("graph-")


def unwritten(tmp_path):
    return st.graph.cut({"grid": grid((9, 8)), "mesh": M}, EDGES, folder=tmp_path / "file" / "x")


def test_edges_of_equal_sums_are_other_edges(tmp_path):
    """9 to 6 and 0 to 5, whose weighted sums by place are the same."""
    x = torch.randn(12, 2, dtype=D, generator=torch.Generator().manual_seed(0))
    for a, b in ((0, 9), (5, 6)):
        e = torch.tensor([[a, b, 3], [1, 2, 3]])

        def rank(e=e):
            shards = st.distribute_tensor(x, T.make_mesh((2,)), [Shard(0)], src_data_rank=None)
            graph = st.graph.cut({"a": shards}, {("a", "a"): e}, folder=tmp_path).edges["a", "a"]
            return graph.scatter(graph.gather(shards)).full_tensor()

        want = torch.zeros_like(x).index_add(0, e[1], x[e[0]])
        assert all(torch.equal(y, want) for y in st.simulate(2, rank))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(st.RankError, match="cannot be written"):
        T.simulate(2, unwritten, tmp_path)


def test_nodes_follow_their_neighbours():
    """A mesh numbered at random along a line of cells: all edges within their rank but at its ends."""
    n, m = 64, 16
    shuffled = torch.randperm(m, generator=torch.Generator().manual_seed(1))
    edges = torch.stack([torch.arange(n), shuffled[torch.arange(n) // 4]])

    def halo(order):
        place = torch.empty_like(order)
        place[order] = torch.arange(m)
        x = st.distribute_tensor(torch.zeros(n), T.make_mesh((4,)), [Shard(0)])
        graph = st.graph.cut(
            {"grid": x, "mesh": m}, {("grid", "mesh"): torch.stack([edges[0], place[edges[1]]])}
        )
        route = graph.edges["grid", "mesh"]._route
        return graph.nodes["mesh"], sum(route.gives) - route.gives[x.device_mesh.get_local_rank()]

    followed = st.graph.follow(edges, m)
    assert torch.equal(shuffled, followed)
    for order, same in ((torch.arange(m), False), (followed, True)):
        for part, halos in T.simulate(4, halo, order):
            assert part.sizes == (4, 4, 4, 4) and halos == 0
            assert torch.equal(part.order, torch.arange(m)) == same


class Layer(nn.Module):
    """Attention of targets to their edges, which it updates."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.edge, self.node = nn.Linear(7, 4), nn.Linear(6, 5)
        self.most = 0

    def forward(self, t, x, y, e):
        messages = self.edge(torch.cat([t.gather(x), t.gather_targets(y), e], -1)).tanh()
        local = messages._local if isinstance(messages, st.ShardTensor) else messages
        self.most = max(self.most, len(local))
        return self.node(torch.cat([t.scatter(messages, "mean"), y], -1)), messages


def in_chunks(x, y, e, chunks, keep=False):
    """chunks None: the layer as it is."""
    layer = Layer().double()
    t = st.graph.Topology(THERE, x, y)
    e = t.edges(e)
    if chunks is None:
        out, messages = layer(t, x, y, e)
    else:
        out, messages = st.graph.chunked(layer, t, x, y, e, chunks=chunks, keep=keep)
        edges = t._edges.sizes[x.device_mesh.get_local_rank()] if t.mesh else E
        degree = int(torch.bincount(THERE[1]).max())
        assert layer.most <= -(-edges // chunks) + degree
    return out, t.original(messages)


@pytest.mark.parametrize(("chunks", "keep"), [(1, False), (3, False), (3, True), (8, False)])
def test_chunks(chunks, keep):
    def fn(x, y, e):
        return in_chunks(x, y, e, chunks if isinstance(x, st.ShardTensor) else None, keep)

    layer = Layer().double()

    def of(x, y, e, layer):
        t = st.graph.Topology(THERE, x, y)
        return st.graph.chunked(layer, t, x, y, t.edges(e), chunks=chunks)[0]

    for cut in CUTS:
        other = T.shard(0, (M - len(cut) + 1, *[1] * (len(cut) - 1)))
        T.hold(fn, [X, Y, VALUES], [T.shard(0, cut), other, None], (len(cut),))
    one, (out, _) = of(X, Y, VALUES, layer), in_chunks(X, Y, VALUES, None)
    T.same(one, out, "chunks on one device")


def saved(chunks):
    """(bytes that forward keeps for backward, rows sent) of a layer on this rank."""
    wide = [t.repeat(1, 1) for t in (X, Y)]
    x, y = (
        st.distribute_tensor(t, T.make_mesh((2,)), [Shard(0)], src_data_rank=None).requires_grad_()
        for t in wide
    )
    layer = Layer().double()
    t = st.graph.Topology(THERE, x, y)
    e = t.edges(VALUES)
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with st.trace() as sent, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        if chunks:
            out, _ = st.graph.chunked(layer, t, x, y, e, chunks=chunks)
        else:
            out, _ = layer(t, x, y, e)
    with st.trace() as back:
        (out**2).sum().backward()
    rows = sum(c.bytes for c in sent.sent if c.collective == "take")
    returned = sum(c.bytes for c in back.sent if c.collective in ("take", "put"))
    return sum(kept.values()), len(t._rows), rows, returned


def test_chunks_keep_no_messages_and_send_each_row_once():
    for whole, some in zip(T.simulate(2, saved, 0), T.simulate(2, saved, 4), strict=True):
        kept, edges, rows, returned = whole
        # the layer keeps its messages, of 4 numbers, and what it made them of, of 7
        assert kept > edges * 11 * 8
        assert some[2:] == (rows, returned) and rows > 0
        assert some[0] < kept - edges * 11 * 8


def test_refusals():
    t = st.graph.Topology(THERE, X, Y)
    with pytest.raises(ValueError, match="at least one"):
        st.graph.chunked(Layer(), t, X, Y, chunks=0)
    with pytest.raises(ValueError, match="a row for each target"):
        st.graph.chunked(lambda t, x, y: x[:3], t, X, Y, chunks=2)

    def one(nodes, edges):
        st.graph.cut(nodes(), edges)

    for nodes, edges, message in (
        (lambda: {"grid": X, "mesh": M}, EDGES, "is a ShardTensor"),
        (lambda: {"grid": grid((9, 8))}, EDGES, "of nodes"),
        (lambda: {"grid": grid((9, 8)), "mesh": M}, {}, "no edges"),
        (lambda: {"grid": grid((9, 8)), "mesh": M, "far": 3}, EDGES, r"no edges join \['far'\]"),
        (lambda: {"grid": grid((9, 8)), "mesh": M}, {("grid", "mesh"): THERE.float()}, "int64"),
        (lambda: {"grid": grid((9, 8)), "mesh": 3}, EDGES, "outside 0..2"),
    ):
        with pytest.raises(st.RankError, match=message):
            T.simulate(2, one, nodes, edges)


class Held(nn.Module):
    def __init__(self, edges, weights):
        super().__init__()
        self.register_buffer("edges", edges)
        self.register_buffer("of_mesh", Y.clone())
        self.weights = nn.Parameter(torch.zeros(weights, 2))


def test_places_that_are_refused():
    def place(edges, weights, nodes, name):
        graph = st.graph.cut({"grid": grid((5, 12)), "mesh": M}, EDGES)
        graph.place(Held(edges, weights), nodes, {("grid", "mesh"): name})

    fine = {"mesh": "of_mesh"}
    T.simulate(2, place, THERE + torch.tensor([[M], [0]]), 3, fine, "edges")
    for args, message in (
        ((THERE, 3, fine, "weights"), "is no buffer"),
        ((THERE, M, fine, "edges"), "numbered anew"),
        ((THERE, 3, {"grid": "of_mesh"}, "edges"), "points"),
        ((THERE, 3, fine, "of_mesh"), "for 50 edges"),
        ((THERE.flip(1), 3, fine, "edges"), "another edge list"),
    ):
        with pytest.raises(st.RankError, match=message):
            T.simulate(2, place, *args)


def test_an_ensemble_axis_stays_cut():
    """Nodes cut by one axis of a mesh, members by the other."""
    members, index = torch.randn(N, 4, 3, dtype=D), torch.stack([THERE[0], THERE[1]])

    def fn(x, y):
        if not isinstance(x, st.ShardTensor):
            out = torch.zeros(M, *x.shape[1:], dtype=D).index_add(0, index[1], x[index[0]] * 2)
            return out + y
        t = st.graph.Topology(index, x, y)
        messages = t.gather(x) + t.halo(x).sum() * 0
        out = t.scatter(messages + messages) + y
        assert out.spec.dims[1].axes == x.spec.dims[1].axes != ()
        chunks = st.graph.chunked(lambda t, x, y: t.scatter(t.gather(x) * 2) + y, t, x, y, chunks=3)
        T.same(chunks, out.full_tensor(), "chunks")
        return out

    y = torch.randn(M, 4, 3, dtype=D)
    for on in ([Shard(0), Shard(1)], [Shard(1), Shard(0)]):
        T.hold(fn, [members, y], [T.On(on), T.On(on)], (2, 2))
    one = T.On([Replicate(), Shard(0)])
    T.hold(lambda x, y: fn(x, y) if not isinstance(x, st.ShardTensor) else plain(x, y, index),
           [members, y], [one, one], (2, 2))  # fmt: skip


def plain(x, y, index):
    t = st.graph.Topology(index, x, y)
    return t.scatter(t.gather(x) * 2) + y
