"""torch's optimizers over weights in shards (fsdp, tensor_parallel): one device's steps, or refused."""

import copy
import math

import pytest
import torch
from campaigns.optimizers import BARE, WAYS
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardtensor as st
from shardtensor import testing as T
from shardtensor._torch.kernels import MASKED_DTENSORS
from shardtensor.train import optimizers

D = torch.float64
PLAN = {"0": ColwiseParallel(), "2": RowwiseParallel()}
FUSED = ("SGD", "Adagrad")


def ways(name):
    """The arguments that an optimizer is tried with; foreach, which FSDP2's weights take, too."""
    for way in WAYS[name]:
        plain = name in BARE or "fused" in way
        for more in [{}] if plain else [{"foreach": False}, {"foreach": True}]:
            yield {"lr": 0.05, **way, **more}


def refused(name, way):
    unmasked = name == "Rprop" and (not MASKED_DTENSORS or way["foreach"])
    return name == "Adafactor" or unmasked or (name in FUSED and "fused" in way)


def trained(make, width, mesh=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 4)).to(D)
    xs = [torch.randn(2, 5, 4, dtype=D) for _ in range(3)]
    if mesh is not None:
        names = mesh.mesh_dim_names
        if "tp" in names:
            st.tensor_parallel(model, mesh["tp"], PLAN)
        st.parallelize(model, mesh, **options)
        on = mesh["domain"]
        xs = [st.distribute_tensor(x, on, [Shard(1)], src_data_rank=None) for x in xs]
    optimizer = make(model.parameters())
    for x in xs:

        def loss(x=x):
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            return loss

        optimizer.step(loss)
    return [getattr(p.detach(), "full_tensor", p.detach)() for p in model.parameters()]


def held(name, ways, width, shape, **options):
    """Whether ranks of a domain, or of domain and tensor axes, make one device's steps."""
    makes = [lambda ps, way=way: getattr(torch.optim, name)(ps, **way) for way in ways]
    wants = [trained(make, width) for make in makes]

    def run():
        mesh = T.make_mesh(shape, names=("domain", "tp")[: len(shape)])
        return [trained(make, width, mesh, **options) for make in makes]

    for got in st.simulate(math.prod(shape), run):
        for way, found, want in zip(ways, got, wants, strict=True):
            for a, b in zip(found, want, strict=True):
                if not torch.allclose(a, b, rtol=1e-9, atol=1e-12):
                    return way
    return None


@pytest.mark.parametrize("name", [n for n in WAYS if n != "LBFGS" and not all(refused(n, way) for way in ways(n))])  # fmt: skip
def test_steps_are_those_of_one_device(name):
    taken = [way for way in ways(name) if not refused(name, way)]
    assert held(name, taken, 7, (2,), fsdp="all") is None


def test_lbfgs_makes_one_vector_of_even_shards():
    taken = list(ways("LBFGS"))
    assert held("LBFGS", taken, 6, (2,), fsdp="all") is None
    for shape, options in (((2,), {"fsdp": "all"}), ((1, 2), {})):
        with pytest.raises(st.RankError, match="one vector of them only where all shards are even"):
            held("LBFGS", taken[:1], 7, shape, **options)
    assert held("LBFGS", taken, 7, (2,)) is None


@pytest.mark.parametrize("name", ["Adafactor", "Rprop", *FUSED])
def test_refused_where_torch_steps_otherwise_or_not_at_all(name, monkeypatch):
    way = [next(way for way in ways(name) if refused(name, way))]
    for shape, options in (((2,), {"fsdp": "all"}), ((1, 2), {})):
        with pytest.raises(st.RankError, match=f"{name} over parameters in shards"):
            held(name, way, 6, shape, **options)
    assert held(name, way, 6, (2,)) is None
    # when torch has learnt it, this refusal has to go
    monkeypatch.setattr(optimizers, "_NOT", {})
    monkeypatch.setattr(optimizers, "_FUSED", ())
    try:
        assert held(name, way, 6, (2,), fsdp="all") is not None
    except st.RankError as e:
        assert "over parameters in shards" not in str(e)


def test_a_refused_step_is_refused_again():
    def run():
        mesh = T.make_mesh((2,), names=("domain",))
        model = st.parallelize(nn.Linear(4, 4), mesh, fsdp="all")
        optimizer = torch.optim.Adafactor(model.parameters())
        for _ in range(2):
            with pytest.raises(st.UnsupportedOpError, match="take AdamW, or leave the weights"):
                optimizer.step()

    st.simulate(2, run)


