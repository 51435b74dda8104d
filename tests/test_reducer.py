"""Whoever looks at a parameter's gradient sees the whole one, and a broken backward leaves nothing."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel
from torch.utils.checkpoint import checkpoint

import shardtensor as st
from shardtensor.ranks.testing import make_mesh

D = torch.float64


class Net(nn.Module):
    """Used on shards, twice; tied; by itself, in plain ops; not at all; frozen."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(3, 5), nn.Linear(5, 3)
        self.again = nn.Linear(3, 5)
        self.again.weight = self.up.weight
        self.time = nn.Linear(1, 5)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.unused = nn.Parameter(torch.ones(4))
        self.frozen = nn.Parameter(torch.linspace(0.5, 1.5, 5), requires_grad=False)

    def forward(self, x, t=0.3):
        # a plain value of weights alone meets shards
        shift = self.time(torch.full((1, 1), t, dtype=x.dtype))
        x = torch.tanh(self.up(x) + shift) * self.frozen + torch.sin(self.again(x)) * self.scale
        return self.down(x) + self.scale.exp()


def made():
    torch.manual_seed(0)
    return Net().double(), [torch.randn(4, 7, 3, dtype=D) for _ in range(3)]


class Run:
    """The model and its batches on one device, or on a rank."""

    def __init__(self, mesh=None, data=None, bucket_mb=1e-4, wrap=None):
        self.net, batches = made()
        self.model, self.batches, self.mesh = self.net, batches, mesh
        if mesh is None:
            return
        on, domain = mesh, [Shard(1)]
        if data is not None:
            mine = mesh.get_local_rank(data)
            batches = [x.chunk(2)[mine] for x in batches]
            on = mesh["domain"]
        else:
            domain = domain * mesh.ndim
        self.batches = [st.distribute_tensor(x, on, domain, src_data_rank=None) for x in batches]
        if wrap is None:
            st.parallelize(self.net, mesh, data=data, bucket_mb=bucket_mb)
        else:
            self.model = wrap(self.net, mesh)

    def loss(self, i=0):
        return self.model(self.batches[i]).square().mean()

    def grads(self):
        return {
            k: None if p.grad is None else p.grad.clone() for k, p in self.net.named_parameters()
        }


def same(got, want):
    assert got.keys() == want.keys()
    for k, w in want.items():
        g = got[k]
        assert (g is None) == (w is None), k
        assert w is None or torch.allclose(g, w, rtol=1e-9, atol=1e-12), k


def four(data):
    if data:
        return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "domain"))
    return make_mesh((dist.get_world_size(),))


WAYS = [(2, None), (3, None), (4, "data")]


def held(world, data, program):
    """What a program gives on every rank is what it gives on one device."""
    want = program(Run())
    for got in st.simulate(world, lambda: program(Run(four(data), data))):
        same(got, want)


def broken(run):
    def error(g):
        raise FloatingPointError("from a hook")

    for at in ("loss", "middle", "parameter"):
        loss = run.loss()
        handle = None
        if at == "loss":
            loss.register_hook(error)
        elif at == "parameter":
            handle = run.net.up.bias.register_hook(error)
        else:
            y = run.net.up(run.batches[0])
            y.register_hook(error)
            loss = loss + run.net.down(torch.tanh(y)).sum()
        with pytest.raises(FloatingPointError):
            loss.backward(retain_graph=True)
        if handle is not None:
            handle.remove()
    run.net.zero_grad()
    run.loss(1).backward()
    run.loss(2).backward()
    return run.grads()


def twice(run):
    """One graph, two backwards; two graphs, one backward."""
    loss = run.loss()
    loss.backward(retain_graph=True)
    loss.backward()
    (run.loss(1) + run.loss(2) * 2).backward()
    return run.grads()


def inside(run):
    """A backward of the same parameters inside a backward."""
    x = run.batches[1]

    def hook(g):
        with torch.enable_grad():
            run.net.up(x).square().mean().backward()

    y = run.net.up(run.batches[0])
    y.register_hook(hook)
    (run.net.down(y).square().mean() + run.loss(2)).backward()
    return run.grads()


