"""What a compiled program writes to an input is not what backward reads of it: gradients as eagerly."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.ranks.testing import make_mesh

D = torch.float64
# partitions as Inductor does, and makes no code
CUT = aot_autograd(
    fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
    partition_fn=min_cut_rematerialization_partition,
    keep_inference_input_mutations=True,
)


def average(m, x):
    with torch.no_grad():
        m.mean.mul_(0.9).add_(x.detach().mean((0, 1)))


def after(m, x):
    average(m, x)
    return (x * m.mean).sin()


def before(m, x):
    y = x * (m.mean + 1)
    average(m, x)
    return y.sin()


def both(m, x):
    y = x * (m.mean + 1)
    average(m, x)
    return y.sin() * (m.mean + 2) * m.mean.clone()


def part(m, x):
    with torch.no_grad():
        m.mean[:2].mul_(0.9)
    return (x * m.mean).sin()


def returned(m, x):
    average(m, x)
    return (x * m.mean.exp()).sin() + m.mean, m.mean


def average_out(m, x):
    y = (x * m.mean.exp()).sin()
    average(m, x)
    return y * m.mean.cos()


def twice(m, x):
    return both(m, average_out(m, x))


def argument(m, x):
    y = x * m.mean
    x.mul_(2).sin_()
    return y + x * x


def spectral(m, x):
    w = m.lin.weight
    with torch.no_grad():
        m.mean.copy_(F.normalize(w.t() @ (w @ m.mean), dim=0))
    return F.linear(x, w / (w @ m.mean.clone()).norm())


def codebook(m, x):
    near = torch.cdist(x.detach(), m.book).argmin(-1)
    chosen = F.one_hot(near, 3).to(D)
    y = x * F.embedding(near, m.book)
    with torch.no_grad():
        m.count.mul_(0.9).add_(chosen.sum((0, 1)))
        m.book.mul_(0.9).add_(torch.einsum("bnk,bnd->kd", chosen, x.detach()) / m.count[:, None])
    return y + (x @ m.book.t()).square() @ m.book


def own_weight(m, x):
    with torch.no_grad():
        m.scale.mul_(0.9)
    return (m.lin(x) * m.scale * m.scale).sin()


def momentum(m, x):
    y = m.norm(x.mT)
    return y.mT * m.norm.running_mean + m.norm.running_var.rsqrt() * x


BODIES = [
    after,
    before,
    both,
    average_out,
    part,
    returned,
    twice,
    argument,
    spectral,
    codebook,
    own_weight,
    momentum,
]


class Net(nn.Module):
    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.lin = body, nn.Linear(4, 4, dtype=D)
        self.norm = nn.BatchNorm1d(4, momentum=0.3, dtype=D)
        self.scale = nn.Parameter(torch.rand(4, dtype=D) + 1)
        for name, shape in (("mean", (4,)), ("book", (3, 4)), ("count", (3,))):
            self.register_buffer(name, torch.rand(shape, dtype=D) + 1)

    def forward(self, x):
        return self.body(self, x)


def steps(net, call, x):
    """Results, gradients and buffers of three calls; where eager PyTorch can, backward of all is last."""
    late, found, losses = net.body in (before, average_out), [], []
    for i in range(3):
        xs = (x + 0.1 * i).detach().requires_grad_()
        y = call(xs * 1.5)
        y = y[0] if isinstance(y, tuple) else y
        losses.append(y.square().sum())
        found += [y, *[b.clone() for b in net.buffers()]]
        if not late:
            losses.pop().backward()
        found.append(xs)
    for loss in losses:
        loss.backward()
    found = [y for x in found for y in ([x, x.grad] if x.is_leaf and x.requires_grad else [x])]
    found += [p.grad for p in net.parameters()]
    return [g.full_tensor() if isinstance(g, st.ShardTensor) else g for g in found]


@pytest.mark.parametrize("body", BODIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", ["aot_eager", CUT], ids=["aot_eager", "cut"])
def test_as_eagerly(body, backend):
    x = torch.randn(2, 6, 4, dtype=D, generator=torch.Generator().manual_seed(1))
    plain = Net(body)
    want = steps(plain, plain, x)

    def run():
        net = Net(body)
        s = st.distribute_tensor(
            x, make_mesh((2,)), [Shard(1)], sizes={1: (4, 2)}, src_data_rank=None
        )
        compiled = st.compile(net, backend=backend, fullgraph=True)
        for got, w in zip(steps(net, compiled, s), want, strict=True):
            if w is None:
                assert got is None or not got.any()
            else:
                torch.testing.assert_close(got, w, rtol=1e-9, atol=1e-12)

    st.simulate(2, run)


def test_what_is_only_written_is_not_copied():
    def run():
        graphs = []

        def backend(graph, inputs):
            graphs.append([n for n in graph.graph.nodes if "before" in str(n.target)])
            return graph.forward

        x = st.distribute_tensor(torch.randn(2, 6, 4, dtype=D), make_mesh((1,)), [Shard(1)])
        for body in (lambda m, x: m.norm(x.mT), after):
            net = Net(body)
            st.compile(net, backend=backend, fullgraph=True)(x)
            with torch.no_grad():
                st.compile(net, backend=backend, fullgraph=True)(x)
        # statistics of a batch norm; of the other one a copy, where there are gradients
        assert [len(g) for g in graphs] == [0, 0, 1, 0], graphs

    st.simulate(1, run)


def by_operand(x):
    return torch.ones_like(x).mul_(x).add_(1)


def test_an_operand_is_not_what_is_written():
    def run():
        x = st.distribute_tensor(torch.randn(6, 4, dtype=D), make_mesh((2,)), [Shard(0)])
        x.requires_grad_()
        y = st.compile(by_operand, backend="aot_eager", fullgraph=True)(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        torch.testing.assert_close(grad, 2 * (x + 1), rtol=1e-9, atol=1e-12)

    st.simulate(2, run)


def doubled(x, y):
    y.mul_(2)
    return x * 3 + y.sum()


def of_views(call, place):
    """Calls with a view of one tensor, and with two tensors, in turn; some with gradients."""
    found = []
    for i in range(6):
        x = place(torch.linspace(-1, 1, 24, dtype=D).view(6, 4) + i).requires_grad_(i > 2)
        a = x * 1
        y = call(a, a[..., :2] if i % 2 else place(torch.ones(6, 2, dtype=D)) * 1)
        found += [y, a, *(torch.autograd.grad(y.square().sum(), [x]) if i > 2 else ())]
    return [g.full_tensor() if isinstance(g, st.ShardTensor) else g for g in found]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("backend", ["aot_eager", CUT], ids=["aot_eager", "cut"])
def test_an_argument_that_is_a_view_of_another(first, backend):
    # torch's compiler takes what it made for the one kind of call for the other
    want = of_views(doubled, lambda x: x)

    def run():
        mesh = make_mesh((2,))

        def place(x):
            return st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)

        call = st.compile(doubled, backend=backend, fullgraph=True)
        if first:
            x = place(torch.ones(6, 4, dtype=D))
            call(x, x[..., :2])
        for g, w in zip(of_views(call, place), want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)

    st.simulate(2, run)


def _selected(x):
    x.select(1, 2).add_(1)
    return x.detach() * 1


def _of_an_argument(x):
    x.select(1, 2).mul_(2)
    return x.new_ones(2)


def _of_a_result(x):
    y = x * 1
    y[..., 2].mul_(2)
    y.unbind(1)[0].sub_(1)
    return y


@pytest.mark.parametrize("body", [_selected, _of_an_argument, _of_a_result])
@pytest.mark.parametrize("sizes", [(2, 1), (0, 3)], ids=str)
def test_a_view_that_was_moved_between_ranks_is_written_back(body, sizes):
    """By the eager call: no graph writes back to what the view is of."""
    whole = torch.arange(6, dtype=D).view(2, 3)

    def run():
        mesh, found = make_mesh((len(sizes),)), []
        for call in (body, st.compile(body, backend="eager")):
            x = st.distribute_tensor(whole, mesh, [Shard(1)], src_data_rank=None, sizes={1: sizes})
            if call is body:
                y = call(x)
            else:
                with pytest.warns(UserWarning, match="runs eagerly"):
                    y = call(x)
            found += [x.full_tensor(), T.full(y)]
        return found

    x = whole.clone()
    y = body(x)
    for found in st.simulate(len(sizes), run):
        for got, want in zip(found, (x, y, x, y), strict=True):
            assert torch.equal(got, want)


class Counts(nn.Module):
    """Keeps a tensor that is no buffer, and writes to a row of it."""

    def __init__(self, counts):
        super().__init__()
        self.kept = [counts]

    def forward(self, x):
        self.kept[0].select(1, 2).add_(1)
        return x * 2


def test_nor_is_that_of_a_tensor_that_is_no_input():
    def run():
        mesh = make_mesh((2,))
        x = st.distribute_tensor(torch.zeros(2, 3, dtype=D), mesh, [Shard(1)], src_data_rank=None)
        module = Counts(x)
        compiled = st.compile(module, backend="eager")
        for _ in range(2):
            compiled(x.detach() * 1)
        return x.full_tensor()

    for got in st.simulate(2, run):
        assert got.tolist() == [[0.0, 0.0, 2.0]] * 2
