"""A rank without rows records the graph that the others record: derivatives of every order, and errors."""

import pytest
import torch
import torch.nn.functional as F
from drawn import drawn
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import _torch
from shardtensor.ranks.testing import make_mesh, same, simulate
from shardtensor.spec import hollow

W, INDEX = drawn(4, 4, seed=1), torch.tensor([3, 0, 3, 1])
GRID = drawn(5, 3, 3, 2, seed=2).tanh() * 0.9
KERNEL = drawn(3, 4, 3, seed=3)

# what is cut is dim 0 of x, of shape (5, 4) or as named
OPS = {
    "amax": lambda x: x.amax(0), "amin": lambda x: x.amin((0, 1)), "max": lambda x: x.max(0)[0], "aminmax": lambda x: x.aminmax(dim=0)[1],
    "max other": lambda x: x.max(1)[0], "amax other": lambda x: x.amax(1), "cumprod": lambda x: x.cumprod(0),
    "cumprod other": lambda x: x.cumprod(1), "cumsum": lambda x: x.cumsum(0), "logcumsumexp": lambda x: x.logcumsumexp(0),
    "logcumsumexp other": lambda x: x.logcumsumexp(1), "cummax": lambda x: x.cummax(0)[0], "cummax other": lambda x: x.cummax(1)[0],
    "cummin": lambda x: x.cummin(0)[0], "prod": lambda x: x.prod(0), "prod all": lambda x: x.prod(), "prod other": lambda x: x.prod(1),
    "take": lambda x: x.take(torch.tensor([7, 0, 19, 7])), "index": lambda x: x[INDEX], "index pairs": lambda x: x[INDEX, INDEX],
    "index other": lambda x: x[:, INDEX], "index_select": lambda x: x.index_select(0, INDEX),
    "gather": lambda x: x.gather(0, INDEX.reshape(1, 4)), "gather other": lambda x: x.gather(1, INDEX.expand(5, 4)),
    "mask": lambda x: x[x.detach() > 0], "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=0),
    "vector_norm all": lambda x: x.norm(),
    "vector_norm 1": lambda x: torch.linalg.vector_norm(x, 1), "norm inf": lambda x: x.norm(float("inf")),
    "vector_norm other": lambda x: torch.linalg.vector_norm(x, 3, dim=1),
    "norm 2 other": lambda x: x.norm(dim=1), "normalize": lambda x: F.normalize(x, dim=0),
    "embedding": lambda x: F.embedding(INDEX, x), "logsumexp": lambda x: x.logsumexp(0), "softmax": lambda x: x.softmax(0),
    "softmax other": lambda x: x.softmax(1), "log_softmax": lambda x: x.log_softmax(0), "var": lambda x: x.var(0), "std": lambda x: x.std(0),
    "std other": lambda x: x.std(1), "mean": lambda x: x.mean(0), "sort": lambda x: x.sort(0)[0], "sort other": lambda x: x.sort(1)[0],
    "topk": lambda x: x.topk(2, 0)[0], "topk other": lambda x: x.topk(2, 1)[0], "median": lambda x: x.median(0)[0],
    "median other": lambda x: x.median(1)[0], "kthvalue": lambda x: x.kthvalue(2, 1)[0], "quantile": lambda x: x.quantile(0.3, 0),
    "quantile other": lambda x: x.quantile(0.3, 1), "nanmedian": lambda x: x.nanmedian(), "mode": lambda x: x.mode(1)[0],
    "matmul": lambda x: x @ W, "gram": lambda x: x.T @ x, "outer": lambda x: x @ x.T,
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x), "baddbmm": lambda x: torch.bmm(x[:, :, None], x[:, None]),
    "roll": lambda x: x.roll(1, 0), "flip": lambda x: x.flip(0), "diff": lambda x: x.diff(dim=0), "tril": lambda x: x.tril(),
    "diagonal": lambda x: x.diagonal(), "trace": lambda x: x[:, :1].T @ x, "cat": lambda x: torch.cat([x, x * x]),
    "scatter_add": lambda x: x.scatter_add(0, INDEX.reshape(1, 4), x[:1]), "scatter_reduce": lambda x: x.scatter_reduce(0, INDEX.expand(5, 4) % 5, x, "amax"),
    "index_add": lambda x: x.index_add(0, INDEX, x[:4]), "index_put": lambda x: x.index_put((INDEX,), x[:4] * x[1:]),
    "repeat": lambda x: x.repeat(2, 1), "layer_norm": lambda x: F.layer_norm(x, (4,)), "layer_norm weight": lambda x: F.layer_norm(x, (4,), W[0], W[1]),
    "rms_norm": lambda x: F.rms_norm(x, (4,)), "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "group_norm": lambda x: F.group_norm(x.reshape(5, 4, 1), 2), "instance_norm": lambda x: F.instance_norm(x.reshape(5, 1, 4)),
    "norm over the cut": lambda x: F.layer_norm(x.T, (5,)), "batch_norm over channels": lambda x: F.batch_norm(x.T, None, None, training=True),
    "pad reflect": lambda x: F.pad(x[:, None], (1, 2), "reflect"), "pad replicate": lambda x: F.pad(x[:, None], (1, 2), "replicate"),
    "pad circular": lambda x: F.pad(x[:, None], (1, 2), "circular"), "pad rows": lambda x: F.pad(x.T[None], (1, 2), "reflect"),
    "pad constant": lambda x: F.pad(x, (1, 2)), "conv1d": lambda x: F.conv1d(x[:, None].expand(5, 4, 4), KERNEL),
    "conv along": lambda x: F.conv1d(x.T[None], KERNEL, padding=1), "conv_transpose": lambda x: F.conv_transpose1d(x.T[None], KERNEL.transpose(0, 1)),
    "max_pool": lambda x: F.max_pool1d(x[:, None], 2), "max_pool along": lambda x: F.max_pool1d(x.T[None], 3, 2, 1),
    "avg_pool": lambda x: F.avg_pool1d(x[:, None], 2), "avg_pool along": lambda x: F.avg_pool1d(x.T[None], 2, 1), "lp_pool": lambda x: F.lp_pool1d(x[:, None], 3, 2),
    "adaptive_avg": lambda x: F.adaptive_avg_pool1d(x[:, None], 3), "adaptive_max": lambda x: F.adaptive_max_pool1d(x[:, None], 3),
    "adaptive_avg along": lambda x: F.adaptive_avg_pool1d(x.T[None], 2), "adaptive_max along": lambda x: F.adaptive_max_pool1d(x.T[None], 2),
    "adaptive_avg one": lambda x: F.adaptive_avg_pool2d(x[None], 1), "adaptive_max 2d": lambda x: F.adaptive_max_pool2d(x[None], 2),
    "interpolate linear": lambda x: F.interpolate(x.T[None], scale_factor=2, mode="linear"), "interpolate area": lambda x: F.interpolate(x.T[None], 7, mode="area"),
    "interpolate nearest": lambda x: F.interpolate(x.T[None], 3, mode="nearest"), "interpolate bicubic": lambda x: F.interpolate(x[None, None], (7, 3), mode="bicubic"),
    "interpolate other": lambda x: F.interpolate(x[:, None], 7, mode="linear"), "interpolate area other": lambda x: F.interpolate(x[:, None], 7, mode="area"),
    "grid_sample": lambda x: F.grid_sample(x.reshape(5, 1, 2, 2), GRID, align_corners=False),
    "grid_sample along": lambda x: F.grid_sample(x[None, None], GRID[:1], align_corners=True),
    "grid_sample points": lambda x: F.grid_sample(W[None, None], x.tanh().reshape(1, 5, 2, 2), align_corners=True),
    "grid_sample bicubic": lambda x: F.grid_sample(x.reshape(5, 1, 2, 2), GRID, mode="bicubic", align_corners=False),
    "local_response_norm": lambda x: F.local_response_norm(x[:, :, None] + 0, 2), "unfold": lambda x: x.unfold(0, 2, 1), "unfold other": lambda x: x.unfold(1, 2, 1),
    "im2col": lambda x: F.unfold(x[None, None], 2), "fft": lambda x: torch.fft.fft(x, dim=0).abs(), "rfft other": lambda x: torch.fft.rfft(x).abs() + 0,
    "solve": lambda x: torch.linalg.solve(W, x.T), "inverse": lambda x: torch.linalg.inv(x[:, :, None] * torch.eye(4, dtype=x.dtype) + 3 * W),
    "det": lambda x: torch.linalg.det(x[:, :, None] * torch.eye(4, dtype=x.dtype)), "householder": lambda x: torch.linalg.householder_product(x[:, :, None] + W, x * 0.1),
    "cross_entropy": lambda x: F.cross_entropy(x, torch.tensor([0, 1, 2, 3, 0])), "nll": lambda x: F.nll_loss(x.log_softmax(1), torch.tensor([0, 1, 2, 3, 0]), reduction="none"),
    "kl_div": lambda x: F.kl_div(x.log_softmax(1), (x * x).softmax(1)), "huber": lambda x: F.huber_loss(x, x.detach() * 2),
    "cosine": lambda x: F.cosine_similarity(x, W[0], dim=1), "pairwise": lambda x: F.pairwise_distance(x, W[0]),
    "renorm": lambda x: x.renorm(2, 0, 0.5), "logaddexp": lambda x: torch.logaddexp(x, x * x), "prelu": lambda x: F.prelu(x, W[0, :1]), "glu": lambda x: F.glu(x),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x[:, :, None, None], 2), "trapezoid": lambda x: torch.trapezoid(x, dim=0), "cov": lambda x: x.T.cov(),
    "attention": lambda x: F.softmax(x @ x.T, -1) @ x, "cross": lambda x: torch.linalg.cross(x[:, :3], x[:, 1:]), "kron": lambda x: torch.kron(x, W),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 0), "where": lambda x: torch.where(x.detach() > 0, x * x, x), "select": lambda x: x[4] * x[0],
    "view_as_real": lambda x: torch.view_as_real(torch.complex(x, x * x)).flatten(-2),
}  # fmt: skip


