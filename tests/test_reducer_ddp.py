"""The reducer beside DDP and FSDP2."""

import pytest
import torch
from test_reducer import Run, four, same
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

import shardtensor as st
from shardtensor.ranks.testing import run_workers
from shardtensor.train import whole

D = torch.float64


def three(run):
    for i in range(3):
        run.loss(i).backward()
    return run.grads()


def ddp(order, axis):
    def wrap(net, mesh):
        over = None if axis is None else mesh.get_group(axis)
        on, kwargs = (mesh, {"data": "data"}) if "all" in order else (mesh["domain"], {})
        around = {"process_group": over, "find_unused_parameters": True}
        if "inside" in order:
            st.parallelize(net, on, **kwargs)
            return DistributedDataParallel(net, **around)
        return st.parallelize(DistributedDataParallel(net, **around), on, **kwargs)

    return three(Run(four("data"), "data", wrap=wrap))


ORDERS = [(order, axis) for order in ("inside", "outside") for axis in (None, "data")]


@pytest.mark.parametrize("over", ["all", "domain"])
@pytest.mark.parametrize("order, axis", [*ORDERS, ("inside", "domain")])
def test_ddp(order, axis, over):
    """DDP around or inside of what sums over the domain alone, or over the domain and data."""
    if axis == "domain" and over == "domain":
        pytest.skip("nobody averages over data")
    want = three(Run())
    for got in st.simulate(4, ddp, f"{order} {over}", axis):
        same(got, want)


def two_meshes(named):
    torch.manual_seed(0)
    mesh = four("data")
    model = st.parallelize(nn.Linear(3, 3), mesh if named is None else mesh[named])
    x = st.distribute_tensor(torch.randn(4, 3), mesh["domain"], [Shard(0)], src_data_rank=None)
    model(x).sum().backward()


def test_samples_that_differ_along_an_axis_nobody_named():
    with pytest.raises(st.RankError, match="name the axis along which samples differ"):
        st.simulate(4, two_meshes, None)
    st.simulate(4, two_meshes, "domain")


def broken_fsdp(mesh):
    """As FSDP2, too, before and after a forward and backwards that the user caught."""

    def error(*_):
        raise FloatingPointError("from a hook")

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.ModuleList([nn.Linear(3, 3) for _ in range(3)]), nn.Linear(3, 2)
    ).double()
    net.scale = nn.Parameter(torch.tensor(0.7, dtype=D))

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head, self.scale = net[0], net[1], net.scale

        def forward(self, x):
            for block in self.blocks:
                x = torch.tanh(block(x))
            return self.head(x) * self.scale

    model, xs = Chain(), [torch.randn(4, 7, 3, dtype=D) for _ in range(4)]
    if mesh is not None:
        early = torch.optim.AdamW(model.parameters())
        st.parallelize(model, mesh, fsdp="all")
        with pytest.raises(ValueError, match="make the optimizer after parallelize"):
            early.step()
        xs = [st.distribute_tensor(x, mesh, [Shard(1)], src_data_rank=None) for x in xs]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for x in xs:
        for register in (
            model.blocks[1].register_full_backward_hook,
            model.blocks[2].register_forward_hook,
            model.head.register_full_backward_hook,
        ):
            handle = register(error)
            with pytest.raises(FloatingPointError):
                model(x).square().mean().backward()
            handle.remove()
            optimizer.zero_grad()
        model(x * 2).square().mean().backward()
        # what came before a pass that breaks off stays
        handle = model.blocks[2].register_forward_hook(error)
        with pytest.raises(FloatingPointError):
            model(x)
        handle.remove()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if mesh is not None:
        handle = model.blocks[1].register_full_backward_hook(error)
        with pytest.raises(FloatingPointError):
            model(xs[0]).square().mean().backward()
        handle.remove()
        # the pass that broke left whole parameters in place
        late = torch.optim.AdamW(model.parameters())
        model(xs[0]).square().mean().backward()
        optimizer.zero_grad()
        with pytest.raises(
            ValueError, match="step nothing: make the optimizer after the next call"
        ):
            late.step()
    return {
        k: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone()
        for k, v in model.state_dict().items()
    }


def broken_fsdp_on_rank():
    return broken_fsdp(init_device_mesh("cpu", (2,), mesh_dim_names=("domain",)))


@pytest.mark.gloo
def test_fsdp_after_an_error_that_was_caught():
    if torch.__version__.startswith(("2.11.", "2.12.")):
        with pytest.raises(RuntimeError, match=r"use torch 2\.13 or newer"):
            run_workers(2, broken_fsdp_on_rank)
        return
    want = broken_fsdp(None)
    for got in run_workers(2, broken_fsdp_on_rank):
        same(got, want)


class Critic(nn.Linear):
    """A unit of its own where it is named."""


class Judged(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.critic = nn.Linear(3, 4), Critic(4, 1)

    def forward(self, x):
        return self.body(x).tanh()


def critic_alone(mesh, blocks):
    """Weights after steps of a part of the model that is called by itself, on what is detached."""
    torch.manual_seed(0)
    model = Judged().double()
    x = torch.randn(2, 7, 3, dtype=D)
    if mesh is not None:
        st.parallelize(model, mesh, fsdp="all", blocks=blocks)
        x = st.distribute_tensor(x, mesh, [Shard(1)], src_data_rank=None)
    body, critic = (torch.optim.SGD(m.parameters(), 0.1) for m in (model.body, model.critic))
    for _ in range(3):
        body.zero_grad()
        (model(x).square().mean() - model.critic(model(x)).mean()).backward()
        body.step()
        critic.zero_grad()
        (model.critic(model(x).detach()) - 1).square().mean().backward()
        critic.step()
    return [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()]


def check_critic():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("domain",))
    with pytest.raises(ValueError, match=r"could not step critic\.weight, critic\.bias"):
        critic_alone(mesh, ("Linear",))
    for a, b in zip(critic_alone(mesh, ("Linear", "Critic")), critic_alone(None, ()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.gloo
def test_a_part_that_fsdp_does_not_see_called_is_refused_or_a_unit():
    run_workers(2, check_critic)


def looked_at(look):
    """Weights after steps, the optimizer's state having been looked at, and put back, before the first."""
    torch.manual_seed(0)
    mesh, x = init_device_mesh("cpu", (2,), mesh_dim_names=("domain",)), torch.randn(2, 7, 3)
    model = Judged()
    st.parallelize(model, mesh, fsdp="all", blocks=("Linear",))
    x = st.distribute_tensor(x, mesh, [Shard(1)], src_data_rank=None)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    if look:
        state = whole.optimizer_state(model, optimizer)
        assert not optimizer.state and (state == {} or not state["state"])
        whole.load_optimizer(
            model, optimizer, torch.optim.AdamW(Judged().parameters(), 0.1).state_dict()
        )
        assert not optimizer.state
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor().detach() for p in model.parameters()]


@pytest.mark.gloo
def test_a_state_that_is_saved_before_the_first_step_changes_nothing():
    for got, want in zip(
        run_workers(2, looked_at, True), run_workers(2, looked_at, False), strict=True
    ):
        assert all(map(torch.equal, got, want))
