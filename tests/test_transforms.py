"""torch.func and forward mode on ShardTensors: as on one device, or refused; no tangent is lost."""

import pytest
import torch
import torch.autograd.forward_ad as fw
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Partial, Shard

import shardtensor as st
from shardtensor.ranks.testing import On, full, hold, make_mesh, shard, simulate

D = torch.float64
W = torch.randn(3, 3, 3, 3, dtype=D, generator=torch.Generator().manual_seed(2))
PLACES = torch.tensor([0, 6, 3, 3])


def attention(a, **options):
    tokens = a.flatten(2).mT[:, None]
    return F.scaled_dot_product_attention(tokens, tokens * 2, tokens.sin(), **options)


def written(a):
    b = a * 2
    b[:, :, 2:6] = a[:, :, 1:5].sin()
    return b


def overwritten(a):
    b = torch.zeros_like(a)
    b[:, 1].add_(a[:, 0])
    return b.mul_(a)


# functions of (2, 3, 8, 6), cut along dim 2
OPS = {
    "pointwise": lambda a: F.silu(a) * torch.sigmoid(a) + a.exp() / (1 + a * a),
    "sum": lambda a: (a * a).sum(),
    "conv": lambda a: F.conv2d(a, W, padding=1),
    "transposed conv": lambda a: F.conv_transpose2d(a, W, stride=2),
    "softmax": lambda a: a.softmax(2),
    "logsumexp": lambda a: a.logsumexp(2),
    "group_norm": lambda a: F.group_norm(a, 1),
    "layer_norm": lambda a: F.layer_norm(a, (8, 6)),
    "batch_norm": lambda a: F.batch_norm(a, None, None, training=True),
    "rms_norm": lambda a: F.rms_norm(a, (3, 8, 6)),
    "var": lambda a: a.var((0, 2)),
    "norm": lambda a: a.norm(),
    "amax": lambda a: a.amax(2),
    "median": lambda a: a.median(),
    "max_pool": lambda a: F.max_pool2d(a, 2),
    "adaptive": lambda a: F.adaptive_avg_pool2d(a, (3, 2)),
    "interpolate": lambda a: F.interpolate(a, scale_factor=2, mode="bilinear"),
    "pad": lambda a: F.pad(a, (1, 1, 2, 2), mode="circular"),
    "roll": lambda a: a.roll(1, 2),
    "cat": lambda a: torch.cat([a, a.flip(2)], 2),
    "cumsum": lambda a: a.cumsum(2),
    "fft": lambda a: torch.fft.irfft2(torch.fft.rfft2(a) * 2),
    "sort": lambda a: a.sort(2)[0],
    "index": lambda a: a[:, :, PLACES],
    "index_add": lambda a: torch.zeros(7, 6, dtype=D).index_add(0, torch.arange(8) % 7, a[0, 0]),
    "gather": lambda a: a.gather(2, torch.zeros(2, 3, 4, 6, dtype=torch.long)),
    "mask": lambda a: a[a > 0],
    "reshape": lambda a: a.flatten(2).unflatten(2, (8, 6)).pow(3),
    "matmul": lambda a: a.mT @ a,
    "einsum": lambda a: torch.einsum("bchw,bchv->bwv", a, a),
    "attention": attention,
    "causal attention": lambda a: attention(a, is_causal=True),
    "written": written,
    "overwritten": overwritten,
    "sparse": lambda a: a.flatten(0, 1).sum(0).T @ torch.eye(8, dtype=D).to_sparse(),
}


def jvp(f, x, v):
    return torch.func.jvp(f, (x,), (v,))


def dual(f, x, v):
    with fw.dual_level():
        return tuple(fw.unpack_dual(f(fw.make_dual(x, v))))


def vjp(f, x, v):
    y, back = torch.func.vjp(f, x)
    return y, back(torch.ones_like(y) * y)[0]


def hvp(f, x, v):
    return torch.func.jvp(torch.func.grad(lambda z: f(z).pow(3).sum()), (x,), (v,))


WAYS = {"jvp": jvp, "dual": dual, "vjp": vjp, "hvp": hvp}
# torch has no forward mode of these
NONE = {("sparse", "jvp"), ("sparse", "dual"), ("sparse", "hvp")}