def programs(fn, x):
    """Value, gradient and second derivative of fn, which is not linear in what reaches it."""
    y = fn(x)
    assert y.requires_grad
    (g,) = torch.autograd.grad((y * y * y).sum(), x, create_graph=True)
    assert g.requires_grad
    (h,) = torch.autograd.grad((g * g).sum(), x)
    # no function beside it: where fn is linear, so is the gradient
    (g2,) = torch.autograd.grad(fn(x).sum(), x, create_graph=True)
    h2 = torch.zeros_like(x)
    if g2.requires_grad:
        (h2,) = torch.autograd.grad((g2 * g2).sum(), x, allow_unused=True, materialize_grads=True)
    return y, g, h, g2, h2


def held(fn, x, sizes):
    wants = programs(fn, x.clone().requires_grad_())

    def run():
        mesh = make_mesh((len(sizes),))
        s = st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None, sizes={0: sizes})
        found = programs(fn, s.requires_grad_())
        for i, (got, want) in enumerate(zip(found, wants, strict=True)):
            same(got.detach(), want.detach(), f"order {i}", 1e-9, 1e-11)

    simulate(len(sizes), run)


@pytest.mark.parametrize("sizes", [(2, 2, 1, 0), (0, 5)])
@pytest.mark.parametrize("name", OPS)
def test_derivatives_of_every_order(name, sizes):
    held(OPS[name], drawn(5, 4), sizes)


