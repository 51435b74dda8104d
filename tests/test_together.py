"""Small gradients of replicated tensors are summed over the ranks together, whatever else happens."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.autograd.graph import GradientEdge
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import shardtensor as st
from shardtensor import later
from shardtensor import testing as T
from shardtensor.comm import together

D = torch.float64


class Block(nn.Module):
    """Shifted, scaled and gated by a condition, with a squeeze and excitation."""

    def __init__(self, n, squeeze):
        super().__init__()
        self.condition, self.linear = nn.Linear(n, 3 * n), nn.Linear(n, n)
        self.squeeze = nn.Linear(n, n) if squeeze else None

    def forward(self, x, c):
        a, b, g = self.condition(c).chunk(3, -1)
        y = self.linear(x * (1 + a) + b)
        if self.squeeze is not None:
            y = y * torch.sigmoid(self.squeeze(y.mean(1, keepdim=True)))
        return x + g * torch.tanh(y)


class Conditioned(nn.Module):
    def __init__(self, n=4, depth=3, squeeze=False):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(n, squeeze) for _ in range(depth))
        self.condition = nn.Parameter(torch.randn(1, 1, n))
        self.again = False

    def forward(self, x):
        # met by shards in every block, by plain ops, and whole
        shared = self.condition.exp()
        for block in self.blocks:
            if self.again:
                x = checkpoint(block, x, self.condition, use_reentrant=self.again == "reentrant")
            else:
                x = block(x, self.condition)
            x = x + shared
        return x.square().mean() + shared.sum()


@pytest.fixture(autouse=True)
def no_fsdp(monkeypatch):
    """As in a process in which no other test has used FSDP2."""
    monkeypatch.setattr(later, "fsdp_classes", list)


def batch():
    torch.manual_seed(1)
    return torch.randn(2, 7, 4, dtype=D)


def gradients(run, cut=None, parallel=False, depth=3, squeeze=False):
    """run(model, x)'s value and all gradients."""
    model, x = Conditioned(4, depth, squeeze).to(D), batch()
    if cut is not None:
        mesh = T.make_mesh((len(cut),))
        x = st.distribute_tensor(x, mesh, [Shard(1)], src_data_rank=None, sizes={1: cut})
        if parallel:
            st.parallelize(model, mesh)
    x.requires_grad_()
    value = run(model, x)
    grads = [p.grad for p in model.parameters()]
    return T.full(value), [T.full(g) for g in (x.grad, *grads)]


def once(model, x):
    loss = model(x)
    loss.backward()
    return loss.detach()


def kept(model, x):
    loss = model(x)
    loss.backward(retain_graph=True)
    loss.backward()
    return loss.detach()


def some_of(model, x):
    found = torch.autograd.grad(model(x), [model.condition, model.blocks[1].condition.bias])
    (found[0].sum() + found[1].sum() + model(x)).backward()
    return torch.cat([found[0].flatten(), found[1]])


def twice(model, x):
    wanted = [x, model.condition, model.blocks[0].condition.weight]
    found = torch.autograd.grad(model(x), wanted, create_graph=True)
    penalty = sum(g.square().sum() for g in found)
    penalty.backward()
    return penalty.detach()


def broken(model, x):
    def error(_):
        raise FloatingPointError

    handle = model.blocks[0].linear.bias.register_hook(error)
    with pytest.raises(FloatingPointError):
        model(x).backward()
    handle.remove()
    x.grad = None
    model.zero_grad()
    return once(model, x)


def recomputed(model, x):
    model.again = "reentrant"
    loss = once(model, x)
    model.again = "plain"
    return loss + once(model, x)


