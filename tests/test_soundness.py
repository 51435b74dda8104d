"""What PyTorch does around tensors: FSDP2, DDP, hooks, checkpoints, scalers, Functions."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import shardtensor as st
from shardtensor.ranks.testing import make_mesh, run_workers

D = torch.float64


def sample(n=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=g, dtype=D)


def sharded(x, sizes=None):
    mesh = make_mesh((dist.get_world_size(),))
    return st.distribute_tensor(
        x, mesh, [Shard(0)], src_data_rank=None, sizes=sizes and {0: sizes}
    ).requires_grad_()


def close(a, b, tol=1e-12):
    a = a.full_tensor() if isinstance(a, st.ShardTensor | DTensor) else a
    assert a.shape == b.shape
    assert torch.allclose(a.detach(), b.detach(), rtol=tol, atol=tol), (a - b).abs().max()


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, scale):
        ctx.save_for_backward(a)
        ctx.scale = scale
        return a * a * scale

    @staticmethod
    def backward(ctx, g):
        (a,) = ctx.saved_tensors
        return 2 * a * g * ctx.scale, None


class Double(torch.autograd.Function):
    """In place."""

    @staticmethod
    def forward(ctx, a):
        ctx.mark_dirty(a)
        a.mul_(2)
        return a

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Sigmoid(torch.autograd.Function):
    """It saves what it gives."""

    @staticmethod
    def forward(ctx, a):
        y = a.sigmoid()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * y * (1 - y)


apply_before_any_wrapper = Square.apply


def users_function():
    x = sample()
    s = sharded(x)
    r = x.clone().requires_grad_()
    for leaf, y in ((s, Square.apply(s, 3.0)), (r, Square.apply(r, 3.0))):
        (y * y).sum().backward()
        assert y.grad_fn is not None and leaf.is_leaf
    close(s.grad, r.grad)
    s.grad = r.grad = None
    # a non-leaf, an `apply` kept from earlier, the result used twice, in and out of local ops
    for a in (s, r):
        h = (a * 2).sin()
        y = apply_before_any_wrapper(h, 1.0)
        (y.exp() + y * h).sum().backward()
    close(s.grad, r.grad)
    s.grad = r.grad = None
    for a in (s, r):
        h = a * 1.0
        y = Double.apply(h)
        (h * y).sum().backward()
    close(s.grad, r.grad)


def double_backward():
    x = sample()
    s, r = sharded(x), x.clone().requires_grad_()
    w = torch.linspace(-1, 1, 6, dtype=D).requires_grad_()
    for function in (lambda h: Square.apply(h, 1.0), Sigmoid.apply):
        seconds = []
        for a in (s, r):
            y = function((a * w).sin()).sum()
            (g,) = torch.autograd.grad(y, [a], create_graph=True)
            seconds.append((g, *torch.autograd.grad((g * g).sum(), [a, w])))
        for a, b in zip(*seconds, strict=True):
            close(a, b)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.up = nn.Linear(6, 12, dtype=D)
        self.down = nn.Linear(12, 6, dtype=D)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.scale = nn.Parameter(torch.tensor([1.5], dtype=D))

    def forward(self, x):
        for b in self.blocks:
            x = b(x)
        return x * self.scale


def reference(x=None, steps=1, net=None):
    net = net or Net()
    opt = torch.optim.SGD(net.parameters(), 0.1)
    x = sample() if x is None else x
    for _ in range(steps):
        opt.zero_grad()
        net(x).square().mean().backward()
        opt.step()
    return net


def module_hooks():
    x = sample()
    seen = {True: [], False: []}
    s, r = sharded(x), x.clone().requires_grad_()
    for a in (s, r):
        net = Net()
        log = seen[a is s]
        net.blocks[1].register_full_backward_hook(lambda m, gi, go, log=log: log.extend([*gi, *go]))
        net.blocks[0].register_full_backward_pre_hook(lambda m, go, log=log: log.extend(go))
        net.blocks[0].register_forward_hook(lambda m, i, o, log=log: log.append(o))
        net(a).square().sum().backward()
        log.extend(p.grad for p in net.parameters())
    close(s.grad, r.grad)
    assert len(seen[True]) == len(seen[False])
    for a, b in zip(seen[True], seen[False], strict=True):
        close(a, b)


def tensor_hooks():
    x = sample()
    s, r = sharded(x), x.clone().requires_grad_()

    def halve(t):
        t.grad.mul_(0.5)

    for a in (s, r):
        a.register_hook(lambda g: g * 2)
        h = a * 3
        h.register_hook(lambda g: g + 1)
        h.retain_grad()
        a.register_post_accumulate_grad_hook(halve)
        (h * h).sum().backward()
    close(s.grad, r.grad)


def checkpoints():
    x = sample()
    net, ref = Net(), Net()
    r = x.clone().requires_grad_()
    ref(r).square().mean().backward()
    for reentrant in (False, True):
        net.zero_grad()
        s = sharded(x)
        h = s
        for b in net.blocks:
            h = checkpoint(b, h, use_reentrant=reentrant)
        (h * net.scale).square().mean().backward()
        close(s.grad, r.grad)
        for p, q in zip(net.parameters(), ref.parameters(), strict=True):
            close(p.grad, q.grad)


def dropout_in_checkpoint():
    """The recomputation draws the same mask, or the gradient would not match the output."""
    s = sharded(torch.ones(7, 6, dtype=D))
    torch.manual_seed(3)
    out = checkpoint(lambda a: F.dropout(a, 0.5), s, use_reentrant=False)
    out.sum().backward()
    close(s.grad, out.full_tensor())


def gradient_scaler():
    x = sample().float()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    net, ref = Net().float(), Net().float()
    for n, a in ((net, sharded(x)), (ref, x)):
        opt = torch.optim.SGD(n.parameters(), 0.1)
        scaler.scale(n(a).square().mean()).backward()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(n.parameters(), 0.1)
        scaler.step(opt)
        scaler.update(1024.0)
    for p, q in zip(net.parameters(), ref.parameters(), strict=True):
        close(p, q, 1e-5)


def autocast():
    x = sample().float()
    net, ref = Net().float(), Net().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = net(sharded(x)), ref(x)
    assert got.dtype == want.dtype
    close(got, want, 1e-6)


def data_parallel(kind):
    """2 x 2: half of the batch on each data rank, rows sharded over the domain axis."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "domain"))
    batch = torch.stack([sample(7, seed) for seed in (4, 5)])
    ref = reference(batch, steps=3)
    net = Net()
    if kind == "fsdp":
        for b in net.blocks:
            fully_shard(b, mesh=mesh["data"])
        fully_shard(net, mesh=mesh["data"])
        wrapped = net
    else:
        wrapped = DistributedDataParallel(
            net, process_group=mesh.get_group("data"), find_unused_parameters=kind == "unused"
        )
    opt = torch.optim.SGD(net.parameters(), 0.1)
    x = st.distribute_tensor(
        batch[mesh.get_local_rank("data")][None], mesh["domain"], [Shard(1)],
        src_data_rank=None, sizes={1: (5, 2)},
    )  # fmt: skip
    for _ in range(3):
        opt.zero_grad()
        loss = wrapped(x).square().mean()
        loss.backward()
        opt.step()
    for p, q in zip(net.parameters(), ref.parameters(), strict=True):
        close(p, q)