def given():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 8, 6, dtype=D, generator=g) for _ in range(2)]


def derivatives(mesh_shape, place):
    x, v = given()
    mesh = make_mesh(mesh_shape)
    ours = [st.distribute_tensor(t, mesh, place[0], sizes=place[1]) for t in (x, v)]
    for name, f in list(OPS.items())[:: 1 if len(mesh_shape) == 1 and place[1][2][1] else 3]:
        for way, derive in WAYS.items():
            if (name, way) in NONE:
                with pytest.raises(RuntimeError):
                    derive(f, *ours)
                continue
            want, got = derive(f, x, v), derive(f, *ours)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(full(a), b, rtol=1e-9, atol=1e-9, msg=f"{name} {way}")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("mesh, place", [
    ((2,), ([Shard(2)], {2: (5, 3)})),
    ((3,), ([Shard(2)], {2: (8, 0, 0)})),
    ((2, 2), ([Shard(2), Shard(3)], {2: (1, 7)})),
], ids=["uneven", "empty", "two axes"])  # fmt: skip
def test_derivatives(mesh, place):
    """Of every op its jvp (in both ways), vjp, and the jvp of its gradient."""
    n = 4 if len(mesh) == 2 else mesh[0]
    simulate(n, derivatives, mesh, place)


class Flow(nn.Module):
    """A small U-Net with attention, of an image and two times."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.heads = nn.MultiheadAttention(4, 2, batch_first=True)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.time = nn.Linear(2, 4)

    def forward(self, z, r, t):
        h = self.norm(self.down(z)) + self.time(torch.stack([r, t], -1))[..., None, None]
        tokens = h.flatten(2).mT
        h = h + self.heads(tokens, tokens, tokens, need_weights=False)[0].mT.unflatten(
            2, h.shape[2:]
        )
        return self.up(F.gelu(h)) + z


def mean_flow(model, z, v, r, t):
    """MeanFlow's loss (arXiv 2505.13447): the target has the derivative along the flow."""
    one, none = torch.ones_like(t), torch.zeros_like(r)
    u, du = torch.func.jvp(model, (z, r, t), (v, none, one))
    target = v - (t - r)[:, None, None, None] * du
    return (u - target.detach()).square().mean()


def trained(put):
    torch.manual_seed(0)
    model = Flow().double()
    z, v = (put(torch.randn(2, 2, 8, 6, dtype=D)) for _ in range(2))
    r, t = torch.tensor([0.1, 0.4], dtype=D), torch.tensor([0.5, 0.9], dtype=D)
    loss = mean_flow(model, z, v, r, t)
    loss.backward()
    return [full(loss), *[p.grad for p in model.parameters()]]