@pytest.mark.parametrize("sizes", [(2, 2, 0), (0, 4)])
@pytest.mark.parametrize("rows", [[Replicate()], [Shard(1)]])
def test_derivatives_of_a_table(sizes, rows):
    wants = programs(lambda table: F.embedding(INDEX, table), W.clone().requires_grad_())

    def run():
        mesh = make_mesh((len(sizes),))
        index = st.distribute_tensor(INDEX, mesh, [Shard(0)], sizes={0: sizes})
        table = st.distribute_tensor(W, mesh, rows, src_data_rank=None).requires_grad_()
        found = programs(lambda table: F.embedding(index, table), table)
        for i, (got, want) in enumerate(zip(found, wants, strict=True)):
            same(got.detach(), want.detach(), f"order {i}", 1e-9, 1e-11)

    simulate(len(sizes), run)


# torch.cat leaves the graph of a vector without elements out
VECTORS = {
    "cat": lambda v: torch.cat([v, v * v]), "cat of parts": lambda v: torch.cat([c.sin() for c in v.chunk(3)]), "hstack": lambda v: torch.hstack([v[1:], v, v]),
    "append": lambda v: v.diff(prepend=v[:1], append=v[:2]), "cumsum": lambda v: v.cumsum(0), "cumprod": lambda v: v.cumprod(0), "cummax": lambda v: v.cummax(0)[0],
    "roll": lambda v: v.roll(2), "flip": lambda v: v.flip(0), "pad": lambda v: F.pad(v, (2, 1)), "repeat": lambda v: v.repeat(2), "rows": lambda v: v[INDEX],
    "scatter_add": lambda v: v.scatter_add(0, INDEX, v[:4] * v[1:]), "index_put": lambda v: v.index_put((INDEX[:2],), v[:2] * v[1:3]), "sort": lambda v: v.sort()[0],
}  # fmt: skip


