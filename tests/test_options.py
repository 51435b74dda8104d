"""`parallelize` with FSDP2, checkpointing, offload, mixed precision: as one device trains."""

import re
from collections.abc import Mapping

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import functional as F

import shardtensor as st
from shardtensor.ranks.measure import peak_bytes, saved_bytes
from shardtensor.ranks.testing import make_mesh, run_workers

D = torch.float64


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(2, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.7))

    def forward(self, x):
        # the last term uses a weight alone: its gradient is whole on every rank
        return x + F.gelu(self.conv(self.norm(x))) * self.scale + self.scale.exp().sum()


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.first = nn.Conv2d(2, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.unused = nn.Parameter(torch.ones(4))
        self.frozen = nn.Parameter(torch.ones(width, 1, 1), requires_grad=False)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.first(x) * self.frozen
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def made(dtype=D, net=Net):
    torch.manual_seed(0)
    return net().to(dtype), [torch.randn(2, 2, 8, 6, dtype=dtype) for _ in range(3)]


def train(model, batches, clip=True, pieces=1):
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05)
    losses = []
    for x in batches:
        for part in range(pieces):
            loss = model(x).square().mean() / pieces
            (loss * (part + 1)).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5) if clip else None
        losses.append((loss.item(), None if norm is None else float(full(norm))))
        optimizer.step()
        optimizer.zero_grad()
    return {k: full(v).detach().clone() for k, v in model.state_dict().items()}, losses


def full(x):
    return x.full_tensor() if isinstance(x, DTensor | st.ShardTensor) else x


def on_rank(shape, names, placements, values, pieces=1):
    model, batches = made()
    if dist.get_rank():
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
    mesh = make_mesh(shape, names=names)
    keys = list(model.state_dict())
    st.parallelize(model, mesh, **values)
    assert list(model.state_dict()) == keys
    domain = mesh
    if "data" in names:
        mine = mesh.get_local_rank("data")
        batches = [x[mine : mine + 1] for x in batches]
        others = tuple(n for n in names if n != "data")
        domain = mesh[others if len(others) > 1 else others[0]]
    given = [st.distribute_tensor(x, domain, placements, src_data_rank=None) for x in batches]
    weights, losses = train(model, given, pieces=pieces)
    return (
        weights,
        losses,
        sum(
            p.to_local().numel() if isinstance(p, DTensor) else p.numel()
            for p in model.parameters()
        ),
    )


CASES = {
    "data x domain, data": ((2, 2), ("data", "domain"), [Shard(2)], {"data": "data", "fsdp": "data"}),
    "data x domain, all": ((2, 2), ("data", "domain"), [Shard(2)], {"data": "data", "fsdp": "all"}),
    "domain, all": ((2,), ("domain",), [Shard(3)], {"fsdp": "all"}),
    "two axes, all": ((2, 2), ("h", "w"), [Shard(2), Shard(3)], {"fsdp": "all"}),
    "one of two axes, all": ((2, 2), ("h", "w"), [Replicate(), Shard(3)], {"fsdp": "all"}),
    "named blocks": ((2,), ("domain",), [Shard(2)], {"fsdp": "all", "blocks": ["Block", "Linear"]}),
    "checkpoint": ((2,), ("domain",), [Shard(2)], {"fsdp": "all", "checkpoint": True}),
    "checkpoint and offload": ((2,), ("domain",), [Shard(2)], {"checkpoint": True, "offload": True}),
    "compiled": ((2,), ("domain",), [Shard(2)], {"compile": {"backend": "aot_eager"}}),
}  # fmt: skip


@pytest.mark.gloo
@pytest.mark.parametrize("name", CASES)
def test_trains_as_one_device(name):
    shape, names, placements, values = CASES[name]
    model, batches = made()
    want, losses = train(model, batches)
    found = run_workers(torch.Size(shape).numel(), on_rank, shape, names, placements, values)
    total = sum(p.numel() for p in model.parameters())
    for got, seen, held in found:
        for k, w in want.items():
            assert torch.allclose(got[k], w, rtol=1e-9, atol=1e-11), k
        assert [n for _, n in seen] == [pytest.approx(n, rel=1e-9) for _, n in losses]
        parts = {"all": torch.Size(shape).numel(), "data": 2, None: 1}[values.get("fsdp")]
        assert held <= total / parts + 40


@pytest.mark.gloo
def test_accumulation_over_all():
    model, batches = made()
    want, _ = train(model, batches, pieces=2)
    shape, names, placements, values = CASES["data x domain, all"]
    for got, _, _ in run_workers(4, on_rank, shape, names, placements, values, 2):
        for k, w in want.items():
            assert torch.allclose(got[k], w, rtol=1e-9, atol=1e-11), k