def test_mean_flow():
    """A training step through a jvp: the loss, and whole gradients of plain parameters."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def on_rank():
        mesh = make_mesh((2,))
        # torch's fused kernels have no forward mode
        with sdpa_kernel(SDPBackend.MATH):
            want = trained(lambda t: t)
            got = trained(lambda t: st.distribute_tensor(t, mesh, [Shard(2)], sizes={2: (6, 2)}))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)

    simulate(2, on_rank)


def transforms():
    """vmap over a whole dim, Jacobians, grad of plain weights, closures, addends, nested jvp."""
    x, v = given()
    mesh = make_mesh((2,))
    place = dict(sizes={2: (5, 3)})
    ours = [st.distribute_tensor(t, mesh, [Shard(2)], **place) for t in (x, v)]
    small = torch.tensor([0.5, -1.0], dtype=D)
    func = torch.func
    cases = {
        "vmap": lambda a, b: func.vmap(lambda z: F.conv2d(z[None], W, padding=1).softmax(2))(a),
        "vmap, out_dims": lambda a, b: func.vmap(torch.mul, (0, 0), out_dims=2)(a[:, 0], b[0, :2]),
        "per sample": lambda a, b: func.vmap(func.grad(lambda z: z.roll(1, 1).pow(3).sum()))(a),
        "weights": lambda a, b: func.grad(lambda w: F.conv2d(a, w, padding=1).pow(2).sum())(W),
        "hessian": lambda a, b: func.hessian(lambda p: (p[0] * a + p[1].exp() * b).pow(2).sum())(
            small
        ),
        "jacfwd": lambda a, b: func.jacfwd(lambda p: (p[0] * a + p[1] * b).roll(1, 2))(small),
        "twice": lambda a, b: jvp(lambda z: jvp(lambda y: F.conv2d(y.sin(), W), z, b)[1], a, b)[1],
        "closure": lambda a, b: jvp(lambda p: (p[0] * a + p[1] * b).cumsum(2), small, small)[1],
        "var, twice": lambda a, b: jvp(lambda z: jvp(lambda y: y.var((2, 3)), z, b)[1], a, b)[1],
        "mixed": lambda a, b: jvp(lambda z: z @ torch.ones(6, 2, dtype=D) + b.mean(), a, v)[1],
    }
    for name, case in cases.items():
        got, want = case(*ours), case(x, v)
        torch.testing.assert_close(full(got), want, rtol=1e-9, atol=1e-9, msg=name)
    addends = st.ShardTensor.from_local(x / 2, mesh, [Partial()])
    got = jvp(lambda a: a.exp().roll(1, 2), addends, ours[1])
    for a, b in zip(got, jvp(lambda a: a.exp().roll(1, 2), x, v), strict=True):
        torch.testing.assert_close(full(a), b)


def test_transforms():
    simulate(2, transforms)


def beside():
    """Gradients of what surrounds a jvp: plain weights, also computed with inside of it."""
    x, v = given()
    mesh = make_mesh((2,))
    place = dict(sizes={2: (5, 3)})
    found = []
    for put in (lambda t: t, lambda t: st.distribute_tensor(t, mesh, [Shard(2)], **place)):
        w = W.clone().requires_grad_()
        y = jvp(lambda z, w=w: F.conv2d(z * w[0, 0, 0, 0], w, padding=1) * w.sum(), put(x), put(v))
        (y[0] * y[1]).mean().backward()
        found.append(w.grad)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_weights_beside_a_jvp():
    simulate(2, beside)


def of_a_trained_norm(x, many):
    """Gradients of a batch norm in eval mode; of many at a time, whose statistics are a batch."""
    norms = [nn.BatchNorm2d(3, dtype=D).eval() for _ in range(2)]
    for i, norm in enumerate(norms):
        norm.running_mean.fill_(i - 0.5)

    def loss(weights, buffers, x):
        return torch.func.functional_call(norms[0], (weights, buffers), (x,)).sin().mean()

    grad = torch.func.grad(loss)
    if not many:
        return grad(dict(norms[0].named_parameters()), dict(norms[0].named_buffers()), x)
    return torch.func.vmap(grad, (0, 0, None))(*torch.func.stack_module_state(norms), x)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_running_statistics_have_no_derivative(dim, many):
    x = given()[0]
    want = of_a_trained_norm(x, many)

    def on_rank():
        found = of_a_trained_norm(st.distribute_tensor(x, make_mesh((2,)), [Shard(dim)]), many)
        torch.testing.assert_close(
            {k: full(g) for k, g in found.items()}, want, rtol=1e-9, atol=1e-9
        )

    simulate(2, on_rank)


def refused():
    mesh = make_mesh((2,))
    x = st.distribute_tensor(torch.ones(4, 4, dtype=D), mesh, [Shard(0)])
    with pytest.raises(st.UnsupportedOpError, match="which is sharded"):
        torch.func.vmap(torch.sin)(x)
    with fw.dual_level(), pytest.raises(st.UnsupportedOpError, match="as its tangent"):
        fw.make_dual(torch.ones(4, 4), x)
    group = st.comm.group(mesh, (0,))
    # what sends floats without a derivative says so, and sends nothing
    with fw.dual_level():
        one = fw.make_dual(torch.ones(3), torch.ones(3))
        with pytest.raises(st.UnsupportedOpError, match="would be lost"):
            st.comm.wire.all_reduce([one], "sum", group)
        with pytest.raises(st.UnsupportedOpError, match="forward mode through a max"):
            st.comm.reduce(one, group, "max")
    assert (x * 2).full_tensor().sum() == 32  # nothing is left switched on


def test_refused_on_every_rank():
    simulate(2, refused)


def levels():
    """Simulated ranks are in forward mode at a time: none ends it for another."""
    x = torch.arange(6.0, dtype=D)
    own = st.distribute_tensor(x, make_mesh((3,)), [Shard(0)])
    for derive in (jvp, dual):
        _, t = derive(lambda a: a.roll(2, 0) * a.sum(), own, own)
        torch.testing.assert_close(full(t), 2 * x.roll(2, 0) * x.sum())


def test_ranks_share_a_level():
    simulate(3, levels)
    with fw.dual_level():
        assert fw._current_level == 0


def costs():
    """The tangent travels as the value does: as many messages more, of as many bytes."""
    x, v = given()
    mesh = make_mesh((2,))
    ours = [st.distribute_tensor(t, mesh, [Shard(2)]) for t in (x, v)]
    conv = OPS["conv"]
    with st.trace() as once:
        conv(ours[0])
    with st.trace() as both:
        jvp(conv, *ours)
    assert both.messages == 2 * once.messages and both.bytes == 2 * once.bytes > 0


def test_costs():
    simulate(2, costs)


def test_autograd_functional():
    x = torch.randn(5, dtype=torch.float64)

    def jvp(x):
        return torch.autograd.functional.jvp(lambda a: a**3, x, x * 0 + 2, create_graph=True)[1]

    hold(jvp, [x], [shard(0, (2, 0, 3))], (3,))


# functions whose parts are dealt out to shards that lie apart
DEALT = {
    "softmax": lambda a: a.softmax(2),
    "log_softmax": lambda a: a.log_softmax(2),
    "group_norm": lambda a: F.group_norm(a, 1),
    "rms_norm": lambda a: F.rms_norm(a, (3, 8, 6)),
    "cross_entropy": lambda a: F.cross_entropy(a.movedim(2, 1), PLACES[:2, None, None].expand(2, 3, 6)),
    "normalize": lambda a: F.normalize(a, dim=2),
    "prod": lambda a: a.prod(2), "logcumsumexp": lambda a: a.logcumsumexp(2),
    "weight": lambda a: a * a.mean() + a.sum(2, keepdim=True),
}  # fmt: skip


def by_formula(dims):
    """Of what torch's own second derivatives in forward mode are wrong."""

    def norm(a):
        var, mean = torch.var_mean(a, dims, correction=0, keepdim=True)
        return (a - mean) / (var + 1e-5).sqrt()

    return norm