@pytest.mark.parametrize("sizes", [(2, 2, 1, 0), (0, 5), (5, 0, 0)])
@pytest.mark.parametrize("name", VECTORS)
def test_derivatives_of_vectors(name, sizes):
    held(VECTORS[name], drawn(5), sizes)


ZERO, FEW = (
    torch.ones(5, 1).index_fill(0, torch.tensor([4]), 0),
    torch.tensor([1.5 + 2j, -1 + 1j, 2, 1 - 3j]),
)
# torch's derivatives take a shortcut for one row, for zeros and for nothing at all
SHORT = {
    "cumprod": lambda x: x.cumprod(0), "cumprod of zeros": lambda x: (x * ZERO).cumprod(0), "cumprod complex": lambda x: (x * FEW).cumprod(0).abs(),
    "prod of zeros": lambda x: (x * ZERO).prod(0), "prod of a vector": lambda x: (x * ZERO)[:, 0].prod(), "prod kept": lambda x: (x * ZERO).prod(0, keepdim=True),
    "prod of all": lambda x: (x * ZERO)[:, :1].prod(), "logcumsumexp complex": lambda x: (x * FEW).logcumsumexp(1).abs(), "vander": lambda x: torch.linalg.vander(x, N=3),
    "norm -2": lambda x: torch.linalg.vector_norm(x, -2), "norm -1 of a vector": lambda x: x[:, 0].norm(-1), "norm -0.5": lambda x: x.norm(-0.5, 0),
    "dist": lambda x: torch.dist(x, x.flip(1) * 2, -2), "norm of a vector": lambda x: x[:, 0].norm(3), "amax of a vector": lambda x: x[:, 0].amax(),
    "eig": lambda x: torch.linalg.eig(x[:4].reshape(2, 2, 4) @ x[:4].reshape(2, 4, 2))[1].abs(),
}  # fmt: skip


@pytest.mark.parametrize("sizes", [(5, 0), (0, 2, 2, 1)])
@pytest.mark.parametrize("name", SHORT)
def test_shortcuts_of_torch(name, sizes):
    held(SHORT[name], drawn(5, 4), sizes)


def written(view, result):
    """result(base, view) after the view was written to; what is sent then depends on it."""

    def fn(x):
        base = x * x
        v = view(base)
        torch.relu_(v)
        return result(base, v).pow(3).roll(1, 0)

    return fn


# torch's gradient of a view by strides has no graph where the view has no elements
WRITTEN = {
    "rows": written(lambda b: b[:2], lambda b, v: v), "columns": written(lambda b: b[:, :2], lambda b, v: v), "base": written(lambda b: b[:, 1:], lambda b, v: b),
    "turned": written(lambda b: b.T, lambda b, v: v.T), "flat": written(lambda b: b.unflatten(1, (2, 2)), lambda b, v: v), "sibling": written(lambda b: b[:, :2], lambda b, v: b[:, 1:]),
    "linear": lambda x: torch.relu_(F.linear(x[:, None], W)).pow(3).roll(1, 0),
}  # fmt: skip