def hooks(run):
    """Tensor hooks of before and after, on one rank only; post-accumulate and multi-grad hooks."""
    seen = {}
    net = run.net
    net.down.weight.register_hook(lambda g: g.clamp(-0.01, 0.01))
    net.scale.register_post_accumulate_grad_hook(lambda p: seen.update(scale=p.grad.clone()))
    handle = torch.autograd.graph.register_multi_grad_hook(
        (net.up.weight, net.time.weight),
        lambda grads: seen.update(up=grads[0].clone(), time=grads[1].clone()),
    )
    node = net.up.bias.expand_as(net.up.bias).grad_fn.next_functions[0][0]
    node.register_prehook(lambda grads: seen.update(bias=grads[0].clone()))
    if run.mesh is not None and dist.get_rank() == 0:
        net.time.bias.register_hook(lambda g: None)
    run.loss().backward()
    run.loss(1).backward()
    handle.remove()
    return run.grads() | seen


def inside_optimizer(run):
    """Each parameter steps as soon as its gradient is there."""
    wanted = [p for p in run.net.parameters() if p.requires_grad]
    steps = {p: torch.optim.AdamW([p], lr=0.05) for p in wanted}

    def step(p):
        steps[p].step()
        steps[p].zero_grad()

    for p in steps:
        p.register_post_accumulate_grad_hook(step)
    for i in range(3):
        run.loss(i).backward()
    return dict(run.net.state_dict())


def accumulated(run):
    run.loss().backward()
    with torch.no_grad():
        run.loss(1)
    run.loss(1)
    run.loss(1).backward(inputs=[run.net.up.weight, run.net.scale])
    run.net.frozen.requires_grad_()
    run.net.scale.requires_grad_(False)
    run.loss(2).backward()
    return run.grads()


def asked(run):
    net = run.net
    wanted = [net.up.weight, net.scale, net.time.weight]
    grads = torch.autograd.grad(run.loss(), wanted)
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(run.loss(), net.unused)
    run.loss(1).backward()
    return run.grads() | dict(zip(("a", "b", "c"), grads, strict=True))


def other_memory(run):
    """Parameters are given other values in other memory after a graph that is dropped."""
    run.loss()
    for p in run.net.parameters():
        p.data = p.data * 1.5
    run.loss(1).backward()
    return run.grads()


@pytest.mark.parametrize("world, data", WAYS)
@pytest.mark.parametrize(
    "program",
    [other_memory, broken, twice, hooks, inside, inside_optimizer, accumulated, asked],
    ids=lambda f: f.__name__,
)
def test_as_one_device(program, world, data):
    held(world, data, program)


def checkpointed(run):
    """Recomputed inside backward, by torch's two ways; one graph of two is dropped."""
    net = run.net
    for reentrant in (True, False):
        x = run.batches[0].detach().requires_grad_()
        for part in (net.up, lambda h: net.down(torch.tanh(h)), net):
            x = checkpoint(part, x, use_reentrant=reentrant)
        x.square().mean().backward()
    run.loss(1)
    run.loss(2).backward()
    return run.grads()


@pytest.mark.parametrize("world, data", WAYS)
def test_checkpointed(world, data):
    held(world, data, checkpointed)


def second(run):
    """Hessian-vector products; a penalty on the gradients."""
    net = run.net
    wanted = [net.up.weight, net.scale, net.time.weight, net.down.bias]
    grads = torch.autograd.grad(run.loss(), wanted, create_graph=True)
    vs = [torch.linspace(-1, 1, g.numel(), dtype=D).view(g.shape) for g in grads]
    hvp = torch.autograd.grad(sum((g * v).sum() for g, v in zip(grads, vs, strict=True)), wanted)
    grads = torch.autograd.grad(run.loss(1), wanted, create_graph=True)
    (run.loss(2) + sum(g.square().sum() for g in grads)).backward()
    return run.grads() | {str(i): h for i, h in enumerate(hvp)}


@pytest.mark.parametrize("world, data", WAYS)
def test_second_derivatives(world, data):
    held(world, data, second)