def test_weights_of_a_group_that_is_added_are_looked_at():
    def run():
        mesh = T.make_mesh((2,), names=("domain",))
        model = st.parallelize(nn.Linear(4, 4), mesh, fsdp="all")
        optimizer = torch.optim.Adafactor([nn.Parameter(torch.ones(2))])
        optimizer.step()
        optimizer.add_param_group({"params": [*model.parameters()]})
        with pytest.raises(st.UnsupportedOpError, match="over parameters in shards"):
            optimizer.step()

    st.simulate(2, run)


def test_shards_of_shards_that_are_uneven():
    """FSDP2 beside a tensor axis: ranks that are threads each plan how such weights are gathered."""
    want = nn.Linear(4, 9).weight.detach()

    def run():
        mesh = T.make_mesh((2, 2), names=("domain", "tp"))
        model = nn.Sequential(nn.Linear(4, 9))
        model[0].weight.data = want.clone()
        st.tensor_parallel(model, mesh["tp"], {"0": ColwiseParallel()})
        st.parallelize(model, mesh, fsdp="all")
        return model[0].weight.detach().full_tensor()

    for _ in range(4):
        assert all(torch.equal(got, want) for got in st.simulate(4, run))


def test_steps_of_its_own_between_averages_over_the_data_axis():
    """Post-local SGD: parallelize the domain alone, and let torch average weights over the rest."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv1d(3, 5, 3, padding=1), nn.Tanh(), nn.Conv1d(5, 3, 1)).to(D)
    xs = torch.randn(2, 6, 2, 3, 7, dtype=D)

    def step(model, optimizer, x):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    models = [copy.deepcopy(made) for _ in range(2)]
    each = [torch.optim.Adam(m.parameters(), lr=0.05) for m in models]
    for i in range(6):
        for args in zip(models, each, xs[:, i], strict=True):
            step(*args)
        if i in (1, 3, 5):
            for pair in zip(*(m.parameters() for m in models), strict=True):
                mean = torch.stack(pair).mean(0).detach()
                for p in pair:
                    p.data.copy_(mean)

    def run():
        mesh = T.make_mesh((2, 2), names=("data", "domain"))
        model = st.parallelize(copy.deepcopy(made), mesh["domain"])
        averager = PeriodicModelAverager(2, 1, process_group=mesh["data"].get_group())
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        optimizer = PostLocalSGDOptimizer(optimizer, averager)
        for x in xs[mesh.get_local_rank("data")]:
            rows = st.distribute_tensor(x, mesh["domain"], [Shard(2)], src_data_rank=None)
            step(model, optimizer, rows)
        return [p.detach() for p in model.parameters()]

    for found in st.simulate(4, run):
        for a, b in zip(found, models[0].parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_sparse_gradients_under_fsdp():
    def run():
        mesh = T.make_mesh((2,), names=("domain",))
        words = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
        with pytest.raises(ValueError, match=r"0 \(Embedding\) has sparse gradients"):
            st.parallelize(words, mesh, fsdp="all")
        with pytest.raises(st.UnsupportedOpError, match=r"weight is complex.*view_as_complex"):
            st.parallelize(nn.Linear(2, 2).to(torch.complex64), mesh, fsdp="all", precision="bf16")
        words[0].weight.requires_grad_(False)
        st.parallelize(words, mesh, fsdp="all")

    st.simulate(2, run)


@pytest.mark.parametrize("norm", [nn.utils.clip_grad_norm_, nn.utils.get_total_norm])
@pytest.mark.parametrize("order", [math.inf, -math.inf, -2])
def test_norms_where_ranks_have_no_row(norm, order):
    """Of a layer with fewer outputs than ranks, by orders that nothing has a norm of."""

    def found(mesh=None):
        torch.manual_seed(0)
        model, x = nn.Linear(3, 2).to(D), torch.randn(2, 5, 3, dtype=D)
        if mesh is not None:
            st.parallelize(model, mesh, fsdp="all")
            x = st.distribute_tensor(x, mesh, [Shard(1)])
        model(x).square().mean().backward()
        clips = norm is nn.utils.clip_grad_norm_
        grads = [p.grad for p in model.parameters()]
        norms = [
            norm(*((model.parameters(), 1e-3) if clips else (grads,)), order, foreach=foreach)
            for foreach in (None, False)
        ]
        return [getattr(x, "full_tensor", lambda x=x: x)() for x in (*norms, *grads)]

    for got in T.simulate(3, lambda: found(T.make_mesh((3,)))):
        torch.testing.assert_close(got, found(), rtol=1e-9, atol=1e-12)
