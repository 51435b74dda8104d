"""A compiled program draws what the eager one draws, anew at each call; backward has the same masks."""

import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh

F64 = torch.float64


class Net(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body
        self.p = nn.Parameter(torch.linspace(0.1, 0.9, 4, dtype=F64))
        self.g = torch.Generator()

    def forward(self, x):
        return self.body(self, x)


def in_place(m, x):
    y = x * m.p
    F.dropout(y, 0.4, inplace=True)
    return y * torch.empty_like(x).normal_(1.0, 2.0) + torch.zeros_like(x).uniform_()


def drop_path(m, x):
    """As timm's, which draws sharded, and torchvision's, which draws on every rank alike."""
    ours = x.new_empty((x.shape[0], 1, 1)).bernoulli_(0.7).div_(0.7)
    theirs = torch.empty((x.shape[0], 1, 1), dtype=x.dtype).bernoulli_(0.7).div_(0.7)
    return x * ours + m.p * theirs


def among_plain(m, x):
    y = F.dropout(x * torch.rand(4, dtype=F64), 0.3) + F.dropout(m.p, 0.3)
    return y + torch.randn(4, dtype=F64) * torch.randn_like(x) * torch.randperm(4)


def unused(m, x):
    torch.rand_like(x), torch.rand(3)
    return F.dropout(x * m.p)


def two_generators(m, x):
    y = torch.rand(4, generator=m.g, dtype=F64) * torch.empty_like(x).uniform_(generator=m.g)
    return x * y + F.dropout(x)


def recomputed(m, x):
    y = torch.utils.checkpoint.checkpoint(
        lambda t: F.dropout(t.sin() * m.p), x, use_reentrant=False
    )
    return y + F.dropout(x)


def seeded(m, x):
    torch.manual_seed(0)
    return F.dropout(x * m.p)


def forked(m, x):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        y = x * torch.rand(4, dtype=F64)
    return F.dropout(y)


def own_generator(m, x):
    return x * torch.rand(4, generator=torch.Generator().manual_seed(1), dtype=F64)


def seeded_generator(m, x):
    m.g.manual_seed(1)
    return F.dropout(x) * torch.rand(4, generator=m.g, dtype=F64)


BODIES = {
    "dropout": lambda m, x: F.dropout(x * m.p, 0.4) * 2 + F.dropout(x, 0.4),
    "like": lambda m, x: x * torch.rand_like(x) + torch.randn_like(x) * torch.randint_like(x, 1, 5),
    "bernoulli": lambda m, x: (
        x * torch.bernoulli(x.detach().sigmoid()) * torch.bernoulli(x.detach(), 0.4)
    ),
    "channels": lambda m, x: F.dropout1d(x, 0.3) + F.alpha_dropout(x, 0.3, True),
    "normal": lambda m, x: torch.normal(x * m.p, 1.0) * x,
    "transposed": lambda m, x: F.dropout(x.transpose(0, 1), 0.3).transpose(0, 1),
    "rows": lambda m, x: x[torch.randperm(x.shape[0])],
    **{f.__name__: f for f in (in_place, drop_path, among_plain, unused, two_generators, recomputed)},
}  # fmt: skip
# what no graph holds
EAGER = {f.__name__: f for f in (seeded, forked, own_generator, seeded_generator)}
VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
for name, since in (("two_generators", (2, 13)), ("recomputed", (2, 12))):
    if since > VERSION:
        EAGER[name] = BODIES.pop(name)


def calls(body, place, compiled):
    """What four calls give: outputs, gradients, where the generator stands after each."""
    torch.manual_seed(5)
    m = Net(body)
    m.g.manual_seed(2)
    fn, found = compiled(m), []
    for _ in range(4):
        x = place(torch.linspace(-1, 2, 84, dtype=F64).view(7, 3, 4).sin()).requires_grad_()
        m.zero_grad()
        y = fn(x)
        (y * y.detach().cos()).sum().backward()
        found += [y.detach(), x.grad, m.p.grad, torch.get_rng_state()]
    return found, getattr(fn, "traces", None)


def on_a_rank(body, sizes, matching, compiled):
    mesh = make_mesh((len(sizes),))

    def place(x):
        return st.distribute_tensor(x, mesh, [Shard(0)], sizes={0: sizes}, src_data_rank=None)

    with st.random.match_single_device() if matching else nullcontext():
        found, traces = calls(body, place, compiled)
    return [x.full_tensor() if isinstance(x, st.ShardTensor) else x for x in found], traces


def eagerly(m):
    return m


def compiled(m):
    return st.compile(m, backend="eager")


def held(got, want):
    for g, w in zip(got, want, strict=True):
        if w is None or w.dtype is torch.uint8:
            assert (g is w) if w is None else torch.equal(g, w)
        else:
            torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", BODIES)
def test_compiled_draws_are_those_of_eager_calls(name):
    sizes = (4, 0, 3)
    want = st.simulate(3, on_a_rank, BODIES[name], sizes, False, eagerly)
    got = st.simulate(3, on_a_rank, BODIES[name], sizes, False, compiled)
    for (g, traces), (w, _) in zip(got, want, strict=True):
        assert traces == 1
        held(g, w)
    y = got[0][0][::4]
    assert not any(torch.equal(a, b) for i, a in enumerate(y) for b in y[:i])


@pytest.mark.parametrize("name", BODIES)
def test_compiled_draws_of_one_device(name):
    want, _ = calls(BODIES[name], eagerly, eagerly)
    for got, traces in st.simulate(2, on_a_rank, BODIES[name], (5, 2), True, compiled):
        assert traces == 1
        held(got, want)


@pytest.mark.parametrize("name", EAGER)
def test_a_program_that_seeds_runs_eagerly(name):
    want, _ = calls(EAGER[name], eagerly, eagerly)
    with pytest.warns(UserWarning, match="runs eagerly where no graph holds it"):
        ((got, traces),) = st.simulate(1, on_a_rank, EAGER[name], (7,), True, compiled)
    assert traces == 0
    held(got, want)


def test_matched_draws_of_shards_that_show_no_order():
    want, _ = calls(BODIES["dropout"], eagerly, eagerly)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ranks = st.simulate(3, on_a_rank, BODIES["dropout"], (4, 0, 3), True, compiled)
    for got, _ in ranks:
        held(got, want)


def without_dropout(m, x):
    """Attention, recurrent layers and dropout in eval mode are ops that might draw."""
    y = F.scaled_dot_product_attention(x, x * m.p, x) + F.dropout(m.p, 0.5, training=False)
    q = m.p.view(1, 1, 4)
    return y + F.scaled_dot_product_attention(q, q, q) + F.rrelu(m.p, training=False)


def test_what_does_not_draw_stays_in_the_graph():
    want, _ = calls(without_dropout, eagerly, eagerly)
    for got, traces in st.simulate(2, on_a_rank, without_dropout, (5, 2), False, compiled):
        assert traces == 1
        held(got, want)


def probable(p):
    x = st.distribute_tensor(torch.tensor(p), make_mesh((2,)), [Shard(0)], src_data_rank=None)
    with pytest.raises(RuntimeError, match="Expected p_in"):
        st.compile(torch.bernoulli, backend="eager")(x)


def test_a_probability_beyond_one_raises_on_all_ranks():
    st.simulate(2, probable, [0.1, 0.2, 0.3, 1.5])
