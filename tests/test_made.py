"""parallelize(made_mb=...): what a model makes of sizes, indices and coordinates is made sharded."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import shardtensor as st
from shardtensor._torch.world import silent_world
from shardtensor.ranks.measure import peak_bytes
from shardtensor.ranks.testing import full, make_mesh
from shardtensor.spec import Spec
from shardtensor.tensor import wrap
from shardtensor.train.begun import BEGINS

D = torch.float64
ALL = 1e-6
H, W = 6, 5


class Biased(nn.Module):
    """Attention among the tokens of an image, with a bias of each pair of them."""

    def __init__(self, rows=H, columns=W, heads=2, width=4, way="index"):
        super().__init__()
        n = rows * columns
        self.heads, self.way = heads, way
        self.qkv = nn.Linear(width, 3 * width)
        at = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
        at = at.flatten(1)
        apart = at[:, :, None] - at[:, None, :]
        index = (apart[0] + rows) * 2 * columns + apart[1] + columns
        table = torch.randn(4 * rows * columns + 2 * rows + 2 * columns, heads)
        self.register_buffer("index", index)
        self.register_buffer("apart", apart.permute(1, 2, 0).double())
        self.table = nn.Parameter(table.t().contiguous() if way == "heads" else table)
        self.mlp = nn.Sequential(nn.Linear(2, 16), nn.GELU(), nn.Linear(16, heads))
        self.slope = nn.Parameter(torch.randn(heads, 1, 1))
        self.register_buffer("label", torch.arange(n) % 3)

    def bias(self, n):
        if self.way == "index":
            return self.table[self.index].permute(2, 0, 1).contiguous()
        if self.way == "flat":
            flat = self.table[self.index.view(-1)]
            return flat.view(n, n, -1).permute(2, 0, 1).unsqueeze(0)
        if self.way == "heads":
            return self.table[:, self.index]
        if self.way == "select":
            return (
                torch.index_select(self.table, 0, self.index.reshape(-1))
                .view(n, n, -1)
                .movedim(2, 0)
            )
        if self.way == "embedding":
            return F.embedding(self.index, self.table).movedim(2, 0)
        if self.way == "mlp":
            return 16 * torch.sigmoid(self.mlp(self.apart)).movedim(-1, 0)
        if self.way == "mask":
            unlike = self.label.unsqueeze(0) - self.label.unsqueeze(1)
            return unlike.masked_fill(unlike != 0, -9).to(D) * self.slope
        if self.way == "grid":
            side = torch.linspace(0, 1, n, dtype=D)
            a, b = torch.meshgrid(side, side, indexing="ij")
            return self.slope * torch.stack([a, b], -1).repeat(1, 1, 1).sum(-1)
        if self.way == "repeats":
            part = torch.arange(n, dtype=D).view(1, -1) / n
            wide = part.repeat(n, 1) + part.expand(n, n).contiguous().t()
            return self.slope * (
                wide - part.repeat_interleave(n, dim=0).repeat_interleave(1, dim=1)
            )
        assert self.way == "blank"
        out = torch.zeros(n, n, 3, dtype=D)
        out[:, :, 1] = self.label.to(D).unsqueeze(0)
        out[1:, :, 2] = self.label.to(D)[1:, None] * torch.ones(n - 1, n, dtype=D)
        ones = torch.full((n, n), 0.5, dtype=D) + self.slope.new_zeros(n, n)
        return self.slope * (out.sum(-1) + ones)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        b, n, c = tokens.shape
        q, k, v = self.qkv(tokens).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) + self.bias(n)).softmax(-1)
        return (weights @ v).transpose(1, 2).reshape(b, n, c)


WAYS = ("index", "flat", "heads", "select", "embedding", "mlp", "mask", "grid", "repeats", "blank")


class Spectral(nn.Module):
    """A Fourier layer that writes its modes to zeros of the spectrum's size."""

    def __init__(self, channels=4):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels, 2, 2, dtype=torch.complex128))

    def forward(self, x):
        found = torch.fft.rfft2(x)
        out = torch.zeros(*x.shape[:2], x.shape[2], x.shape[3] // 2 + 1, dtype=torch.complex128)
        out[:, :, :2, :2] = torch.einsum("bixy,ioxy->boxy", found[:, :, :2, :2], self.weight)
        out[:, :, -2:, :2] = torch.einsum("bixy,ioxy->boxy", found[:, :, -2:, :2], self.weight)
        return torch.fft.irfft2(out, s=x.shape[2:]) + x


def step(model, x):
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    return [y, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.fixture
def started(monkeypatch):
    """The functions whose results began sharded."""
    found = []

    def noting(begin):
        def noted(where, func, args, kwargs):
            out = begin(where, func, args, kwargs)
            if out is not NotImplemented:
                found.append(func)
            return out

        return noted

    for func, begin in BEGINS.items():
        monkeypatch.setitem(BEGINS, func, noting(begin))
    return found


def held(model, x, mesh, placements, sizes=None, **options):
    """Hold a parallelized model to the same on one device: its result and all gradients."""
    torch.manual_seed(0)
    model = model.to(D) if not any(p.is_complex() for p in model.parameters()) else model
    want = step(copy.deepcopy(model), x)

    def run():
        mine = copy.deepcopy(model)
        on = make_mesh(mesh)
        st.parallelize(mine, on, sync=False, made_mb=ALL, **options)
        given = st.distribute_tensor(x, on, placements, src_data_rank=None, sizes=sizes)
        return [full(y) for y in step(mine, given)]

    ranks = 1
    for n in mesh:
        ranks *= n
    for got in st.simulate(ranks, run):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert (a - b).abs().max() < 1e-9


@pytest.mark.parametrize("cut", [(6,), (4, 2), (3, 0, 3), (2, 1, 1, 2)])
@pytest.mark.parametrize("way", WAYS)
def test_a_bias_of_each_pair(way, cut, started):
    torch.manual_seed(1)
    model, x = Biased(way=way), torch.randn(2, 4, H, W, dtype=D)
    held(model, x, (len(cut),), [Shard(2)], {2: cut})
    assert started


@pytest.mark.parametrize("way", ["index", "mlp", "mask", "blank"])
def test_on_two_axes(way, started):
    torch.manual_seed(2)
    model, x = Biased(way=way), torch.randn(2, 4, H, W, dtype=D)
    held(model, x, (2, 2), [Shard(2), Shard(3)])
    # an axis of samples has all of it
    held(model, x, (2, 2), [Shard(0), Shard(2)])
    assert started


@pytest.mark.parametrize("cut", [(5, 3), (1, 4, 0, 3)])
def test_zeros_for_modes(cut, started):
    torch.manual_seed(3)
    held(Spectral(), torch.randn(2, 4, 8, 7, dtype=D), (len(cut),), [Shard(2)], {2: cut})
    assert torch.zeros in started


class Blocks(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        self.blocks = nn.ModuleList([Biased(way="index"), Biased(way="mask")])
        self.reentrant = reentrant

    def forward(self, x):
        for block in self.blocks:
            if self.reentrant is None:
                y = block(x)
            else:
                y = checkpoint(block, x, use_reentrant=self.reentrant)
            x = x + y.transpose(1, 2).unflatten(2, x.shape[2:])
        return x


@pytest.mark.parametrize("way", [False, "option"])
def test_a_checkpoint_makes_the_same_again(way, started):
    torch.manual_seed(4)
    model, x = Blocks(way if way is False else None), torch.randn(1, 4, H, W, dtype=D)
    options = {"checkpoint": True, "blocks": ("Biased",)} if way == "option" else {}
    held(model, x, (2,), [Shard(2)], **options)
    # in forward and in recomputation
    assert started.count(torch.Tensor.__getitem__) == 4


class Kept(nn.Module):
    """What is made of weights, of random numbers and for Python is plain."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.a, self.b = nn.Parameter(torch.randn(4, 1)), nn.Parameter(torch.randn(1, 36))
        self.seen = []

    def forward(self, x):
        spread = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std()
        low = (self.a @ self.b).view_as(spread)
        order = spread[torch.tensor([2, 0, 3, 1])]
        self.seen = [spread, low, order, torch.randn(64, 64), torch.zeros(3)]
        return F.conv2d(x, spread + low + order, padding=1)


def test_weights_stay_plain():
    torch.manual_seed(5)
    model, x = Kept().to(D), torch.randn(1, 4, H, W, dtype=D)
    held(model, x, (2,), [Shard(2)])

    def run():
        on = make_mesh((2,))
        mine = st.parallelize(copy.deepcopy(model), on, sync=False, made_mb=0.0001)
        mine(st.distribute_tensor(x, on, [Shard(2)], src_data_rank=None))
        return [isinstance(y, st.ShardTensor) for y in mine.seen]

    assert st.simulate(2, run)[0] == [False] * 5


def test_what_is_small_or_grown_little_stays_plain():
    def run():
        on = make_mesh((2,))
        seen = []

        class Model(nn.Module):
            def forward(self, x):
                seen.append(torch.zeros(2**10))
                seen.append(torch.zeros(2**14))
                seen.append(torch.arange(2**14).clone())
                return x + x.full_tensor().sum() + seen[1].sum()

        model = st.parallelize(Model(), on, made_mb=2**-5)
        model(st.distribute_tensor(torch.ones(1, 4), on, [Shard(1)]))
        seen.append(torch.zeros(2**14))
        return [isinstance(y, st.ShardTensor) for y in seen]

    assert st.simulate(2, run)[0] == [False, True, False, False]


RANKS = 8


def one_of_eight(build, shape, **options):
    """(peak, bytes sent) of a step on a rank in the middle."""
    with silent_world(RANKS // 2, RANKS):
        mesh = make_mesh((RANKS,))
        torch.manual_seed(6)
        model = st.parallelize(build().float(), mesh, sync=False, **options)
        spec = Spec.of(mesh, [Shard(2)], shape)
        x = wrap(torch.randn(spec.local_shape), spec)

        def run():
            model.zero_grad()
            with st.trace() as t:
                model(x).square().mean().backward()
            return t.bytes

        run()
        sent = []
        return peak_bytes(lambda: sent.append(run())), sent[0]


@pytest.mark.parametrize("way", ["index", "mlp", "mask"])
def test_a_bias_takes_its_share(way):
    def build():
        model = Biased(24, 32, 4, 8, way)
        model.apart = model.apart.float()
        model.bias = (lambda f: lambda n: f(n).float())(model.bias)
        return model

    shape = (1, 8, 24, 32)
    whole, before = one_of_eight(build, shape)
    peak, sent = one_of_eight(build, shape, made_mb=0.25)
    bias = 4 * 768**2 * 4
    assert whole > 1.5 * bias
    # scores, probabilities, the bias, what the network made, and their gradients: a share of each
    assert peak < (3 if way == "mlp" else 1.2) * bias
    assert sent <= before


@pytest.mark.parametrize("value", [0, -1, True, "16"])
def test_made_mb_is_a_number(value):
    with pytest.raises(ValueError, match=r"made_mb is .* a positive number"):
        st.Options(made_mb=value)


class Made(nn.Module):
    """Attention with a bias that make(weight) gives."""

    def __init__(self, make):
        super().__init__()
        self.make, self.weight = make, nn.Parameter(torch.randn(8))

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        return (tokens @ tokens.mT + self.make(self.weight)).softmax(-1) @ tokens


N = H * W
PAIRS = torch.arange(N)[:, None] + torch.arange(N)


def again(make):
    return lambda w: checkpoint(make, w, use_reentrant=False)


def drawn(w):
    torch.manual_seed(7)
    layer = nn.Linear(N, N)
    return layer(torch.empty(N, N).normal_()).detach() + torch.empty(N, N).bernoulli_(0.5) * w[0]


def drawn_into(w):
    torch.manual_seed(7)
    with st.random.match_single_device():
        return torch.zeros(N, N).normal_() * torch.bernoulli(torch.full((N, N), 0.3)) * w[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda w: torch.full(size=(N, N), fill_value=0.5) * w[0],
        lambda w: torch.cat([torch.empty(0), torch.arange(N).to(D).expand(N, N)]) * w[0],
        lambda w: F.embedding(PAIRS % 8, w[:, None], None, None, 2.0, True).squeeze(-1),
        lambda w: w[None, :, None].expand(2, 8, 3)[..., PAIRS % 8, :, None].sum((0, 3, 4)),
        again(lambda w: torch.full((N, N), 0.5) * w[0] + w[PAIRS % 8]),
        lambda w: torch.repeat_interleave(input=w[:1, None].expand(N, 1), repeats=N, dim=1),
        drawn,
        drawn_into,
    ],
    ids=["keywords", "legacy", "frequencies", "ellipsis", "checkpoint", "repeats", "drawn", "into"],
)
def test_relatives(make):
    torch.manual_seed(8)
    default = torch.get_default_dtype()
    torch.set_default_dtype(D)
    try:
        model, x = Made(make), torch.randn(2, 4, H, W)
        held(model, x, (3,), [Shard(2)], {2: (3, 0, 3)})
        held(model, x, (2, 2), [Shard(2), Shard(3)])
    finally:
        torch.set_default_dtype(default)


class Again(nn.Module):
    """A checkpoint of a function that makes its bias."""

    def __init__(self):
        super().__init__()
        self.inner = Made(lambda w: torch.full((N, N), 0.5).to(w) * w[0] + w[PAIRS % 8])

    def forward(self, x):
        return checkpoint(lambda y: self.inner.forward(y), x * 2, use_reentrant=True)


def test_a_reentrant_checkpoint_of_a_function():
    torch.manual_seed(9)
    x = torch.randn(2, 4, H, W, dtype=D, requires_grad=True)
    held(Again(), x, (3,), [Shard(2)], {2: (3, 0, 3)})


@pytest.mark.parametrize(
    "make",
    [
        lambda w: w[PAIRS % 8 + 8 * (PAIRS == 2 * N - 2)],
        lambda w: w[PAIRS % 8 - 16 * (PAIRS == 2 * N - 2)],
        lambda w: F.embedding(PAIRS % 8 + 8 * (PAIRS == 2 * N - 2), w[:, None]).squeeze(-1),
        lambda w: w.index_select(0, (PAIRS % 8 - 8 * (PAIRS == 2 * N - 2)).flatten()).view(N, N),
    ],
)
def test_an_index_that_torch_refuses_is_refused_on_all_ranks(make):
    def run():
        on = make_mesh((2,))
        model = st.parallelize(Made(make).to(D), on, sync=False, made_mb=ALL)
        x = st.distribute_tensor(torch.randn(1, 4, H, W).to(D), on, [Shard(2)], src_data_rank=None)
        with pytest.raises(IndexError):
            model(x)
        return True

    assert st.simulate(2, run) == [True, True]
