"""DTensor weights meet ShardTensor activations: one device's numbers, in Megatron's messages."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F

import shardtensor as st
from shardtensor.ranks.testing import make_mesh, run_workers

D = torch.float64
COLUMN, ROW = ColwiseParallel(), RowwiseParallel()


class Mlp(nn.Module):
    def __init__(self, width=6, hidden=10):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        # the last term is one of weights alone
        return x + self.down(F.gelu(self.up(self.norm(x)))) * self.scale + self.norm.weight.sum()


class Attention(nn.Module):
    def __init__(self, heads, fused):
        super().__init__()
        self.heads, width = heads, heads * 3
        names = ["qkv"] if fused else ["q", "k", "v"]
        for name in names:
            self.add_module(name, nn.Linear(width, width * 3 if fused else width))
        self.names, self.proj = names, nn.Linear(width, width)

    def forward(self, x):
        b, n, c = x.shape
        made = [getattr(self, name)(x) for name in self.names]
        q, k, v = made[0].chunk(3, -1) if len(made) == 1 else made
        q, k, v = (t.reshape(b, n, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(out.transpose(1, 2).reshape(b, n, c))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 6, padding_idx=5)
        self.mlp = Mlp()

    def forward(self, i):
        return self.mlp(self.table(i))


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Conv2d(3, 7, 3, padding=1), nn.Conv2d(7, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(7)

    def forward(self, x):
        return x + self.down(F.gelu(self.norm(self.up(x))))


MLP = {"up": COLUMN, "down": ROW}
HEADS = {"q": COLUMN, "k": COLUMN, "v": COLUMN, "proj": ROW}
IMAGE = (2, 3, 9, 5)
MODELS = {
    "mlp": (Mlp, (), (2, 5, 6), 1, MLP),
    "mlp, fewer columns than ranks": (Mlp, (6, 3), (2, 5, 6), 1, MLP),
    "mlp, column only": (Mlp, (), (2, 5, 6), 1, {"up": COLUMN}),
    "mlp, row only": (Mlp, (), (2, 5, 6), 1, {"up": ROW, "down.weight": Shard(0)}),
    "attention": (Attention, (4, False), (2, 5, 12), 1, HEADS),
    "attention, cut heads": (Attention, (3, False), (2, 5, 9), 1, HEADS),
    "attention, fused": (Attention, (4, True), (2, 5, 12), 1, {"qkv": COLUMN, "proj": ROW}),
    "embedding, columns": (Words, (), (2, 5), 1, {"table": COLUMN, "mlp.up": COLUMN, "mlp.down": ROW}),
    "embedding, rows": (Words, (), (2, 5), 1, {"table": ROW}),
    "conv": (Conv, (), IMAGE, 2, MLP),
}  # fmt: skip
MESHES = [((2, 2), ("domain", "tp")), ((1, 4), ("domain", "tp")), ((3,), ("tp",))]


def made(name):
    kind, args, shape, dim, plan = MODELS[name]
    torch.manual_seed(0)
    model = kind(*args).double()
    if kind is Words:
        return model, [torch.randint(0, 7, shape) for _ in range(3)], dim, plan
    return model, [torch.randn(shape, dtype=D) for _ in range(3)], dim, plan


def full(x):
    return x.full_tensor() if isinstance(x, DTensor | st.ShardTensor) else x


def close(a, b, what):
    a = full(a).detach()
    assert a.shape == b.shape, what
    assert torch.allclose(a, b.detach(), rtol=1e-9, atol=1e-11), (what, (a - b).abs().max())


def given(x, mesh, dim):
    """On the domain axis where there is one, else whole on all ranks."""
    if "domain" in mesh.mesh_dim_names:
        mesh, place = mesh["domain"], Shard(dim)
    else:
        mesh, place = mesh["tp"], Replicate()
    return st.distribute_tensor(x, mesh, [place], src_data_rank=None)


def by_torch(model, mesh, plan):
    return parallelize_module(model, mesh, plan)


def by_hand(model, mesh, plan):
    for name, style in plan.items():
        module = model.get_submodule(name)
        dim = 0 if style is COLUMN else 1
        w = distribute_tensor(module.weight.detach(), mesh, [Shard(dim)])
        module.weight = nn.Parameter(w)
    return model


def step(name, shape, names, apply):
    model, batches, dim, plan = made(name)
    serial, x = copy.deepcopy(model), batches[0]
    mesh = make_mesh(shape, names=names)
    apply(model, mesh["tp"], plan)
    a, b = given(x, mesh, dim), x.clone()
    if x.is_floating_point():
        a.requires_grad_(), b.requires_grad_()
    with st.fallback("error"):
        y = model(a)
        y.square().mean().backward()
    want = serial(b)
    want.square().mean().backward()
    close(y, want, "value")
    if x.is_floating_point():
        close(a.grad, b.grad, "input")
    for (k, p), q in zip(model.named_parameters(), serial.parameters(), strict=True):
        if isinstance(p, DTensor):
            assert isinstance(p.grad, DTensor) and p.grad.placements == p.placements
        close(p.grad, q.grad, k)
    for (k, p), q in zip(model.named_buffers(), serial.buffers(), strict=True):
        close(p, q, k)


@pytest.mark.parametrize("shape, names", MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_value_and_gradients(name, shape, names):
    st.simulate(torch.Size(shape).numel(), step, name, shape, names, st.tensor_parallel)


@pytest.mark.parametrize("apply", [by_torch, by_hand])
@pytest.mark.parametrize("name", ["mlp", "attention"])
@pytest.mark.parametrize("shape, names", MESHES[:2])
def test_weights_from_elsewhere(name, shape, names, apply):
    """Torch's parallelize_module with its hooks; weights that were distributed by hand."""
    st.simulate(4, step, name, shape, names, apply)


