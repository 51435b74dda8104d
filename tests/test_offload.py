"""What waits in host memory for backward: the same gradients, and copies that no GPU waits for."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import Shard
from torch.utils._python_dispatch import TorchDispatchMode

import shardtensor as st
from shardtensor import testing as T
from shardtensor.train import offload

D = torch.float64


class Calls(TorchDispatchMode):
    """The ops that are called, with their arguments by name."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = [a.name for a in func._schema.arguments]
        self.seen[str(func)] = dict(zip(names, args, strict=False)) | (kwargs or {})
        return func(*args, **(kwargs or {}))


def test_a_gpu_copies_while_it_computes():
    with FakeTensorMode(), Calls() as calls:
        x = torch.empty(2, 3, 4, 5, device="cuda").permute(0, 3, 1, 2)
        kept = offload.away(x)
        again = offload.back(kept)
    # pageable memory, or a copy without non_blocking, holds up the host
    assert calls.seen["aten.empty_like.default"]["pin_memory"]
    assert calls.seen["aten.copy_.default"]["non_blocking"]
    assert calls.seen["aten._to_copy.default"]["non_blocking"]
    assert kept.host.device.type == "cpu" and again.device == x.device
    assert kept.host.stride() == again.stride() == x.stride()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    x = torch.randn(64, 64, device="cuda", requires_grad=True)
    with offload.offloaded():
        y = (x @ x).exp()
    kept = y.grad_fn._raw_saved_result
    assert kept.data.host.is_pinned()
    y.sum().backward()
    (want,) = torch.autograd.grad((x @ x).exp().sum(), x)
    assert torch.equal(x.grad, want)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 8, dtype=D), nn.Linear(8, 2, dtype=D)

    def forward(self, x):
        return self.b(self.a(x).exp().sin())


class Writes(Net):
    def forward(self, x):
        y = self.a(x).exp()
        z = y.sin()
        y.mul_(2)
        return self.b(z)


def made(kind):
    torch.manual_seed(0)
    return kind(), torch.randn(7, 3, dtype=D)


def grads(kind):
    model, x = made(kind)
    mesh = T.make_mesh((2,))
    st.parallelize(model, mesh, offload=True)
    model(st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)).square().sum().backward()
    return [p.grad for p in model.parameters()]


def test_gradients_are_those_of_one_device():
    model, x = made(Net)
    model(x).square().sum().backward()
    for got in st.simulate(2, grads, Net):
        for g, p in zip(got, model.parameters(), strict=True):
            assert torch.allclose(g, p.grad, rtol=1e-12)


def test_what_is_kept_and_written_to_raises_as_without_offload():
    model, x = made(Writes)
    loss = model(x).square().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(st.RankError, match="modified by an inplace operation"):
        st.simulate(2, grads, Writes)