def largest_message(kind):
    model, batches = made()
    mesh = make_mesh((2,), names=("domain",))
    st.parallelize(model, mesh, fsdp=kind)
    x = st.distribute_tensor(batches[0], mesh, [Shard(2)], src_data_rank=None)
    loss = model(x).square().mean()
    with st.trace() as t:
        loss.backward()
    return max(s.bytes for s in t.sent if s.collective == "all_reduce")


@pytest.mark.gloo
def test_ops_sum_no_weights_gradients_over_all():
    """The norms' statistics are left; FSDP2 sends the weights' gradients by itself."""
    model = Net()
    # the head's gradients are whole, the norms sum their own beside their statistics
    whole = ("unused", "frozen", "head", "norm")
    parts = (p for k, p in model.named_parameters() if not any(n in k for n in whole))
    weights = 8 * sum(p.numel() for p in parts)
    assert run_workers(2, largest_message, None)[0] == weights
    # two moments of every group of a norm, and the gradients of its own weights
    assert run_workers(2, largest_message, "all")[0] <= 128


class MixedBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(2, width)
        self.last = nn.LayerNorm(width)
        self.register_buffer("bias", torch.linspace(0, 1, width)[:, None, None])

    def forward(self, x):
        y = F.gelu(self.norm(self.conv(x)) + self.bias)
        return x + self.last(y.movedim(1, -1)).movedim(-1, 1)


class Mixed(nn.Module):
    """Buffers that autocast leaves in fp32, norms of what they meet, a time of four digits."""

    def __init__(self, width=4):
        super().__init__()
        self.norm = nn.BatchNorm2d(2)
        self.first = nn.Conv2d(2, width, 3, padding=1)
        self.blocks = nn.ModuleList(MixedBlock(width) for _ in range(2))
        self.fixed = nn.BatchNorm2d(width).eval()
        self.head = nn.Linear(width, 3)

    def forward(self, x, time):
        x = self.first(self.norm(x)) * torch.cos(time)
        for block in self.blocks:
            x = block(x)
        return self.head(self.fixed(x).float().mean((2, 3)))


TIMES = {Net: {}, Mixed: {"time": torch.tensor(1001.0)}}


def bf16(values, net):
    torch.manual_seed(0)
    mesh = make_mesh((2,), names=("domain",))
    model, batches = made(torch.float32, net)
    st.parallelize(model, mesh, **values)
    x = st.distribute_tensor(batches[0], mesh, [Shard(2)], src_data_rank=None)
    y = model(x, **TIMES[net])
    y.square().mean().backward()
    grads = {k: full(p.grad).float() for k, p in model.named_parameters() if p.grad is not None}
    return y.dtype, grads


@pytest.mark.gloo
@pytest.mark.parametrize("net", [Net, Mixed])
@pytest.mark.parametrize("fsdp", [None, "all"])
def test_precision(fsdp, net):
    """FSDP2's own mixed precision would cast the model's inputs, and no operand within it."""
    model, batches = made(torch.float32, net)
    model(batches[0], **TIMES[net]).square().mean().backward()
    for dtype, grads in run_workers(2, bf16, {"precision": "bf16", "fsdp": fsdp}, net):
        assert dtype is torch.bfloat16
        for k, p in model.named_parameters():
            if p.grad is not None:
                away = (grads[k] - p.grad).norm() / p.grad.norm()
                assert 0 < away < 0.1, k


@pytest.mark.filterwarnings("error")
def test_a_hook_that_raises_before_autocast_begins():
    def refuse(*_):
        raise ValueError("no")

    def rank():
        model = st.parallelize(nn.Linear(2, 2), make_mesh((1,)), precision="bf16")
        model.register_forward_pre_hook(refuse, prepend=True)
        with pytest.raises(ValueError, match="no"):
            model(torch.ones(2))
        assert not torch.is_autocast_enabled("cpu")

    st.simulate(1, rank)


def kept(values):
    mesh = make_mesh((2,), names=("domain",))
    torch.manual_seed(0)
    model = st.parallelize(Net(16), mesh, **values)
    x = torch.randn(2, 2, 64, 48)
    x = st.distribute_tensor(x, mesh, [Shard(2)], src_data_rank=None)

    def step():
        model(x).square().mean().backward()

    step()
    return saved_bytes(lambda: model(x)), peak_bytes(step)


@pytest.mark.gloo
def test_checkpoint_keeps_inputs_only():
    plain, saved = run_workers(2, kept, {})[0], run_workers(2, kept, {"checkpoint": True})[0]
    assert saved[0] < 0.4 * plain[0] and saved[1] < plain[1]


def test_options(tmp_path):
    file = tmp_path / "parallel.yaml"
    file.write_text("data: data\nfsdp: all\nblocks: [Block]\nprecision: bf16\n")
    want = st.Options(data="data", fsdp="all", blocks=("Block",), precision="bf16")
    assert st.Options.from_yaml(file) == want
    for text in ("fsdp: half", "data: data\ncolour: red", "fsdp: data", "- fsdp",
                 "precision: fp8", "bucket_mb: 0", "blocks: Block"):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ValueError):
            st.Options.from_yaml(file)
    file.write_text("data: !!python/object/apply:os.getcwd []")
    with pytest.raises(Exception, match="python/object"):
        st.Options.from_yaml(file)