NORMS = {
    "layer_norm": (lambda a: F.layer_norm(a, (8, 6)), by_formula((2, 3))),
    "batch_norm": (lambda a: F.batch_norm(a, None, None, training=True), by_formula((0, 2, 3))),
}


@pytest.mark.parametrize("name", [*DEALT, *NORMS])
def test_derivatives_of_tangents(name):
    """A tangent's own derivatives meet all ranks, forward and backward."""
    f, formula = NORMS[name] if name in NORMS else (DEALT[name], DEALT[name])
    x, v = (
        torch.randn(2, 3, 8, 6, dtype=D, generator=torch.Generator().manual_seed(i)) for i in (5, 6)
    )

    def derived(a, b, f=f):
        def tangent(z):
            return torch.func.jvp(f, (z,), (b,))[1]

        back = torch.func.grad(lambda z: tangent(z).square().sum())(a)
        return back, torch.func.jvp(tangent, (a,), (b,))[1]

    want = derived(x, v, formula)

    def rank(cut):
        mesh = make_mesh((len(cut),))
        a, b = (
            st.distribute_tensor(t, mesh, [Shard(2)], src_data_rank=None, sizes={2: cut})
            for t in (x, v)
        )
        return [full(y) for y in derived(a, b)]

    for cut in ((4, 0, 4), (5, 1, 2)):
        for got in simulate(len(cut), rank, cut):
            for y, w in zip(got, want, strict=True):
                assert torch.allclose(y, w, rtol=1e-9, atol=1e-9)


def test_a_sum_of_addends_that_is_captured():
    def product(a, w):
        return torch.func.grad(lambda q: (q.sin() * a).sum())(w)

    a, w = torch.randn(2, 4, 6, dtype=D).unbind()
    for places in ([On([Partial()]), None], [On([Partial()]), shard(1)]):
        hold(product, [a, w], places, (2,))