def train(model, batches, optimizer=torch.optim.AdamW):
    optimizer = optimizer(model.parameters(), lr=0.05)
    norms = []
    for x in batches:
        model(x).square().mean().backward()
        norms.append(float(full(nn.utils.clip_grad_norm_(model.parameters(), 0.5))))
        optimizer.step()
        optimizer.zero_grad()
    return {k: full(v).detach().clone() for k, v in model.state_dict().items()}, norms


def trained(name, shape, names, values, apart=False):
    model, batches, dim, plan = made(name)
    mesh = make_mesh(shape, names=names)
    if dist.get_rank():
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
    st.tensor_parallel(model, mesh["tp"], plan)
    st.parallelize(model, mesh, **values)
    if "data" in names:
        mine = mesh.get_local_rank("data")
        batches = [x[mine : mine + 1] for x in batches]
    return train(model, [given(x, mesh, dim) for x in batches])


TRAINED = {
    "domain x tp": ((2, 2), ("domain", "tp"), {}),
    "domain x tp, small buckets": ((2, 2), ("domain", "tp"), {"bucket_mb": 1e-4}),
    "tp": ((1, 4), ("domain", "tp"), {}),
    "data x tp": ((2, 2), ("data", "tp"), {"data": "data"}),
    "data x tp, fsdp": ((2, 2), ("data", "tp"), {"data": "data", "fsdp": "data"}),
    "domain x tp, fsdp": ((2, 2), ("domain", "tp"), {"fsdp": "all"}),
}


@pytest.mark.gloo
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_trains_as_one_device(name):
    model, batches, _, _ = made(name)
    want, norms = train(model, batches)
    for case, (shape, names, values) in TRAINED.items():
        for got, seen in run_workers(4, trained, name, shape, names, values):
            assert seen == pytest.approx(norms, rel=1e-9), case
            for k, w in want.items():
                close(got[k], w, (case, k))


