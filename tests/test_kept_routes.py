"""Edge lists that are used again where comparing them waits for a device: what is asked and when."""

import pytest
import torch
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh
from shardtensor.rules import routes

D = torch.float64
N, E = 12, 30


@pytest.fixture
def compared(monkeypatch):
    """Indices are taken to lie where comparing them waits; the comparisons."""
    found, equal = [], torch.equal
    monkeypatch.setattr(routes, "waits", lambda x: True)
    monkeypatch.setattr(torch, "equal", lambda a, b: found.append(a) or equal(a, b))
    return found


def edges(seed=0):
    return torch.randint(N, (2, E), generator=torch.Generator().manual_seed(seed))


def layer(x, edge_index):
    """Messages along edges, added up at their targets, and the largest."""
    messages, to = (x[edge_index[0]] - x[edge_index[1]]).relu(), edge_index[1]
    largest = x.scatter_reduce(0, to[:, None].expand(-1, 2), messages, "amax")
    return torch.zeros_like(x).index_add(0, to, messages) + largest


def passed(change, cut, times=3):
    """On each rank: values and messages of layers, the edges being changed before each but one."""
    mesh, nodes = make_mesh((2,)), torch.arange(2.0 * N, dtype=D).view(N, 2).cos()
    x = st.distribute_tensor(nodes, mesh, [Shard(0)], src_data_rank=None)
    plain = given = edges()
    if cut:
        given = st.distribute_tensor(plain, mesh, [Shard(1)], src_data_rank=None)
    found = []
    for i in range(times):
        if i:
            given, plain = change(given, i), change(plain.clone() if cut else plain, i)
        with st.trace() as t:
            y = layer(x, given).full_tensor()
        found.append((y, layer(nodes, plain), len(t.sent)))
    return found


def kept(edge_index, i):
    return edge_index


def written(edge_index, i):
    edge_index[1, 3 * i] = (edge_index[1, 3 * i] + 5) % N
    return edge_index


def as_another(edge_index, i):
    return edge_index.detach()


@pytest.mark.parametrize("cut", [False, True], ids=["plain", "cut"])
@pytest.mark.parametrize("change", [kept, written, as_another])
def test_values(change, cut, compared):
    for found in st.simulate(2, passed, change, cut):
        for got, want, _ in found:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cut", [False, True], ids=["plain", "cut"])
def test_edges_that_nobody_wrote_to_are_not_compared(cut, compared):
    for found in st.simulate(2, passed, kept, cut):
        # rows of neighbours, put and brought; of cut edges agreements on each, and on how they lie
        first, *later = (n for *_, n in found)
        assert all(n < first for n in later)
        assert later == [(9 if cut else 4) + 1] * 2
    assert not compared


def test_all_ranks_ask_alike_whatever_they_still_keep(compared, monkeypatch):
    """A rank on which edges live longer drops what others have still."""
    monkeypatch.setattr(routes, "_MOST", 4)

    def run():
        mesh, whole, living = make_mesh((2,)), torch.randn(N, 2, dtype=D), []
        x = st.distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
        e = edges()
        for n in range(7):
            for i in range(n):
                other = edges(i)
                x[other[0]]
                if mesh.get_rank():
                    living.append(other)
            assert torch.equal(x[e[0]].full_tensor(), x.full_tensor()[e[0]])

    st.simulate(2, run)


def test_an_index_that_was_written_to_is_kept_as_long_as_a_new_one(compared, monkeypatch):
    monkeypatch.setattr(routes, "_MOST", 4)

    def run():
        mesh, whole, living = make_mesh((2,)), torch.randn(N, 2, dtype=D), []
        x = st.distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)

        def ask(index):
            assert torch.equal(x[index].full_tensor(), x.full_tensor()[index])

        e = edges()[0]
        ask(e)
        for i in range(4):
            other = edges(i)[0]
            # on one rank the others live longer
            living += [other] * mesh.get_rank()
            if i == 3:
                e.copy_(e.flip(0))
                ask(e)
            ask(other)
        ask(e)

    st.simulate(2, run)


def test_writes_that_torch_has_not_counted_are_told_by_hand(compared):
    def run():
        mesh = make_mesh((2,))
        whole = torch.randn(N, 2, dtype=D)
        x = st.distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
        e = edges()[0]
        for i in range(3):
            assert torch.equal(x[e].full_tensor(), x.full_tensor()[e])
            e.data.copy_(edges(i + 1)[0])
            torch.autograd.graph.increment_version(e)

    st.simulate(2, run)
