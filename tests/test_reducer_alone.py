"""A large gradient is summed where its kernel wrote it, if nobody else has it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import _torch
from shardtensor.ranks.testing import make_mesh

D = torch.float64


def starts(node, seen):
    """The nodes that hand in this rank's parts."""
    if node is not None and node not in seen:
        seen.add(node)
        for other, _ in node.next_functions:
            starts(other, seen)
    return [n for n in seen if n.name() == "StartBackward"]


def weighed(look, bucket_mb):
    """The weight's gradient of a step, and one device's; look sees this rank's part of it."""
    torch.manual_seed(0)
    # a bias travels with a small weight
    batch, plain = torch.randn(6, 16, dtype=D), nn.Linear(16, 16, bias=bucket_mb > 1).double()
    model, mesh = copy.deepcopy(plain), make_mesh((2,))
    plain(batch).square().sum().backward()
    st.parallelize(model, mesh, bucket_mb=bucket_mb)
    x = st.distribute_tensor(batch, mesh, [Shard(0)], src_data_rank=None)
    loss = model(x).square().sum()
    (node,) = starts(loss._local.grad_fn, set())
    node.register_prehook(lambda grads: look(grads[0]))
    loss.backward()
    return model.weight.grad, plain.weight.grad


@pytest.mark.parametrize("bucket_mb", [1e-3, 8.0])
def test_a_large_gradient_stays_where_it_was_made(bucket_mb):
    def run():
        made = []
        got, want = weighed(lambda g: made.append(g.data_ptr()), bucket_mb)
        torch.testing.assert_close(got, want)
        assert (got.data_ptr() == made[0]) == (bucket_mb < 1)

    st.simulate(2, run)


@pytest.mark.parametrize(
    "keep",
    [lambda g: g, lambda g: g._base, lambda g: g.detach(), lambda g: g[1:], lambda g: g.numpy()],
    ids=["itself", "what it is a view of", "detached", "a view", "numpy"],
)  # fmt: skip
def test_what_somebody_else_holds_stays_as_it_is(keep):
    def run():
        kept = []
        got, want = weighed(lambda g: kept.extend([keep(g), g.clone()]), 1e-3)
        torch.testing.assert_close(got, want)
        held, then = kept
        held = torch.as_tensor(held)
        # linear gives a transposed view of what its kernel wrote
        then = then.t() if held.stride(0) == 1 else then
        torch.testing.assert_close(held, then[-len(held) :])
        assert not torch.allclose(kept[1], want)

    st.simulate(2, run)


class Sum(nn.Module):
    """One gradient for three: of two weights and of what they are added to."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.ones(1, 64, dtype=D)) for _ in range(2))

    def forward(self, x):
        return x + self.a + self.b


@pytest.mark.parametrize("retain", [False, True])
def test_a_gradient_of_several(retain):
    def run():
        mesh, model = make_mesh((2,)), Sum()
        st.parallelize(model, mesh, bucket_mb=1e-3)
        x = st.distribute_tensor(torch.ones(2, 64, dtype=D), mesh, [Shard(0)], src_data_rank=None)
        x.requires_grad_()
        y = model(x)
        if retain:
            y.retain_grad()
        y.square().sum().backward()
        torch.testing.assert_close(x.grad.full_tensor(), torch.full((2, 64), 6.0, dtype=D))
        if retain:
            torch.testing.assert_close(y.grad.full_tensor(), x.grad.full_tensor())
        for w in (model.a, model.b):
            torch.testing.assert_close(w.grad, torch.full((1, 64), 12.0, dtype=D))

    st.simulate(2, run)


def test_steps_one_after_the_other():
    """Accumulated, and of a graph that is kept, and with derivatives of them."""

    def run():
        torch.manual_seed(0)
        batch = torch.randn(4, 16, dtype=D)
        plain = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)).double()
        model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)).double()
        model.load_state_dict(plain.state_dict())
        mesh = make_mesh((2,))
        st.parallelize(model, mesh, bucket_mb=1e-3)
        x = st.distribute_tensor(batch, mesh, [Shard(0)], src_data_rank=None)

        def steps(net, x):
            loss = net(x).square().sum()
            loss.backward(retain_graph=True)
            loss.backward()
            found = torch.autograd.grad(net(x).pow(3).sum(), [*net.parameters()], create_graph=True)
            sum(g.square().sum() for g in found).backward()
            return [p.grad for p in net.parameters()]

        for got, want in zip(steps(model, x), steps(plain, batch), strict=True):
            torch.testing.assert_close(got, want)

    st.simulate(2, run)


class Asked(_torch.Function):
    """The identity, which notes whether only it got its gradient."""

    @staticmethod
    def forward(ctx, x, found):
        ctx.found = found
        return x.detach()

    @staticmethod
    def backward(ctx, *grads):
        ctx.found.append(_torch.is_only_gradient(grads))
        return None, None


@pytest.mark.parametrize(
    ("op", "alone"),
    [
        (lambda x, w, v: F.linear(x, w), [True]),
        (lambda x, w, v: x @ w, [True]),
        (lambda x, w, v: x @ w + (x @ w).sin(), [True]),
        (lambda x, w, v: torch.cat([w, torch.ones(90, 4)]), [False]),
        (lambda x, w, v: torch.stack([w, v]), [False, False]),
        (lambda x, w, v: w.t() + v.t(), [False, True]),
        (lambda x, w, v: w + v, [False, True]),
        (lambda x, w, v: w.sum(), [False]),
    ],
)
def test_who_holds_a_gradient(op, alone):
    # the one that was asked last has it alone: the other has let it go, or made another of it
    _torch.count_gradients()
    found = []
    w, v = (Asked.apply(torch.randn(4, 4, requires_grad=True), found) for _ in range(2))
    op(torch.randn(3, 4), w, v).square().sum().backward()
    assert found == alone


@pytest.mark.parametrize(
    "make",
    [
        lambda g: torch._efficientzerotensor(g.shape),
        lambda g: g.to_sparse(),
    ],
    ids=["zero", "sparse"],
)
def test_memory_that_does_not_hold_the_values(make):
    _torch.count_gradients()
    assert not _torch.is_only_gradient((make(torch.ones(4, 4)),))
