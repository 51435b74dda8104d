"""Tables of rows that are joined and read by index: what moves, and that it is the same."""

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.utils.checkpoint import checkpoint

import shardtensor as st
from shardtensor import testing as T
from shardtensor.tensor.lazy import Lazy

torch.manual_seed(0)
D = torch.float64
N, M, E = 11, 7, 30
A, B, C = torch.randn(N, 3, dtype=D), torch.randn(M, 3, dtype=D), torch.randn(4, 3, dtype=D)
INDEX = torch.randint(0, N + M, (E,))
FAR = torch.randint(-N - M, N + M, (E,))

READS = {
    "select": lambda a, b, i: torch.cat([a, b], -2).index_select(-2, i),
    "all of it": lambda a, b, i: torch.cat([a, b], -2).sin(),
    "read, then all": lambda a, b, i: (lambda z: (z.index_select(-2, i), z * z))(torch.cat([a, b], -2)),
    "three": lambda a, b, i: torch.cat([a, b, a], -2).index_select(-2, i),
    "twice": lambda a, b, i: torch.cat([torch.cat([a, b], -2), b], -2).index_select(-2, i),
    "written to": lambda a, b, i: torch.cat([a, b], -2).mul_(2).index_select(-2, i),
    "a row": lambda a, b, i: torch.cat([a, b], -2).select(-2, 12),
    "added up": lambda a, b, i: torch.zeros_like(torch.cat([a, b], -2)).index_add(-2, i, torch.cat([a, b], -2).index_select(-2, i)),
}  # fmt: skip


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("batch", [False, True])
def test_reads(read, batch):
    a, b = (A.expand(2, N, 3).clone(), B.expand(2, M, 3).clone()) if batch else (A, B)
    for cut in ((5, 6), (0, 4, 7), (3, 1, 0, 7)):
        n, d = len(cut), int(batch)
        other = (M - n + 1, *[1] * (n - 1))
        for index in (None, T.shard(0)):
            T.hold(READS[read], [a, b, INDEX], [T.shard(d, cut), T.shard(d, other), index], (n,))


@pytest.mark.parametrize("index", [FAR, FAR[:2], FAR[:0], FAR.int(), FAR.view(5, 6)])
def test_from_the_end(index):
    def read(a, b, i):
        return torch.cat([a, b])[i]

    for place in (None, T.shard(0)):
        T.hold(read, [A, B, index], [T.shard(0), T.shard(0, (4, 0, 3)), place], (3,))


def test_meshes_and_other_layouts():
    def read(a, b, c, i):
        return torch.cat([a, c, b]).index_select(0, i % (N + M + 4))

    both, one = T.On([Shard(0), Shard(0)]), T.On([Replicate(), Shard(0)])
    beside = T.On([Shard(1), Shard(0)])
    for on in (both, one, beside):
        T.hold(read, [A, B, C, INDEX], [on, on, None, None], (2, 2))
    T.hold(read, [A, B, C, INDEX], [T.shard(0), T.On([Partial()]), T.shard(0), None], (2,))


def test_what_is_written_afterwards_is_not_seen():
    def run():
        mesh = T.make_mesh((2,))
        a, b = (st.distribute_tensor(x.clone(), mesh, [Shard(0)]) for x in (A, B))
        z = torch.cat([a, b])
        assert type(z) is Lazy
        a.zero_()
        T.same(z.index_select(0, INDEX), torch.cat([A, B])[INDEX], "read")
        T.same(z, torch.cat([A, B]), "whole")

    T.simulate(2, run)


def test_out_of_bounds():
    def run(index):
        mesh = T.make_mesh((2,))
        a, b = (st.distribute_tensor(x, mesh, [Shard(0)]) for x in (A, B))
        torch.cat([a, b]).index_select(0, index)

    for bad in (N + M, -1):
        index = INDEX.clone()
        index[3] = bad
        with pytest.raises(st.RankError, match=r"IndexError.*out of bounds"):
            T.simulate(2, run, index)


def test_checkpoints_and_second_derivatives():
    def inner(a, b, i):
        return torch.cat([a, b]).index_select(0, i).sin()

    def outer(a, b, i):
        return checkpoint(inner, a, b, i, use_reentrant=False)

    def twice(a, b, i):
        (g,) = torch.autograd.grad(inner(a, b, i).square().sum(), a, create_graph=True)
        return g

    places = [T.shard(0, (5, 6)), T.shard(0, (7, 0)), None]
    a = A.clone().requires_grad_()
    for fn in (outer, twice):
        T.hold(fn, [a, B, INDEX], places, (2,))


def sent(width):
    """Sources and targets of two kinds, each edge within its rank: what is sent, and the sum."""
    mesh = T.make_mesh((2,))
    targets, sources = (
        st.distribute_tensor(torch.ones(n, width), mesh, [Shard(0)]).requires_grad_()
        for n in (6, 10)
    )
    edges = torch.tensor([[6, 7, 8, 9, 11, 12, 15, 14], [0, 0, 1, 2, 3, 3, 5, 4]])
    edges = st.distribute_tensor(edges, mesh, [Shard(1)])
    found = []
    for _ in range(2):
        with st.trace() as t:
            nodes = torch.cat([targets, sources])
            messages = nodes.index_select(0, edges[0]) - nodes.index_select(0, edges[1])
            index = edges[1].view(-1, 1).expand_as(messages)
            # as PyTorch Geometric adds up messages
            out = messages.new_zeros(6, width).scatter_add_(0, index, messages)
            out.sum().backward()
        assert tuple(out.spec.sizes[0]) == (3, 3) and not t.gathered
        found.append(sum(s.bytes for s in t.sent if s.collective in ("take", "put", "window")))
    return found


def test_only_rows_that_are_needed_travel():
    # every edge has both of its ends on its own rank
    for first, again in T.simulate(2, sent, 100):
        assert again == 0 and first < 400