def turned(change):
    """A view of a tensor that then takes another shape in place; writes to both after it."""

    def fn(x):
        base = x * x
        view = base.t()
        change(base)
        with torch.no_grad():
            base.sub_(1)
        view.relu_()
        return base.pow(3).sum() + view.roll(1, 0).pow(3)

    return fn


@pytest.mark.parametrize("sizes", [(3, 2), (2, 0, 3)])
@pytest.mark.parametrize(
    "change", [lambda b: b.t_(), lambda b: b.unsqueeze_(0), lambda b: b.swapaxes_(0, 1)]
)
def test_views_of_what_takes_another_shape(change, sizes):
    held(turned(change), drawn(5, 4), sizes)


def test_another_shape_is_a_write():
    def run():
        x = st.distribute_tensor(drawn(5, 4), make_mesh((2,)), [Shard(0)]).requires_grad_()
        y = x * 2
        saved = y * y
        y.t_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.sum().backward()

    simulate(2, run)


@pytest.mark.parametrize("sizes", [(3, 2), (2, 0, 3)])
@pytest.mark.parametrize("name", WRITTEN)
def test_views_that_are_written_to(name, sizes):
    held(WRITTEN[name], drawn(5, 4), sizes)


@pytest.mark.parametrize("ranks", [3, 4])
def test_a_convolution_with_fewer_output_channels_than_ranks(ranks):
    weights = {F.conv1d: drawn(2, 3, 3), F.conv_transpose1d: drawn(3, 2, 3)}
    for fn, w in weights.items():
        operands = [drawn(2, 3, 6), w, drawn(2)]

        def both(x, w, b, fn=fn):
            g = torch.autograd.grad((fn(x, w, b) ** 3).sum(), (x, w, b), create_graph=True)
            total = sum((t * t).sum() for t in g)
            return *g, *torch.autograd.grad(total, (x, w, b))

        wants = both(*(t.clone().requires_grad_() for t in operands))

        def run(fn=fn, operands=operands, both=both, wants=wants):
            mesh = make_mesh((ranks,))
            cut = [Shard(2), Shard(int(fn is F.conv_transpose1d)), Shard(0)]
            found = both(
                *(
                    st.distribute_tensor(t, mesh, [c], src_data_rank=None).requires_grad_()
                    for t, c in zip(operands, cut, strict=True)
                )
            )
            for got, want in zip(found, wants, strict=True):
                same(got.detach(), want.detach(), fn.__name__, 1e-9)

        simulate(ranks, run)


@torch.overrides.wrap_torch_function(lambda x: (x,))
def broken(x):
    return x


@st.rule(broken)
def broken_rule(x):
    x[:2]
    raise ValueError("after shards without rows")


def test_the_op_that_makes_the_first_empty_shards_alone_replays_views():
    """A view of a sparse matrix that was made after it is asked for its values as it was made."""

    def run():
        mesh = make_mesh((2,))
        x = st.distribute_tensor(drawn(5, 4), mesh, [Shard(0)]).requires_grad_()

        def breaks():
            with pytest.raises(ValueError, match="after"):
                broken(x)

        def makes():
            return st.distribute_tensor(drawn(1, 4), mesh, [Shard(0)])

        for first in (makes, breaks, lambda: torch.relu_((x * 1)[:3])):
            hollow.clear()
            made = first()
            assert hollow
            assert not _torch.replays_views()
        assert "AsStrided" not in made._local.grad_fn.name()

    simulate(2, run)


@pytest.mark.parametrize("center", [True, False])
def test_stft_of_one_long_signal_of_two(center):
    """What the trial on two samples says of a window of 64 is no error of these."""
    x, window = drawn(1, 2000), torch.hann_window(64, dtype=torch.float64)

    def spectrum(x):
        return torch.stft(x, 64, window=window, center=center, return_complex=True)

    def run():
        s = st.distribute_tensor(x, make_mesh((2,)), [Shard(0)])
        same(spectrum(s), spectrum(x), "stft", 1e-9)
        with pytest.raises(RuntimeError, match="floating point or complex"):
            torch.stft(s.int(), 64, return_complex=True)

    simulate(2, run)
