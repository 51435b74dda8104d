"""`parallelize`: gradients of one device, in few messages; weights in sync."""

import copy
import io
import threading
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.nn import functional as F

import shardtensor as st
from shardtensor.ranks.testing import make_mesh, run_workers
from shardtensor.train.around import around
from shardtensor.train.parallelize import restore

D = torch.float64


class Net(nn.Module):
    """Convolutions on shards, a plain use of a weight, tied weights, a whole head, odd parameters."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.position = nn.Parameter(torch.randn(1, 4, 4, 1))
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(4, 1, 1), requires_grad=False)
        self.head = nn.Linear(4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv1(x))) * self.frozen
        x = x + F.interpolate(self.position, x.shape[-2:])
        x = self.conv2(x) + self.conv2(x * 2) * self.scale
        x = x + self.scale.exp() * self.scale
        return self.head(x.mean((2, 3)))


def train(model, batches, steps_between=1, clip=False):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for i, x in enumerate(batches):
        model(x).square().mean().backward()
        if (i + 1) % steps_between == 0:
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad(set_to_none=i % 2 == 0)
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def made():
    torch.manual_seed(0)
    return Net().double(), [torch.randn(2, 2, 8, 6, dtype=D) for _ in range(4)]


def on_rank(placements, mesh_shape, sizes, kwargs, bucket_mb):
    model, batches = made()
    if dist.get_rank():
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)  # rank 0's weights count
    mesh = make_mesh(mesh_shape)
    st.parallelize(model, mesh, bucket_mb=bucket_mb)
    given = [
        st.distribute_tensor(x, mesh, placements, sizes=sizes, src_data_rank=None) for x in batches
    ]
    return train(model, given, **kwargs)


CASES = [
    ([Shard(2)], (2,), None), ([Shard(3)], (3,), {3: [4, 0, 2]}), ([Shard(2), Shard(3)], (2, 2), None),
    ([Shard(0), Shard(2)], (2, 2), None), ([Shard(2), Replicate()], (2, 2), None), ([Shard(2)], (1,), None),
]  # fmt: skip


@pytest.mark.parametrize("bucket_mb", [1e-4, 8.0])
@pytest.mark.parametrize("placements, mesh_shape, sizes", CASES)
def test_trains_as_one_device(placements, mesh_shape, sizes, bucket_mb):
    model, batches = made()
    want = train(model, batches)
    world = torch.Size(mesh_shape).numel()
    for got in st.simulate(world, on_rank, placements, mesh_shape, sizes, {}, bucket_mb):
        for k, w in want.items():
            assert torch.allclose(got[k], w, rtol=1e-9, atol=1e-11), k


@pytest.mark.parametrize("kwargs", [{"steps_between": 2}, {"clip": True}])
def test_accumulation_and_clipping(kwargs):
    model, batches = made()
    want = train(model, batches, **kwargs)
    for got in st.simulate(2, on_rank, [Shard(2)], (2,), None, kwargs, 8.0):
        for k, w in want.items():
            assert torch.allclose(got[k], w, rtol=1e-9, atol=1e-11), k


@pytest.mark.gloo
def test_worker_processes():
    model, batches = made()
    want = train(model, batches)
    for got in run_workers(2, on_rank, [Shard(2)], (2,), None, {}, 1e-4):
        for k, w in want.items():
            assert torch.allclose(got[k], w, rtol=1e-9, atol=1e-11), k


def data_and_domain():
    """Each half of the ranks has samples of its own; the gradient is the mean over all."""
    model, batches = made()
    mesh = make_mesh((2, 2), names=("data", "domain"))
    st.parallelize(model, mesh, data="data")
    mine = mesh.get_coordinate()[0]
    for x in (model.norm,):
        x.eval()  # one device sees both samples in one batch norm
    given = [
        st.distribute_tensor(x[mine : mine + 1], mesh["domain"], [Shard(2)], src_data_rank=None)
        for x in batches
    ]
    return train(model, given)


def test_data_and_domain():
    model, batches = made()
    model.norm.eval()
    want = train(model, batches)
    for got in st.simulate(4, data_and_domain):
        for k, w in want.items():
            assert torch.allclose(got[k], w, rtol=1e-9, atol=1e-11), k


def messages(parallel):
    model, batches = made()
    mesh = make_mesh((2,))
    if parallel:
        st.parallelize(model, mesh)
    x = st.distribute_tensor(batches[0], mesh, [Shard(2)], src_data_rank=None)
    loss = model(x).square().mean()
    with st.trace() as t:
        loss.backward()
    return [s.collective for s in t.sent].count("all_reduce")


def test_one_message_for_all_gradients():
    apart, together = st.simulate(2, messages, False)[0], st.simulate(2, messages, True)[0]
    # one for the parameters; the norm's statistics and the plain weights' parts are the ops' own
    assert together <= apart - 3


def edges():
    model, batches = made()
    mesh = make_mesh((2,))
    keys = list(model.state_dict())
    assert st.parallelize(model, mesh) is model and list(model.state_dict()) == keys
    x = st.distribute_tensor(batches[0], mesh, [Shard(2)], src_data_rank=None)
    (asked,) = torch.autograd.grad(model(x).sum(), model.conv1.weight)
    model(x).sum().backward()
    want = model.conv1.weight.grad.clone()
    assert torch.allclose(asked, want, rtol=1e-9)
    # a copy (EMA) and a pickled one are plain models
    twin = copy.deepcopy(model)
    twin.zero_grad(set_to_none=True)
    twin(x).sum().backward()
    assert torch.allclose(twin.conv1.weight.grad, want, rtol=1e-9)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False)(batches[0]).shape == (2, 3)
    # a gradient penalty needs gradients of whole gradients
    model.zero_grad(set_to_none=True)
    (g,) = torch.autograd.grad(model(x.requires_grad_()).sum(), x, create_graph=True)
    g.square().sum().backward()
    penalty = model.conv1.weight.grad.clone()
    restore(model)
    model.zero_grad(set_to_none=True)
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    g.square().sum().backward()
    assert torch.allclose(model.conv1.weight.grad, penalty, rtol=1e-9)
    with pytest.raises(ValueError, match="data axis"):
        st.parallelize(model, mesh, data="samples")


def test_edges():
    st.simulate(2, edges)


def test_a_context_is_left_by_the_thread_that_entered_it():
    """The first of two threads in forward leaves first."""
    entered, go = ({name: threading.Event() for name in "ab"} for _ in range(2))
    left = {}

    @contextmanager
    def context(name):
        yield
        left[name] = threading.current_thread().name

    class Model(nn.Module):
        def forward(self, name):
            entered[name].set()
            assert go[name].wait(60)

    model = Model()
    around(model, context)
    threads = {name: threading.Thread(target=model, args=name, name=name) for name in "ab"}
    for name, thread in threads.items():
        thread.start()
        assert entered[name].wait(60)
    for name, thread in threads.items():
        go[name].set()
        thread.join()
    assert left == {"a": "a", "b": "b"}


class Broken(nn.Module):
    """It is interrupted once."""

    error = KeyboardInterrupt

    def forward(self, x):
        if self.error is not None:
            raise self.error
        return x @ x


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit, ValueError])
@pytest.mark.parametrize("way", ["", "compiled", "copied"])
def test_a_context_is_left_whatever_ends_forward(error, way):
    def run():
        model = st.parallelize(Broken(), make_mesh((1,)), precision="bf16")
        x = st.distribute_tensor(torch.ones(2, 2), make_mesh((1,)), [Shard(0)])
        if way == "copied":
            # the copy learns of it as it is called
            model.error = None
            model = copy.deepcopy(model)
            model(x)
        if way == "compiled":
            model.compile(backend="aot_eager")
        model.error = error
        with pytest.raises(error):
            model(x)
        assert not torch.is_autocast_enabled("cpu")
        model.error = None
        assert model(x).dtype is torch.bfloat16

    st.simulate(1, run)


def compiled():
    model, batches = made()
    mesh = make_mesh((2,))
    st.parallelize(model, mesh).compile(backend="aot_eager")
    given = [st.distribute_tensor(x, mesh, [Shard(2)], src_data_rank=None) for x in batches]
    return train(model, given)


def test_compile():
    model, batches = made()
    want = train(model, batches)
    for got in st.simulate(2, compiled):
        for k, w in want.items():
            assert torch.allclose(got[k], w, rtol=1e-9, atol=1e-11), k