def looks():
    x = sample()
    s = sharded(x)
    assert isinstance(s, torch.Tensor) and torch.is_tensor(s)
    assert s.shape == (7, 6) and s.size(-1) == 6 and len(s) == 7 and s.numel() == 42
    assert s.ndim == s.dim() == 2 and s.dtype == D and s.device.type == "cpu"
    assert s.stride() == (6, 1) and s.is_contiguous() and not s.is_cuda
    assert "(7, 6)" in repr(s) and "S(0)" in repr(s) and str(list(s.spec.sizes[0])) in repr(s)
    total = s.sum()
    assert total.placements == (Replicate(),)
    assert np.isclose(total.item(), x.sum().item()) and np.isclose(float(total), x.sum().item())
    assert f"{total:.3f}" == f"{x.sum().item():.3f}" and bool(total > -1e9)
    assert np.array_equal(s.detach().numpy(), x.numpy()) and s.tolist() == x.tolist()
    c = copy.deepcopy(s)
    assert c.requires_grad and c._local is not s._local
    close(c, x)
    p = pickle.loads(pickle.dumps(s.detach()))
    assert type(p) is torch.Tensor and torch.equal(p, x)
    (leaf,), tree = pytree.tree_flatten(s)
    assert leaf is s and pytree.tree_unflatten([leaf], tree) is s
    close(
        pytree.tree_map(lambda t: t.flip(0) * t.mean().item(), {"a": s})["a"], x.flip(0) * x.mean()
    )
    assert s.detach().requires_grad is False and s.is_leaf and s.grad_fn is None
    s.data = x * 2
    close(s, x * 2)
    s.grad = x
    close(s.grad, x)
    param = nn.Parameter(s.detach())
    assert isinstance(param, nn.Parameter) and param.requires_grad


