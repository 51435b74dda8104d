"""Under match_single_device every draw is the one of plain PyTorch, bit for bit."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributions import Exponential, Laplace
from torch.nn import functional as F

import shardtensor as st
from shardtensor.ranks.testing import cuts, make_mesh

F32, F64 = torch.float32, torch.float64
DRAWS = {
    "dropout": lambda x: F.dropout(x, 0.3),
    "dropout_": lambda x: F.dropout(x * 1, 0.7, inplace=True),
    "dropout2d": lambda x: F.dropout2d(x, 0.5),
    "dropout2d_": lambda x: F.dropout2d(x * 1, 0.5, inplace=True),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.4),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, 0.4, training=True),
    "rand_like": torch.rand_like,
    "rand_like in another dtype": lambda x: torch.rand_like(x, dtype=torch.float64),
    "randn_like": torch.randn_like,
    "randint_like": lambda x: torch.randint_like(x, 2, 50),
    "normal_": lambda x: (x * 1).normal_(1.0, 3.0),
    "uniform_": lambda x: (x * 1).uniform_(-1, 2),
    "exponential_": lambda x: (x * 1).exponential_(2.0),
    "bernoulli_": lambda x: (x * 1).bernoulli_(0.3),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "new": lambda x: x.new(x.shape).uniform_(-1, 2),
    "a distribution": lambda x: Laplace(x, x.abs() + 1).rsample(),
    "several of each": lambda x: Exponential(x.abs() + 1).sample((2,)),
    "normal of means": lambda x: torch.normal(x, 2.0),
    "normal of deviations": lambda x: torch.normal(1.0, x.abs()),
    "twice": lambda x: torch.randn_like(x) + F.dropout(x),
}


def matched(draw, x, placements, sizes, mesh_shape, quiet=True):
    def run():
        torch.manual_seed(5)
        s = st.distribute_tensor(
            x, make_mesh(mesh_shape), placements, sizes=sizes, src_data_rank=None
        )
        with st.random.match_single_device(), st.trace() as t:
            y = draw(s)
        # the order in memory is asked for where a shard of less than two rows cannot show it
        tiny = any(d.axes and d.size > 1 and min(d.sizes) < 2 for d in s.spec.dims)
        assert not t.sent or tiny or not quiet
        return y.full_tensor(), torch.get_rng_state()

    torch.manual_seed(5)
    want = draw(x)
    for got, state in st.simulate(torch.Size(mesh_shape).numel(), run):
        assert torch.equal(got, want)
        assert torch.equal(state, want_state(draw, x))


def want_state(draw, x):
    torch.manual_seed(5)
    draw(x)
    return torch.get_rng_state()


@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16])
@pytest.mark.parametrize("name", DRAWS)
def test_draws(name, dtype):
    x = torch.linspace(-2, 2, 2 * 3 * 7 * 5, dtype=dtype).reshape(2, 3, 7, 5)
    matched(DRAWS[name], x, [Shard(2)], {2: (4, 0, 3)}, (3,))


@pytest.mark.parametrize("shape", [(3,), (15,), (16,), (17,), (41,)])
@pytest.mark.parametrize("name", ["randn_like", "dropout", "rand_like"])
def test_sizes_around_a_block_of_16(name, shape):
    for cut in cuts(shape[0]):
        matched(DRAWS[name], torch.ones(shape), [Shard(0)], {0: cut}, (len(cut),))


@pytest.mark.parametrize("placements", [
    [Shard(0), Shard(2)], [Shard(1), Shard(1)], [Replicate(), Shard(2)], [Shard(2), Replicate()],
])  # fmt: skip
def test_two_axes(placements):
    x = torch.ones(3, 4, 5)
    for name in ("randn_like", "dropout"):
        matched(DRAWS[name], x, placements, None, (2, 2))


def test_several_pieces(monkeypatch):
    monkeypatch.setattr(st.random, "_PIECE", 32)
    for name in ("randn_like", "dropout", "rand_like"):
        matched(DRAWS[name], torch.ones(9, 11), [Shard(1)], {1: (4, 7)}, (2,))


class Written(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the elements that ops give."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        fresh = isinstance(out, torch.Tensor) and not out._is_view()
        self.elements += out.numel() if fresh else 0
        return out


@pytest.mark.parametrize("dim, cut", [(1, (2, 2)), (0, None)])
def test_time_is_that_of_the_whole(monkeypatch, dim, cut):
    monkeypatch.setattr(st.random, "_PIECE", 128)
    # as which a mode that counts is taken
    monkeypatch.setattr(st.random._torch, "is_tracing", lambda: False)

    def elements(rows):
        x = st.distribute_tensor(torch.ones(rows, 4), make_mesh((2,)), [Shard(dim)],
                                 sizes=cut and {dim: cut}, src_data_rank=None)  # fmt: skip
        with st.random.match_single_device(), Written() as count:
            torch.rand_like(x)
        return count.elements

    def run():
        assert elements(4096) < 4.5 * elements(1024)

    st.simulate(2, run)


def test_a_model_with_dropout_trains_as_on_one_device():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Dropout(0.3), nn.ReLU(), nn.Dropout2d(0.2),
                          nn.Conv2d(4, 1, 3, padding=1)).double()  # fmt: skip
    x = torch.randn(2, 2, 6, 5, dtype=F64)

    def run():
        torch.manual_seed(1)
        own = copy.deepcopy(model)
        s = st.distribute_tensor(x, make_mesh((2,)), [Shard(2)], src_data_rank=None)
        with st.random.match_single_device():
            loss = own(s).square().mean()
        loss.backward()
        return [p.grad.clone() for p in own.parameters()]

    torch.manual_seed(1)
    model(x).square().mean().backward()
    want = [p.grad.clone() for p in model.parameters()]
    for got in st.simulate(2, run):
        for g, w in zip(got, want, strict=True):
            assert torch.allclose(g, w, rtol=1e-12, atol=1e-14)


LAYOUTS = {
    "transpose": lambda x: x.transpose(1, 2),
    "permute": lambda x: (x + 1).permute(3, 0, 2, 1),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "steps": lambda x: x[..., ::2].transpose(0, 3),
    "expanded": lambda x: x[:, :1].expand(2, 4, 7, 5).transpose(1, 2),
    "heads": lambda x: x.flatten(0, 1).unflatten(0, (2, 3)).transpose(1, 2).transpose(-1, -2),
}
ORDERED = (
    "dropout", "dropout_", "alpha_dropout", "rand_like", "randn_like", "randint_like", "normal_",
    "exponential_", "bernoulli_", "bernoulli", "normal of means", "twice",
)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ORDERED)
def test_the_order_of_dims_in_memory(name, layout):
    x = torch.linspace(-2, 2, 2 * 3 * 7 * 5, dtype=F64).reshape(2, 3, 7, 5)
    draw = DRAWS[name]
    draw = (lambda x: torch.dropout_(x.clone(), 0.7, True)) if name == "dropout_" else draw
    for sizes in ((4, 3), (1, 6)):
        matched(lambda x: draw(LAYOUTS[layout](x)), x, [Shard(2)], {2: sizes}, (2,), quiet=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["dropout", "randn_like", "uniform_"])
def test_the_order_where_no_shard_shows_it(name, layout):
    x = torch.linspace(-2, 2, 2 * 3 * 7 * 5, dtype=F64).reshape(2, 3, 7, 5)[:, :, :3].contiguous()

    def draw(x):
        whole = F.interpolate(x, (7, 5)) if layout == "expanded" else x
        return DRAWS[name](LAYOUTS[layout](whole) * 2)

    for sizes in ((1, 1, 1), (0, 3, 0), (2, 1, 0)):
        matched(draw, x, [Shard(2)], {2: sizes}, (3,), quiet=False)


WHOLE = {
    "columns": lambda x: x[:, 1:].transpose(0, 2),
    "two orders": lambda x: x.mT + x.permute(0, 1, 3, 2).contiguous(),
    "conv": lambda x: torch.conv2d(
        x.contiguous(memory_format=torch.channels_last), x.new_ones(2, 3, 1, 1)),
    "softmax": lambda x: x.transpose(1, 2).softmax(2),
    "fft": lambda x: torch.fft.fft(x, dim=2).real,
}  # fmt: skip


@pytest.mark.parametrize("way", WHOLE)
@pytest.mark.parametrize("dim, cut", [(2, (3, 1)), (1, (1, 2)), (0, (4, 0))])
def test_the_order_that_only_the_whole_has(way, dim, cut):
    x = torch.linspace(-2, 2, 4 * 3 * 4 * 5, dtype=F64).reshape(4, 3, 4, 5)
    draw = lambda x: torch.rand_like(WHOLE[way](x))  # noqa: E731
    matched(draw, x, [Shard(dim)], {dim: cut}, (2,), quiet=False)


@pytest.mark.parametrize("name", ["feature_dropout", "feature_alpha_dropout"])
def test_channels_are_drawn_rows_first(name):
    x = torch.linspace(-2, 2, 28, dtype=F64).reshape(4, 7)
    draw = getattr(torch, name)
    for dim, cut in ((0, (3, 1)), (1, (4, 3))):
        matched(
            lambda x: draw(x.t() + 1, 0.5, True), x, [Shard(dim)], {dim: cut}, (2,), quiet=False
        )


def test_the_result_keeps_the_order():
    x = torch.ones(3, 4, 5)
    matched(lambda x: F.dropout(torch.rand_like(x.transpose(0, 2))), x, [Shard(1)], None, (2,))
    last = torch.channels_last
    x = torch.ones(2, 3, 4, 5)
    matched(lambda x: torch.randn_like(x, memory_format=last), x, [Shard(2)], None, (2,))


GATHERED = {
    "rrelu": lambda x: F.rrelu(x, training=True),
    "multinomial": lambda x: torch.multinomial(x[0, 0].abs(), 3),
    "poisson": lambda x: torch.poisson(x.abs() * 3),
    "poisson of another order": lambda x: torch.poisson(x.abs().transpose(1, 2)),
    "binomial": lambda x: torch.binomial(x.abs() * 9, x.sigmoid()),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.3),
    "causal attention": lambda x: F.scaled_dot_product_attention(
        x, x, x, dropout_p=0.3, is_causal=True, scale=0.5
    ),
    "fractional pool": lambda x: F.fractional_max_pool2d(x, 2, output_ratio=(0.6, 0.6)),
}


@pytest.mark.parametrize("name", GATHERED)
def test_draws_on_gathered_operands(name):
    x = torch.linspace(-2, 2, 2 * 3 * 7 * 5, dtype=F64).reshape(2, 3, 7, 5)
    matched(GATHERED[name], x, [Shard(2)], {2: (4, 0, 3)}, (3,), quiet=False)


def refused():
    x = st.distribute_tensor(torch.ones(4, 8), make_mesh((2,)), [Shard(0)])
    with pytest.raises(st.UnsupportedOpError, match="match_single_device"):
        torch.poisson(x)


def test_refused():
    st.simulate(2, refused)