PROGRAMS = [once, kept, some_of, twice, broken, recomputed]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("calls, small", [(1024, 2**16), (2, 2**16), (1024, 0)])
def test_gradients(program, calls, small, monkeypatch):
    """Also where one sum leads to the next, and more often than sums wait for others."""
    monkeypatch.setattr(together, "CALLS", calls)
    monkeypatch.setattr(together, "SMALL", small)
    want, wanted = gradients(program, squeeze=True)
    for cut in ((4, 3), (0, 5, 2)):
        for parallel in (False, True):
            for got, found in st.simulate(len(cut), gradients, program, cut, parallel, 3, True):
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def sent(depth):
    """The bytes of each message of a backward, least first."""
    mesh = T.make_mesh((2,))
    model = st.parallelize(Conditioned(4, depth).to(D), mesh)
    loss = model(st.distribute_tensor(batch(), mesh, [Shard(1)], src_data_rank=None))
    with st.trace() as t:
        loss.backward()
    return sorted(s.bytes for s in t.sent)


@pytest.mark.parametrize("depth", [1, 5])
def test_conditions_of_all_blocks_travel_in_one_message(depth):
    for found in st.simulate(2, sent, depth):
        # one of parameters, and three of each block with what is shared by all: once
        assert len(found) == 2 and found[0] == 8 * 4 * (3 * depth + 1)


def _large(uses):
    """One tensor that meets shards several times: the bytes of each message, and its gradient."""
    mesh = T.make_mesh((2,))
    x = st.distribute_tensor(torch.ones(4, 50, dtype=D), mesh, [Shard(0)], src_data_rank=None)
    leaf = torch.ones(50, dtype=D, requires_grad=True)
    c = leaf * 2
    loss = sum((x * c * (i + 1)).sum() for i in range(uses)) + (x * c.sin()).sum()
    with st.trace() as t:
        loss.backward()
    return [s.bytes for s in t.sent], leaf.grad


@pytest.mark.parametrize("small", [2**16, 0])
def test_uses_of_one_tensor_are_added_up_before(small, monkeypatch):
    monkeypatch.setattr(together, "SMALL", small)
    for found, grad in st.simulate(2, _large, 3):
        assert found == ([800] if small else [400, 400])
        want = torch.full((50,), 2 * 4 * 6 + 2 * 4 * torch.tensor(2.0, dtype=D).cos().item())
        torch.testing.assert_close(grad, want.to(D))


def test_most_that_waits(monkeypatch):
    monkeypatch.setattr(together, "MOST", 8 * 4 * 7)
    assert {len(found) for found in st.simulate(2, sent, 5)} == {3 + 1}
    monkeypatch.setattr(together, "SMALL", 0)
    # what is shared by all is one tensor
    assert {len(found) for found in st.simulate(2, sent, 5)} == {3 * 5 + 1 + 1}


def _others():
    """Groups of both axes of a mesh, dtypes, an operand that was written to between its uses."""
    mesh = T.make_mesh((2, 2))
    leaf = torch.linspace(-1, 1, 6, dtype=D).requires_grad_()
    x = torch.linspace(0, 3, 24, dtype=D).view(4, 6)
    plain = [x, x.float()]
    rows = st.distribute_tensor(plain[0], mesh, [Shard(0), Replicate()], src_data_rank=None)
    both = st.distribute_tensor(plain[1], mesh, [Shard(0), Shard(0)], src_data_rank=None)
    found = []
    for a, b in (plain, (rows, both)):
        c = leaf * 2
        y = (a * c).sum() + (b * c.float()).sum()
        z = (a * c.sin_()).sum() + (b * c.float()).sum()
        with st.trace() as t:
            (g,) = torch.autograd.grad(y.square() + z, [leaf])
        found.append((g, len(t.sent)))
    return found


def test_groups_dtypes_and_what_was_written_to():
    for (want, _), (got, sent) in st.simulate(4, _others):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        assert sent == 2


def _penalty(cut=None):
    """Gradients of gradients through a write to a view that is gone, beside what came after."""
    x = torch.linspace(-1, 1, 12, dtype=D).view(4, 3)
    if cut is not None:
        mesh = T.make_mesh((len(cut),))
        x = st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None, sizes={0: cut})
    leaf = torch.ones(4, dtype=D).requires_grad_()
    found = []
    for _ in range(2):
        c = leaf * 2
        c[1:].expm1_()
        y = (x.mT @ c[:4]).sin()
        (g,) = torch.autograd.grad(y.sum(), [leaf], create_graph=True)
        more = (x.mT @ c.cos()).square().sum()
        found.append(torch.autograd.grad(g.square().sum() + T.full(more), [leaf])[0])
    return found


