"""Ranks with other samples that take other ways through a model, and models that change."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
from test_reducer import same
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel

import shardtensor as st
from shardtensor.ranks.testing import run_workers

D = torch.float64


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.of = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.out = nn.Linear(3, 3)

    def forward(self, x, way, mine):
        if way == "one":
            return self.out(self.of[mine](x))
        if way == "order":
            return self.out(self.of[1 - mine](torch.tanh(self.of[mine](x))))
        return self.out(sum(e(x) * float(k == mine) for k, e in enumerate(self.of)))


def made():
    torch.manual_seed(0)
    return Experts().double(), torch.randn(2, 4, 3, dtype=D)


def grads(model):
    return {k: p.grad for k, p in model.named_parameters()}


def serial(way):
    model, x = made()
    (sum(model(x[d : d + 1], way, d).square().mean() for d in range(2)) / 2).backward()
    return grads(model)


def on_rank(way, bucket_mb, plain=False):
    model, x = made()
    shape = (2, 1) if plain else (2, 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "domain"))
    st.parallelize(model, mesh, data="data", bucket_mb=bucket_mb)
    d = mesh.get_local_rank("data")
    x = x[d : d + 1]
    if not plain:
        x = st.distribute_tensor(x, mesh["domain"], [Shard(1)], src_data_rank=None)
    model(x, way, d).square().mean().backward()
    return grads(model)


@pytest.mark.parametrize("way, bucket_mb", [("order", 8.0), ("times 0", 8.0), ("times 0", 1e-6)])
def test_other_samples_take_another_way(way, bucket_mb):
    want = serial(way)
    for got in st.simulate(4, on_rank, way, bucket_mb):
        same(got, want)


@pytest.mark.parametrize("way, bucket_mb", [("one", 8.0), ("one", 1e-6), ("order", 1e-6)])
def test_gradients_of_different_parameters_are_not_averaged(way, bucket_mb):
    with pytest.raises(st.RankError, match="samples have gradients of other parameters"):
        st.simulate(4, on_rank, way, bucket_mb)


def test_nor_those_of_plain_uses():
    want = serial("times 0")
    for got in st.simulate(2, on_rank, "times 0", 8.0, True):
        same(got, want)
    with pytest.raises(st.RankError, match="samples have gradients of other parameters"):
        st.simulate(2, on_rank, "one", 8.0, True)


def changed(mesh):
    model, x = made()
    torch.manual_seed(0 if mesh is None else dist.get_rank())
    late = nn.Linear(3, 3).double()
    if mesh is not None:
        st.parallelize(model, mesh, data="data")
        d = mesh.get_local_rank("data")
        x = st.distribute_tensor(x[d : d + 1], mesh["domain"], [Shard(1)], src_data_rank=None)
    model(x, "one", 0)
    # neither goes through nn.Module.__setattr__
    model.out._parameters["weight"] = nn.Parameter(model.out.weight.detach() * 2)
    model.of.insert(0, late)
    model(x, "one", 0).square().mean().backward()
    return grads(model)


def changed_on_rank():
    return changed(init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "domain")))


def test_parameters_that_came_past_setattr():
    want = changed(None)
    for got in st.simulate(4, changed_on_rank):
        same(got, want)


def whole(model):
    """Gradients by name."""
    return {k: g.full_tensor() if isinstance(g, DTensor) else g for k, g in grads(model).items()}


def converted(convert, names=()):
    torch.manual_seed(0)
    model, x = Experts(), torch.randn(2, 4, 3, dtype=D)
    if names:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        if "tp" in names:
            st.tensor_parallel(model, mesh["tp"], {"of.*": ColwiseParallel()})
        st.parallelize(model, mesh, data=names[0])
        d = mesh.get_local_rank(names[0])
        x = x[d : d + 1]
        if "tp" not in names:
            x = st.distribute_tensor(x, mesh["domain"], [Shard(1)], src_data_rank=None)
        else:
            x = st.distribute_tensor(x, mesh["tp"], [Replicate()], src_data_rank=None)
    for _ in range(2):
        convert(model)
        model.zero_grad()
        model(x, "times 0", 0).square().mean().backward()
    return whole(model)


def swapped(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("names", [("data", "domain"), ("data", "tp")])
@pytest.mark.parametrize(
    "convert",
    [nn.Module.double, lambda m: m.bfloat16().to(D), swapped],
    ids=["double", "to", "swap"],
)
def test_a_model_of_another_dtype(convert, names):
    want = converted(convert)
    for got in st.simulate(4, converted, convert, names):
        same(got, want)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x * self.scale


def changed_fsdp(fsdp):
    torch.manual_seed(0)
    model, x = Blocks(), torch.randn(2, 4, 3, dtype=D)
    late = nn.Linear(3, 3).double()
    if fsdp:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "domain"))
        st.parallelize(model, mesh, data="data", fsdp=fsdp)
        d = mesh.get_local_rank("data")
        x = st.distribute_tensor(x[d : d + 1], mesh["domain"], [Shard(1)], src_data_rank=None)
        if dist.get_rank():
            nn.init.zeros_(late.weight)
    model.double()
    model(x).square().mean().backward()
    found = whole(model)
    model.blocks.append(late)
    for _ in range(2):
        model.zero_grad()
        model(x).square().mean().backward()
    return found | {f"then {k}": g for k, g in whole(model).items()}


@pytest.mark.gloo
@pytest.mark.parametrize("fsdp", ["data", "all"])
def test_a_changed_model_of_fsdp(fsdp):
    """Its 0-dim parameters after a conversion; a block of later, which FSDP2 does not know."""
    want = changed_fsdp("")
    for got in run_workers(4, changed_fsdp, fsdp):
        same(got, want)


def lazy(when):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("domain",))
    model, x = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), torch.randn(4, 5)
    if when == "once":
        model(x)
    if when == "tensor_parallel":
        st.tensor_parallel(model, mesh, {"1": ColwiseParallel()})
    st.parallelize(model, mesh)
    if when == "later":
        model.append(nn.LazyLinear(2))
    model(st.distribute_tensor(x, mesh, [Shard(0)])).sum().backward()


def test_modules_that_are_still_to_make_their_parameters():
    for when in ("at once", "tensor_parallel"):
        with pytest.raises(
            st.RankError, match=r"0 \(LazyLinear\) makes its parameters at its first"
        ):
            st.simulate(2, lazy, when)


def copied(how, shape=None):
    model, x = made()
    if shape is not None:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "domain"))
        st.parallelize(model, mesh, data="data")
        d = mesh.get_local_rank("data")
        x = st.distribute_tensor(x[d : d + 1], mesh["domain"], [Shard(1)], src_data_rank=None)
    model(x, "times 0", 0).square().mean().backward()
    if how == "averaged":
        other = torch.optim.swa_utils.AveragedModel(model)
    elif how == "saved":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
        with torch.no_grad():
            other(x, "times 0", 0)
    else:
        other = copy.deepcopy(copy.deepcopy(model))
    if how == "again":
        st.parallelize(other, mesh, data="data") if shape else None
    if how == "copy":
        other.out = nn.Linear(3, 3).double()
        other.out.load_state_dict(model.out.state_dict())
    other(x, "times 0", 0).square().mean().backward()
    return {k.removeprefix("module."): g for k, g in grads(other).items()}


@pytest.mark.parametrize("how", ["copy", "averaged", "again"])
def test_a_copy_trains_as_its_original(how):
    want = copied(how)
    for got in st.simulate(4, copied, how, (2, 2)):
        same(got, want)


def test_a_model_that_was_saved_whole():
    with pytest.raises(st.RankError, match="call parallelize again"):
        st.simulate(4, copied, "saved", (2, 2))