def learned_sizes():
    n, me = dist.get_world_size(), dist.get_rank()
    mesh = make_mesh((n,))
    sizes = (3, 0, 2, 4)[:n]
    whole = sample(sum(sizes))
    local = whole.split(sizes)[me].requires_grad_()
    s = st.ShardTensor.from_local(local, mesh, [Shard(0)])
    assert s.spec.sizes == {0: tuple(sizes)}
    with st.trace() as t:
        again = st.ShardTensor.from_local(local, mesh, [Shard(0)], sizes={0: sizes})
    assert again.spec == s.spec and t.messages == 0
    close(s, whole)
    assert len({hash(s.spec), hash(again.spec)}) == 1
    if n > 1:
        with pytest.raises(ValueError, match="differ"):
            st.ShardTensor.from_local(torch.zeros(2, 3 + me), mesh, [Shard(0)])


def dtensors():
    mesh = make_mesh((dist.get_world_size(),))
    x = sample(5)
    s = sharded(x)
    d = s.to_dtensor()
    assert isinstance(d, DTensor) and d.shape == x.shape
    close(d.full_tensor(), x)
    back = st.ShardTensor.from_dtensor(d)
    (back * back).sum().backward()
    close(s.grad, 2 * x)
    if mesh.size() == 1:
        return
    uneven = sharded(x, (1, 4) if mesh.size() == 2 else (1, 0, 4))
    with pytest.raises(st.UnsupportedOpError, match="chunk"):
        uneven.to_dtensor()


def backward_forms():
    x = sample()
    s, r = sharded(x), x.clone().requires_grad_()
    for a in (s, r):
        y = a * a
        y.backward(torch.ones(7, 6, dtype=D), retain_graph=True)
        torch.autograd.backward([y.sum(), (a * 3).sum()])
        (a * 2).sum().backward(inputs=[a])
    close(s.grad, r.grad)
    with pytest.raises(RuntimeError, match="scalar"):
        (s * 2).backward()
    (g,) = torch.autograd.grad(s * 2, s, x)
    close(g, 2 * x)


CASES = [users_function, double_backward, module_hooks, tensor_hooks, checkpoints,
         dropout_in_checkpoint, gradient_scaler, autocast, looks, learned_sizes, dtensors,
         backward_forms]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_simulated(case, n):
    st.simulate(n, case)


def all_cases():
    warnings.simplefilter("error", st.FallbackWarning)
    for case in CASES:
        case()


@pytest.mark.gloo
def test_gloo():
    run_workers(2, all_cases)


@pytest.mark.parametrize("kind", ["fsdp", "ddp", "unused"])
@pytest.mark.gloo
def test_data_parallel(kind):
    run_workers(4, data_parallel, kind)