@pytest.mark.parametrize("cut", [(2, 2), (1, 0, 3)])
def test_gradients_of_gradients_through_what_was_written_to(cut):
    for got in st.simulate(len(cut), _penalty, cut):
        torch.testing.assert_close(got, _penalty(), rtol=1e-9, atol=1e-12)


def _halves():
    """A backward that ends between the two nodes, and another that goes on from there."""
    mesh = T.make_mesh((2,))
    x = st.distribute_tensor(torch.ones(4, 3, dtype=D), mesh, [Shard(0)], src_data_rank=None)
    leaf = torch.ones(3, dtype=D, requires_grad=True)
    y = x * (leaf * 2)
    start = y._local.grad_fn.next_functions[1][0]
    wait = start.next_functions[0][0]
    (part,) = torch.autograd.grad(y.sum(), [GradientEdge(wait, 0)])
    (g,) = torch.autograd.grad([GradientEdge(wait, 0)], [leaf], [part])
    return part, g


def test_a_backward_in_two_parts():
    for part, g in st.simulate(2, _halves):
        assert part.tolist() == [2.0] * 3 and g.tolist() == [8.0] * 3


def test_beside_fsdp_nothing_waits(monkeypatch):
    """Its hooks let no part of a module's backward be left."""
    monkeypatch.setattr(later, "fsdp_classes", FSDPModule.__subclasses__)

    def run():
        module = fully_shard(nn.Linear(2, 2), mesh=T.make_mesh((2,)))
        return sent(2), module

    for found, _ in st.simulate(2, run):
        assert len(found) == 3 * 2 + 1 + 1


def test_the_first_node_of_a_thread_comes_before_what_waits():
    """A weight that meets shards first of all sends its gradient before those that wait, on each rank.

    Which of two nodes of one number runs first differs from rank to rank.
    """

    def numbers():
        together.begin()
        weight = torch.ones(3, requires_grad=True)
        return [weight.view_as(weight).grad_fn._sequence_nr(), together.CALLS]

    # a new thread, whose first node it is
    with ThreadPoolExecutor(1) as pool:
        first, highest = pool.submit(numbers).result()
    assert first > highest


@pytest.mark.parametrize("cut", [(12, 0), (0, 12), (5, 0, 7)])
@pytest.mark.parametrize("width, calls", [(4, 1024), (4, 2), (4, 3), (4, 5), (128, 1024)])
def test_parts_of_one_round_are_sent_in_one_order(cut, width, calls, monkeypatch):
    """Of keys and values, whose sums come in one round, those of their weights come in another.

    Which is first depends on the nodes that a rank has: a shard without rows is contiguous, for
    which a linear layer has fewer of them.
    """
    monkeypatch.setattr(together, "CALLS", calls)
    torch.manual_seed(0)
    x = torch.randn(2, sum(cut), width, dtype=torch.float64)
    weight, bias = torch.randn(3 * width, width).double(), torch.randn(3 * width).double()

    def step(x):
        w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        rows = x.transpose(0, 1)
        q, k, v = (
            F.linear(rows, *each).contiguous().view(sum(cut), 4, -1).transpose(0, 1)
            for each in zip(w.chunk(3), b.chunk(3), strict=True)
        )
        torch.bmm((torch.bmm(q, k.mT) / width).softmax(-1), v).square().mean().backward()
        return w.grad, b.grad

    want = step(x)

    def run():
        mesh = T.make_mesh((len(cut),))
        return step(st.distribute_tensor(x, mesh, [Shard(1)], src_data_rank=None, sizes={1: cut}))

    for got in st.simulate(len(cut), run):
        for a, b in zip(got, want, strict=True):
            assert (a - b).abs().max() < 1e-9
