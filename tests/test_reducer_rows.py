"""Parameters that are cut like shards: their gradients are gathered together, and are whole."""

import pytest
import torch
from test_reducer import D, same, twice
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

import shardtensor as st
from shardtensor._torch.world import silent_world
from shardtensor.ranks.testing import make_mesh

ROWS = 7


class Net(nn.Module):
    """Positions that are cut along one dim or another, used twice, once whole, tied, not at all."""

    def __init__(self):
        super().__init__()
        self.place, self.scale = (nn.Parameter(torch.randn(1, ROWS, 3)) for _ in "ab")
        self.flat = nn.Parameter(torch.randn(ROWS))
        self.mix = nn.Parameter(torch.randn(3, ROWS, 3))
        self.unused = nn.Parameter(torch.randn(ROWS, 3))
        self.frozen = nn.Parameter(torch.randn(ROWS, 3), requires_grad=False)
        self.phase = nn.Parameter(torch.randn(ROWS, 3, dtype=torch.cfloat))
        self.up = nn.Linear(3, 3)
        self.norm = nn.LayerNorm((ROWS, 3))

    def forward(self, x):
        y = torch.tanh(self.up(x) + self.place) * self.scale[0] + self.flat[:, None]
        z = torch.einsum("btc,dtc->btd", y, self.mix) + self.place * self.frozen
        # whole, by itself, and beside shards
        z = z * self.place.mean() + self.scale.sum()
        return self.norm(z) + (z * self.phase).abs()


class Run:
    def __init__(self, mesh=None, data=None):
        torch.manual_seed(0)
        self.net = Net().double()
        self.net.phase.data = self.net.phase.data.to(torch.cdouble)
        batches = [torch.randn(4, ROWS, 3, dtype=D) for _ in range(3)]
        if mesh is not None:
            domain = mesh if data is None else mesh["domain"]
            if data is not None:
                batches = [x.chunk(2)[mesh.get_local_rank(data)] for x in batches]
            on = [Shard(1)] * domain.ndim
            batches = [st.distribute_tensor(x, domain, on, src_data_rank=None) for x in batches]
            st.parallelize(self.net, mesh, data=data, bucket_mb=2e-3)
        self.batches = batches

    def loss(self, i=0):
        return self.net(self.batches[i]).square().mean()

    def grads(self):
        return {
            k: None if p.grad is None else p.grad.clone() for k, p in self.net.named_parameters()
        }


def broken(run):
    y = run.loss()
    handle = run.net.place.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        y.backward(retain_graph=True)
    handle.remove()
    run.net.zero_grad()
    y.backward()
    run.loss(2).backward()
    return run.grads()


def asked_for(run):
    """Gradients of some parameters alone, and what hooks see."""
    seen = {}
    run.net.scale.register_hook(lambda g: seen.__setitem__("hook", g.clone()))
    found = torch.autograd.grad(run.loss(), [run.net.scale, run.net.mix, run.net.phase])
    return seen | dict(enumerate(found))


def penalised(run):
    """A gradient of gradients."""
    names = ["place", "scale", "mix", "flat"]
    given = [getattr(run.net, n) for n in names]
    found = torch.autograd.grad(run.loss(), given, create_graph=True)
    sum(g.square().sum() for g in found).backward()
    return run.grads()


def stepped(run):
    """Values that change between two uses, and within one object."""
    first = run.loss()
    first.backward()
    with torch.no_grad():
        for p in run.net.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=0.1)
    run.net.flat.data = run.net.flat.data * 2
    run.net.zero_grad()
    run.loss(1).backward()
    return run.grads()


def checkpointed(run):
    x = run.batches[0]
    y = checkpoint(run.net, x, use_reentrant=False)
    (y.square().mean() + run.loss(1)).backward()
    return run.grads()


WAYS = [(2, None, None), (3, None, None), (4, None, None), (4, None, (2, 2)), (4, "data", (2, 2))]


@pytest.mark.parametrize("world, data, shape", WAYS)
@pytest.mark.parametrize(
    "program",
    [twice, broken, asked_for, penalised, stepped, checkpointed],
    ids=lambda f: f.__name__,
)
def test_gradients_are_whole(world, data, shape, program):
    if data and program is penalised:
        pytest.skip("the mean over data of a square is not the square of the mean")

    def on_rank():
        if data:
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "domain"))
        else:
            mesh = make_mesh(shape or (world,))
        return program(Run(mesh, data))

    want = program(Run())
    for got in st.simulate(world, on_rank):
        same(got, want)


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        shape = 4, 4, 6, 6
        self.weights = nn.ParameterList(torch.randn(shape, dtype=torch.cfloat) for _ in "+-")

    def forward(self, x):
        y = torch.fft.rfft2(x)
        out = torch.zeros_like(y)
        for rows, w in zip((slice(0, 6), slice(-6, None)), self.weights, strict=True):
            out[:, :, rows, :6] = torch.einsum("bixy,ioxy->boxy", y[:, :, rows, :6], w)
        return torch.fft.irfft2(out, s=x.shape[-2:])


@pytest.mark.parametrize("ranks, op", [(8, "all_gather"), (64, "all_reduce")])
def test_gradients_of_spectral_weights_travel_in_one_message(ranks, op):
    with silent_world(ranks // 2, ranks):
        mesh = make_mesh((ranks,))
        model = nn.Sequential(*[Spectral() for _ in range(3)])
        st.parallelize(model, mesh)
        sizes = [512 // ranks] * ranks
        x = st.ShardTensor.from_local(torch.randn(1, 4, sizes[0], 32), mesh, [Shard(2)], {2: sizes})
        model(x).square().mean().backward()
        model.zero_grad()
        loss = model(x).square().mean()
        with st.trace() as t:
            loss.backward()
    weights = sum(p.nbytes for p in model.parameters())
    # the others are those of spectra
    sent = [s for s in t.sent if s.bytes > weights / 2]
    assert [s.collective for s in sent] == [op]
    # the gather of all rows, of which every rank has two of each layer or less; a sum
    assert sent[0].bytes <= {8: weights * 7 / 6, 64: 2 * weights}[ranks]
    assert len(t.sent) <= 12