def changed(run):
    """Other memory, another dtype, other modules after parallelize."""
    net = run.net
    run.loss()
    for p in net.parameters():
        p.data = p.data * 1.5
    run.loss(1).backward()
    net.zero_grad()
    torch.manual_seed(dist.get_rank() if run.mesh is not None else 0)
    net.down = nn.Linear(5, 3).double()
    del net.unused
    torch.nn.utils.parametrizations.weight_norm(net.time)
    torch.nn.utils.weight_norm(net.again, name="bias", dim=None)
    run.loss().backward()
    return run.grads()


@pytest.mark.parametrize("world, data", WAYS)
def test_a_changed_model(world, data):
    held(world, data, changed)


def early_optimizer():
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("domain", "tp"))
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    st.tensor_parallel(model, mesh["tp"], {"": ColwiseParallel()})
    for _ in range(2):
        with pytest.raises(ValueError, match="make the optimizer after tensor_parallel"):
            optimizer.step()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_an_optimizer_of_replaced_parameters():
    st.simulate(2, early_optimizer)


def with_a_sharded_parameter(run):
    net, mesh = run.net, run.mesh
    torch.manual_seed(1)
    position = torch.randn(7, 3, dtype=D)
    if mesh is not None:
        on = mesh["domain"] if mesh.ndim == 2 else mesh
        position = st.distribute_tensor(position, on, [Shard(0)], src_data_rank=None)
    net.position = nn.Parameter(position)
    if mesh is not None:
        st.parallelize(net, mesh)
    (net(run.batches[0] + net.position)).square().mean().backward()
    grads = run.grads()
    if mesh is not None:
        assert isinstance(net.position, st.ShardTensor)
        grads["position"] = grads["position"].full_tensor()
    return grads


def test_a_sharded_parameter_is_left_alone():
    held(3, None, with_a_sharded_parameter)


def grads_of_a_bucket():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    batch = torch.randn(4, 6, 3, dtype=D)
    net(batch).square().sum().backward()
    want = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    mesh = make_mesh((2,))
    st.parallelize(net, mesh)
    x = st.distribute_tensor(batch, mesh, [Shard(1)], src_data_rank=None)

    def step():
        net(x).square().sum().backward()
        return [p.grad for p in net.parameters()]

    for times in (1, 2):
        for g, w in zip(step(), want, strict=True):
            torch.testing.assert_close(g, times * w)
    net.zero_grad()
    grads = step()
    places = {g.untyped_storage().data_ptr() for g in grads}
    assert len(places) == 1 and not any(g._is_view() for g in grads)
    versions = [g._version for g in grads]
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    grads[0].zero_()
    # written to one by one, as if each had memory of its own
    assert grads[1]._version == versions[1] + 1 and float(grads[1].abs().sum()) > 0
    net.zero_grad(set_to_none=False)
    for g, w in zip(step(), want, strict=True):
        torch.testing.assert_close(g, w)


def test_gradients_stay_in_their_bucket():
    st.simulate(2, grads_of_a_bucket)


def test_parameters_of_one_call_share_their_nodes():
    """Weight and bias wait behind one pair; a gradient that no op gives stays None."""

    def run():
        model = st.parallelize(torch.nn.Linear(4, 3).double(), make_mesh((2,)))
        x = st.distribute_tensor(torch.ones(6, 4, dtype=torch.float64), make_mesh((2,)), [Shard(0)])
        y = model(x)
        nodes, seen = [y._local.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                nodes += [n for n, _ in node.next_functions]
        assert sorted(n.name() for n in seen if n.name() in ("StartBackward", "WaitBackward")) == [
            "StartBackward", "WaitBackward",
        ]  # fmt: skip
        (g,) = torch.autograd.grad(y.sum(), [model.bias], retain_graph=True)
        assert torch.equal(g, torch.full((3,), 6.0, dtype=torch.float64))
        y.sum().backward()
        want = torch.full((3, 4), 6.0, dtype=torch.float64)
        assert torch.equal(model.weight.grad, want) and torch.equal(model.bias.grad, g)

    st.simulate(2, run)