def three_axes():
    """data x domain x tp, with and without FSDP2 over data and domain."""
    model, batches, _, _ = made("mlp")
    want, norms = train(model, batches)
    for values in ({}, {"fsdp": "data"}, {"fsdp": "all"}):
        got, seen = trained("mlp", (2, 2, 2), ("data", "domain", "tp"), {"data": "data", **values})
        assert seen == pytest.approx(norms, rel=1e-9), values
        for k, w in want.items():
            close(got[k], w, (values, k))


@pytest.mark.gloo
def test_three_axes():
    run_workers(8, three_axes)


def sent(name, shape, names, fsdp=None):
    model, batches, dim, plan = made(name)
    mesh = make_mesh(shape, names=names)
    st.parallelize(st.tensor_parallel(model, mesh["tp"], plan), mesh, fsdp=fsdp)
    x = given(batches[0], mesh, dim).requires_grad_()
    with st.trace() as forward:
        y = model(x)
    loss = y.square().mean()
    with st.trace() as backward:
        loss.backward()
    return [s.collective for s in forward.sent], [s.collective for s in backward.sent]


@pytest.mark.parametrize("shape, summed", [((1, 4), 0), ((2, 2), 1)])
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_messages(name, shape, summed):
    """An all-reduce per row layer forward, one of all gradients, backward one of the activation.

    Three column layers that read the same one add their parts up before.

    One more where a weight meets the activation as the result of an op (the norm's, summed).
    """
    summed *= 1 + (name == "mlp")
    for forward, backward in st.simulate(4, sent, name, shape, ("domain", "tp")):
        ring = shape[0] > 1 and name == "attention"
        assert [c for c in forward if c == "all_reduce"] == ["all_reduce"]
        assert len(forward) == 1 or ring
        assert backward.count("all_reduce") == 1 + summed
        assert len(backward) == 1 + summed or ring


def test_messages_with_fsdp():
    """FSDP2 sums the weights' gradients over the domain, but for the scale's and the norm's sum."""
    for forward, backward in st.simulate(4, sent, "mlp", (2, 2), ("domain", "tp"), "all"):
        assert forward == ["all_reduce"] and backward == ["all_reduce"] * 3


def lookups(style):
    mesh = make_mesh((2, 2), names=("domain", "tp"))
    table = st.tensor_parallel(nn.Sequential(nn.Embedding(8, 6)), mesh["tp"], {"0": style})
    with st.trace() as t:
        table(given(torch.arange(8)[None], mesh, 1))
    return [(s.collective, s.bytes) for s in t.sent]


def test_embedding_gathers_no_table():
    assert st.simulate(4, lookups, COLUMN)[0] == []
    # 4 rows of the result, of 6 numbers
    assert st.simulate(4, lookups, ROW)[0] == [("all_reduce", 4 * 6 * 4)]


def saved(folder):
    mesh = make_mesh((2, 2), names=("domain", "tp"))
    model, _, _, plan = made("mlp")
    st.tensor_parallel(model, mesh["tp"], plan)
    dcp.save(model.state_dict(), checkpoint_id=folder)
    plain, _, _, _ = made("mlp")
    want = copy.deepcopy(plain)
    for p in plain.parameters():
        p.data.zero_()
    dcp.load(plain.state_dict(), checkpoint_id=folder)
    for p, q in zip(plain.parameters(), want.parameters(), strict=True):
        close(p, q, "loaded")


@pytest.mark.gloo
def test_checkpoints_are_those_of_dtensors(tmp_path):
    run_workers(4, saved, str(tmp_path))


def test_the_example_of_the_docs():
    text = (Path(__file__).parent.parent / "docs" / "compose.md").read_text()
    block, *_ = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {}
    exec(block, names)
    loss = names["mlp"](names["x"]).square().mean()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(names["mlp"].parameters(), 1.0).item()
    for got in st.simulate(4, names["train"]):
        assert got == pytest.approx((loss.item(), norm), rel=1e-5)