@pytest.mark.parametrize(
    "text, said",
    [
        ("checkpoint: 'no'", "checkpoint is 'no'; expected True or False"),
        ("sync: 1", "sync is 1; expected True or False"), ("offload: null", "offload is None"),
        ("bucket_mb: 1e3", "bucket_mb is '1e3'; expected a positive number, in YAML with a point"),
        ("bucket_mb: .nan", "bucket_mb is nan; expected a positive number"),
        ("bucket_mb: .inf", "bucket_mb is inf"), ("bucket_mb: yes", "bucket_mb is True"),
        ("data: no", "data is False; expected the name of a mesh axis"), ("data: [data]", "data is"),
        ("fsdp: off", "fsdp is False; one of"), ("fsdp: [all]", "fsdp is"),
        ("precision: 16", "precision is 16; one of"), ("precision: {}", "precision is"),
        ("blocks: null", "blocks is None; expected a list of class names"), ("blocks: [1]", "blocks is"),
        ("blocks: {Block: 1}", "blocks is"), ("compile: true", "compile is True; expected the arguments"),
        ("compile: {1: 2}", "compile is"), ("1: 2", "no options: 1"), ("", "not NoneType"),
        ("data: [", "while parsing"),
    ],
)  # fmt: skip
def test_values_are_checked_by_type(tmp_path, text, said):
    file = tmp_path / "parallel.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)) as e:
        st.Options.from_yaml(file)
    assert str(file) in str(e.value)


class Config(Mapping):
    """A mapping that is no dict, as OmegaConf's DictConfig."""

    def __init__(self, **values):
        self.values = values

    def __getitem__(self, key):
        return self.values[key]

    def __iter__(self):
        return iter(self.values)

    def __len__(self):
        return len(self.values)


def from_mappings():
    mesh = make_mesh((2,), names=("domain",))
    for options in ({"bucket_mb": 2}, Config(bucket_mb=2, compile=Config())):
        st.parallelize(Net(), mesh, options, sync=False)
        st.parallelize(Net(), mesh, options=options)
    with pytest.raises(ValueError, match="options is 'domain'; expected Options"):
        st.parallelize(Net(), mesh, "domain")
    with pytest.raises(ValueError, match="no options: buckets"):
        st.parallelize(Net(), mesh, st.Options(), buckets=2)
    with pytest.raises(ValueError, match="no options: buckets"):
        st.parallelize(Net(), mesh, {"buckets": 2})


def test_options_from_mappings():
    st.simulate(2, from_mappings)
    got = st.Options.from_dict(Config(blocks=["Block"], compile=Config(mode="default")))
    assert got.compile == {"mode": "default"} and got.blocks == ("Block",)


def wrong():
    mesh = make_mesh((2,), names=("domain",))
    for values, message in (
        ({"blocks": ["Layer"], "checkpoint": True}, "Layer"),
        ({"data": "time"}, "time"),
        ({"fsdp": "everything"}, "fsdp"),
        ({"buckets": 3}, "buckets"),
    ):
        with pytest.raises(ValueError, match=message):
            st.parallelize(Net(), mesh, **values)
    with pytest.raises(ValueError, match="ModuleList"):
        st.parallelize(nn.Linear(2, 2), mesh, checkpoint=True)


def test_refusals():
    st.simulate(2, wrong)


class Pairs(nn.Module):
    """Blocks in lists in a list, as in many ViTs, some of which are None."""

    def __init__(self):
        super().__init__()
        pairs = [[Block(2), None], [Block(2), Block(2)]]
        self.layers = nn.ModuleList([*(nn.ModuleList(p) for p in pairs), None])

    def forward(self, x):
        for pair in self.layers[:2]:
            for block in pair:
                if block is not None:
                    x = block(x)
        return x


def in_lists(settings):
    torch.manual_seed(0)
    model, x = Pairs().to(D), torch.randn(2, 2, 6, 4, dtype=D)
    want = model(x)
    ran = []
    for block in (model.layers[0][0], *model.layers[1]):
        block.conv.register_forward_hook(lambda *_: ran.append(1))
    st.parallelize(model, make_mesh((2,)), sync=False, **settings)
    y = model(st.distribute_tensor(x, make_mesh((2,)), [Shard(2)], src_data_rank=None))
    torch.testing.assert_close(y.full_tensor(), want)
    y.square().mean().backward()
    return len(ran)


def test_blocks_in_lists_of_lists_are_checkpointed():
    assert st.simulate(2, in_lists, {"checkpoint": True}) == [6, 6]
    assert st.simulate(2, in_lists, {}) == [3, 3]
