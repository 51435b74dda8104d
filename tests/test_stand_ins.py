"""torch.func.functional_call and torch.autograd.functional of a parallelized model."""

import pytest
import torch
from test_reducer import same
from torch import nn
from torch.autograd import functional as AF
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.func import functional_call

import shardtensor as st

D = torch.float64


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.again = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 6)
        self.again.weight = self.up.weight
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        # one parameter is used in plain ops, too
        return self.down(torch.tanh(self.up(x)) + self.again(x)) * self.scale + self.scale.exp()


def setup(shape, names):
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(2, 6, 4, dtype=D)
    if shape is None:
        return model, x
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    if "tp" in names:
        plan = {"up": ColwiseParallel(), "again": ColwiseParallel(), "down": RowwiseParallel()}
        st.tensor_parallel(model, mesh["tp"], plan)
    if "data" in names:
        st.parallelize(model, mesh, data="data")
        d = mesh.get_local_rank("data")
        x = x[d : d + 1]
    else:
        st.parallelize(model, mesh)
    return model, st.distribute_tensor(x, mesh["domain"], [Shard(1)], src_data_rank=None)


def copies(model):
    return {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}


def leaves(model, x):
    given = copies(model)
    functional_call(model, given, (x,)).square().mean().backward()
    functional_call(model, (given, {}), (x * 2,)).square().mean().backward()
    return [p.grad for p in given.values()]


def own(model, x):
    given = dict(model.named_parameters())
    loss = functional_call(model, given, (x,)).square().mean()
    return torch.autograd.grad(loss, list(given.values()))


def meta(model, x):
    """Two steps inside, and the gradient through both."""
    given = dict(model.named_parameters())
    for _ in range(2):
        loss = functional_call(model, given, (x,)).square().mean()
        grads = torch.autograd.grad(loss, list(given.values()), create_graph=True)
        given = {k: p - 0.1 * g for (k, p), g in zip(given.items(), grads, strict=True)}
    functional_call(model, given, (x,)).square().mean().backward()
    return [p.grad for p in model.parameters()] + list(given.values())


def inside(model, x):
    """A part of the model is called, the rest as it is."""
    w = model.up.weight.detach().clone().requires_grad_()
    h = functional_call(model.up, {"weight": w}, (x,))
    (model.down(torch.tanh(h)).square().mean() + model(x).mean()).backward()
    return [w.grad] + [p.grad for p in model.parameters()]


def optimized(model, x):
    given = copies(model)
    optimizer = torch.optim.AdamW(given.values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        functional_call(model, given, (x,)).square().mean().backward()
        optimizer.step()
    return list(given.values())


def derivatives(model, x):
    given = {k: p.detach() for k, p in model.named_parameters()}

    def loss(*ps):
        return functional_call(model, dict(zip(given, ps, strict=True)), (x,)).square().mean()

    def of_bias(*ps):
        return functional_call(model, {"up.bias": ps[0], "down.bias": ps[1]}, (x,)).square().mean()

    ps = tuple(given.values())
    vs = tuple(torch.cos(p) for p in ps)
    hessian = AF.hessian(of_bias, (given["up.bias"], given["down.bias"]))
    found = [*AF.vjp(loss, ps)[1], *AF.hvp(loss, ps, vs)[1], *AF.vhp(loss, ps, vs)[1]]
    return found + [b for row in hessian for b in row]


def whole(x):
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach()


def run(program, shape=None, names=()):
    return dict(enumerate(map(whole, program(*setup(shape, names)))))


@pytest.mark.parametrize("program", [leaves, own, meta, inside, optimized, derivatives])
def test_as_one_device(program):
    want = run(program)
    for shape, names in [((3,), ("domain",)), ((2, 1), ("data", "domain"))]:
        for got in st.simulate(shape[0], run, program, shape, names):
            same(got, want)
    for got in st.simulate(4, run, program, (2, 2), ("data", "domain")):
        same(got, want)


def test_of_tensor_parallel_weights():
    want = run(leaves)
    for got in st.simulate(4, run, leaves, (2, 1, 2), ("data", "domain", "tp")):
        same(got, want)


def tangent(shape=None, names=()):
    model, x = setup(shape, names)
    given = {k: p.detach() for k, p in model.named_parameters()}

    def loss(*ps):
        return functional_call(model, dict(zip(given, ps, strict=True)), (x,)).square().mean()

    ps = tuple(given.values())
    return AF.jvp(loss, ps, tuple(torch.cos(p) for p in ps))[1]


def test_jvp_is_that_of_the_samples_of_a_rank():
    found = st.simulate(4, lambda: tangent((2, 2), ("data", "domain")).full_tensor().detach())
    assert torch.allclose((found[0] + found[-1]) / 2, tangent(), rtol=1e-9)


def transformed():
    model, x = setup((2, 1), ("data", "domain"))
    x = x.full_tensor()
    given = {k: p.detach() for k, p in model.named_parameters()}
    torch.func.grad(lambda ps: functional_call(model, ps, (x,)).square().mean())(given)


def test_transforms_are_refused_where_gradients_are_averaged():
    with pytest.raises(st.RankError, match=r"averaged over the data axis: take torch.autograd"):
        st.simulate(2, transformed)


def asked(model, x):
    """Gradients of weights that are DTensors, which lie on another axis than the loss."""
    wanted = list(model.parameters())
    grads = torch.autograd.grad(model(x).square().mean(), wanted, create_graph=True)
    again = torch.autograd.grad(sum((g * g).sum() for g in map(torch.cos, grads)), wanted)
    model(x).square().mean().backward(inputs=wanted[:2])
    return [*grads, *again, *(p.grad for p in wanted[:2])]


@pytest.mark.parametrize("names", [("data", "domain", "tp"), ("domain", "tp")])
def test_gradients_that_are_asked_for_of_tensor_parallel_weights(names):
    want = run(asked)
    shape = (2, 1, 2) if "data" in names else (2, 2)
    for got in st.simulate(4, run, asked, shape, names):
        same(got, want)
