"""Rows of few numbers by an index, in parts: values, what is sent, and what it takes."""

import growth
import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor._torch.world import silent_world
from shardtensor.comm import groups, route
from shardtensor.ranks.measure import peak_bytes
from shardtensor.rules import routes
from shardtensor.spec import Spec
from shardtensor.tensor import wrap

D = torch.float64
N = 21
CUTS = [(21,), (20, 1), (7, 0, 14), (5, 6, 5, 5)]


@pytest.fixture(autouse=True)
def parts(monkeypatch):
    """Shards of any size travel in parts; the parts of each way."""
    monkeypatch.setattr(route, "ROUND", 16)
    found, plain = [], route._in_parts

    def counted(index, sizes, group, parts):
        found.append(parts)
        return plain(index, sizes, group, parts)

    monkeypatch.setattr(route, "_in_parts", counted)
    return found


def read(x, at):
    y = x[at].sin()
    return y, *torch.autograd.grad(y.square().sum(), [x], create_graph=True)


def added(x, at, v):
    return x.index_add(0, at, v).sin()


def put(x, at, v):
    return x.index_copy(0, at, v).sin()


def indices():
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(N, generator=g)
    return {
        "an order": order,
        "some": order[:9],
        "few of many": torch.randint(3, (2 * N,), generator=g),
        "any": torch.randint(-N, N, (3, 11), generator=g),
        "one": torch.full((N,), 4),
    }


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("of", indices())
@pytest.mark.parametrize("width", [(), (3,)])
def test_values(of, cut, width, parts):
    g, at, mesh = torch.Generator().manual_seed(1), indices()[of], (len(cut),)
    x = torch.randn(N, *width, dtype=D, generator=g)
    places = [[T.shard(0, cut), None], [T.shard(0, cut), T.shard(0)]]
    T.hold_all(read, [x, at], places, mesh)
    if at.ndim == 1:
        v = torch.randn(len(at), *width, dtype=D, generator=g)
        places = [[T.shard(0, cut), d, d] for d in (None, T.shard(0))]
        T.hold_all(added, [x, at, v], places, mesh)
        if of in ("an order", "some"):
            T.hold_all(put, [x, at, v], places, mesh)
    assert len(cut) == 1 or max(parts) > 1


AXES = [
    ([Shard(0), Replicate()], [Replicate(), Shard(0)]),
    ([Shard(0), Shard(0)], [Replicate(), Replicate()]),
    ([Shard(0), Shard(1)], [Replicate(), Replicate()]),
    ([Replicate(), Shard(0)], [Shard(0), Shard(1)]),
]


@pytest.mark.parametrize(("rows", "entries"), AXES)
@pytest.mark.parametrize("of", ["an order", "any"])
def test_values_on_two_axes(of, rows, entries, parts):
    at = indices()[of].view(3, -1)
    x = torch.randn(N, 3, dtype=D, generator=torch.Generator().manual_seed(1))
    T.hold(read, [x, at], [T.On(rows), T.On(entries)], (2, 2))
    assert max(parts) > 1


def sent(at):
    x = torch.arange(N, dtype=D)
    x = st.distribute_tensor(x, T.make_mesh((4,)), [Shard(0)], src_data_rank=None)
    x[at]
    with st.trace() as t:
        x[at]
    return t.bytes


@pytest.mark.parametrize("of", indices())
def test_each_row_is_sent_once(of, monkeypatch):
    at = indices()[of]
    parted = st.simulate(4, sent, at)
    monkeypatch.setattr(route, "ROUND", 2**30)
    assert st.simulate(4, sent, at) == parted


@pytest.mark.parametrize("width", [(), (3,)])
def test_what_it_takes(width, monkeypatch):
    monkeypatch.setattr(route, "ROUND", 2**14)
    ranks, n = 8, 2**19
    with silent_world(1, ranks), groups.taken_spread():
        spec = Spec.of(T.make_mesh((ranks,)), [Shard(0)], (n, *width))
        x = wrap(torch.zeros(spec.local_shape), spec).requires_grad_()
        at = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        y = x[at]
        share = y._local.nbytes
        # the result, and of a part what leaves or is placed, and what arrives
        assert peak_bytes(lambda: x.detach()[at]) < 1.25 * share
        assert peak_bytes(lambda: torch.autograd.grad(y, x, y.detach())) < 1.25 * share


@pytest.mark.parametrize("again", [False, True])
def test_what_a_new_index_takes(again, monkeypatch):
    monkeypatch.setattr(route, "ROUND", 2**14)
    monkeypatch.setattr(route, "_SOME", 2**12)
    monkeypatch.setattr(routes, "_LONG", 0)
    ranks, n = 8, 2**19
    with silent_world(1, ranks), groups.taken_spread():
        spec = Spec.of(T.make_mesh((ranks,)), [Shard(0)], (n,))
        x, g = wrap(torch.zeros(spec.local_shape), spec), torch.Generator().manual_seed(0)
        at = torch.randint(n, (2, n), generator=g) if again else torch.randperm(n, generator=g)
        at = at.view(-1, n)
        share, new = x[at[0]]._local.nbytes, at[-1].flip(0)
        # in 4 bytes each: the result, rows that others ask for, where entries go, what is compared;
        # to put them in order as much as four; with rows that have more entries: which, and on the
        # way the same in another order, too
        assert peak_bytes(lambda: x[new]) < (6.5 if again else 4.5) * share


@pytest.mark.parametrize("waits", [False, True])
def test_a_long_index_is_compared_exactly(waits, monkeypatch):
    monkeypatch.setattr(routes, "_LONG", 0)
    monkeypatch.setattr(routes, "waits", lambda x: waits)
    at = torch.arange(N)
    for other, same in ((at.clone(), True), (at + 2**32, False), (at.flip(0), False)):
        assert routes._same(routes._copy(at), other) == same
    assert routes._copy(at).dtype == torch.int32
    assert torch.equal(routes._copy(at + 2**32), at + 2**32)


def test_ranks_send_alike_where_only_one_index_is_long(monkeypatch):
    monkeypatch.setattr(route, "_LONG", 2 * N)
    at = torch.arange(N).repeat(3)[: 2 * N + 8]
    x = torch.randn(N, dtype=D)
    T.hold(read, [x, at], [T.shard(0, (8, 13)), T.shard(0, (8, 2 * N))], (2,))


def calls(ranks):
    with silent_world(1, ranks), groups.taken_spread():
        spec = Spec.of(T.make_mesh((ranks,)), [Shard(0)], (64 * ranks,))
        x, at = wrap(torch.zeros(64), spec), torch.arange(64 * ranks).flip(0)
        x[at]
        return growth.python_calls(lambda: x[at])


def test_calls_of_python_do_not_know_the_ranks():
    assert calls(64) == calls(2048)
