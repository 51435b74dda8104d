"""Numbers beside tensors, sets without elements, rows of -inf: the values, gradients and errors of torch."""

import math
import operator

import pytest
import torch
import torch.nn.functional as F
from raising import raised
from torch import nn
from torch.distributed.tensor import Partial, Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.tensor.random import match_single_device

torch.manual_seed(0)
D = torch.float64
x = torch.randn(5, 4, dtype=D)
ON = T.shard(0, (3, 0, 2))
N = (3,)


def written(x, index, value):
    y = x.clone()
    y[index] = value
    return y


# numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", [
    lambda x: x.masked_fill(x > 0, 0.1), lambda x: x.clone().masked_fill_(x > 0, 0.1),
    lambda x: written(x, x > 0, 0.1), lambda x: written(x, (slice(1, 4), 2), 0.1),
    lambda x: written(x, torch.tensor([0, 4]), 0.1), lambda x: 0.1**x.abs(),
    lambda x: written(x, x > 0, torch.tensor(0.1)),
    lambda x: torch.isin(x, 0.1).double(), lambda x: torch.isin(0.1, x * 0 + 0.1).double(),
    lambda x: x.masked_fill(torch.arange(4) > 1, torch.tensor(0.1, dtype=D)),
])  # fmt: skip
def test_a_number_keeps_its_digits(fn):
    T.hold(fn, [x], [ON], N)
    T.hold(fn, [(x + 0.1 - x)], [ON], N)


REFUSED = {
    "fill": (torch.uint8, lambda x: x.masked_fill(x > 0, 300)),
    "fill_": (torch.int8, lambda x: x.masked_fill_(x > 0, 300)),
    "set_mask": (torch.uint8, lambda x: operator.setitem(x, x > 0, 300)),
    "set_row": (torch.uint8, lambda x: operator.setitem(x, 0, 300)),
    "set_nan": (torch.int32, lambda x: operator.setitem(x, [0, 1], math.nan)),
    "set_dtype": (D, lambda x: operator.setitem(x, [0, 1], torch.tensor(0.1))),
    "scatter": (torch.uint8, lambda x: x.scatter(0, torch.tensor([[0]]), 300)),
    "index_fill": (torch.uint8, lambda x: x.index_fill(0, torch.tensor([0]), 300)),
    "pad": (torch.uint8, lambda x: F.pad(x, (0, 0, 0, 1), value=300)),
    "pad_complex": (D, lambda x: F.pad(x, (0, 0, 0, 1), value=1j)),
    "divide": (torch.int32, lambda x: x // 0),
    "modulo": (torch.int32, lambda x: x % 0),
    "where": (torch.uint8, lambda x: torch.where(x > 0, x, 300)),
    "full_like": (torch.uint8, lambda x: torch.full_like(x, 300)),
    "threshold": (torch.uint8, lambda x: F.threshold(x, 0, 300)),
    "out_of_a_graph": (D, lambda x: torch.exp(x.clone().requires_grad_(), out=x)),
}


# what some torch takes: 2.15 the first, those before it the others
SOMETIMES = {
    "clamp": (torch.uint8, lambda x: x.clamp(max=300)),
    "half": (torch.half, lambda x: written(x, x > 0, 1e6)),
    "half_row": (torch.half, lambda x: written(x, 0, 1e6)),
    "half_rows": (torch.bfloat16, lambda x: written(x, [0, 1], 1e300)),
}


def outcome(fn, x):
    try:
        y = fn(x)
    except (RuntimeError, TypeError) as e:
        return type(e)
    return y.full_tensor() if isinstance(y, st.ShardTensor) else y


@pytest.mark.parametrize("name", [*REFUSED, *SOMETIMES])
def test_a_number_is_taken_or_refused_as_in_torch_on_every_rank(name):
    dtype, fn = (REFUSED | SOMETIMES)[name]
    whole = torch.ones(3, 2).to(dtype)
    want = outcome(fn, whole.clone())
    assert isinstance(want, type) or name in SOMETIMES

    def on_rank():
        return outcome(fn, st.distribute_tensor(whole.clone(), T.make_mesh((4,)), [Shard(0)]))

    for got in st.simulate(4, on_rank):
        assert issubclass(got, want) if isinstance(want, type) else torch.equal(got, want)


def test_numbers_that_wrap_or_truncate_as_in_torch():
    byte = torch.ones(5, 4).to(torch.uint8)
    T.hold(lambda x: written(x, x > 0, -1), [byte], [ON], N)
    T.hold(lambda x: written(x, 0, 1.7), [byte], [ON], N)
    T.hold(lambda x: x.masked_fill(x > 0, True), [byte], [ON], N)
    T.hold(lambda x: F.pad(x, (0, 0, 1, 2), value=7), [byte], [ON], N)


# sets without elements, rows of -inf ------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.0, 1, 2, 1], dtype=D)])
@pytest.mark.parametrize("target", [[-100] * 5, [0, -100, -100, 0, -100], [0, 1, -100, 3, 3]])
def test_losses_of_ignored_targets(target, weight, smoothing):
    t = torch.tensor(target)

    def loss(x, t, w):
        w = w if w is None else w.detach()
        return F.cross_entropy(x, t, w, label_smoothing=smoothing)

    T.hold(loss, [x, t, weight], [ON, ON, None], N)
    T.hold(lambda x, t: F.nll_loss(x[..., None], t[..., None], weight), [x, t], [ON, ON], N)
    T.hold(loss, [x, t, weight], [T.shard(1), None, None], (2,))
    if weight is not None:
        T.hold(loss, [x, t, weight], [None, None, T.shard(0)], (2,))
        T.hold(loss, [x, x.softmax(1), weight], [None, None, T.shard(0)], (2,))


def test_losses_of_which_only_the_weight_is_cut():
    w, t = torch.rand(4, dtype=D), torch.tensor([0, 3, 1, 2, 2])
    on = [None, None, T.shard(0, (1, 0, 3))]
    for fn in (F.nll_loss, F.cross_entropy, F.multi_margin_loss):
        T.hold(lambda x, t, w, f=fn: f(x, t, weight=w.detach()), [x, t, w], on, N)
    for fn in (F.binary_cross_entropy, F.binary_cross_entropy_with_logits):
        T.hold(lambda x, w, f=fn: f(x, x.detach(), w.detach()), [x.sigmoid(), w], on[1:], N)


def test_logsumexp_of_rows_without_weight():
    rows = torch.randn(6, 5, dtype=D)
    rows[0], rows[1, 2:], rows[2, :3] = -math.inf, -math.inf, -math.inf
    rows[3, 1], rows[4, 2], rows[5] = math.inf, math.nan, 1e4
    for cut in ((2, 3), (2, 0, 3), (1, 1, 1, 2)):
        T.hold(lambda x: x.logsumexp(1), [rows], [T.shard(1, cut)], (len(cut),))
        T.hold(lambda x: x.logsumexp(1, True), [rows[1:2].float()], [T.shard(1, cut)], (len(cut),))
    T.hold(lambda x: x.logsumexp((0, 1)), [rows[1:3]], [T.shard(1, (2, 3))], (2,))
    # beside inf, scores whose powers are too large have no weight
    large = torch.tensor([[1e300, 1.0, float("inf"), 800.0, 2.0]], dtype=D)
    for cut in ((5, 0), (2, 1, 2), (1, 2, 2)):
        T.hold(lambda x: x.logsumexp(1), [large], [T.shard(1, cut)], (len(cut),))
    T.hold(lambda x: x.logsumexp(1), [torch.complex(x, x)], [T.shard(1, (1, 3))], (2,))


def test_the_slope_of_the_largest_of_all_is_shared_by_what_is_nan():
    y = x.clone()
    y[1, 2], y[4, :2] = math.nan, math.nan
    for fn in (torch.max, torch.min):
        for place in (ON, T.replicated()):
            T.hold(lambda x, f=fn: f(x) + f(x[:1]), [y], [place], N)
    T.hold(lambda x: torch.nanmean(x * math.nan + x, 0), [y], [ON], N)


@pytest.mark.parametrize("fn", [
    lambda x, y: x // y, lambda x, y: x % y, lambda x, y: 3 % y, torch.fmod,
    lambda x, y: torch.div(x, y, rounding_mode="floor"), lambda x, y: F.one_hot(x - 1, 5),
])  # fmt: skip
def test_an_integer_that_one_rank_cannot_take_is_refused_on_every_rank(fn):
    a, b = torch.arange(6), torch.arange(-5, 1)
    with pytest.raises(RuntimeError):
        fn(a, b)

    def on_rank():
        mesh = T.make_mesh((3,))
        y = st.distribute_tensor(a, mesh, [Shard(0)])
        with pytest.raises(RuntimeError):
            fn(y, st.distribute_tensor(b, mesh, [Shard(0)]))
        return True

    assert all(st.simulate(3, on_rank))


def test_shapes_of_nothing():
    nothing = torch.zeros(0, 3, dtype=D)
    for fn in (
        lambda x: torch.topk(x, 2, 1)[0], lambda x: torch.kthvalue(x, 1, 1)[0], lambda x: x.sort(1)[0],
        lambda x: F.group_norm(x.mT[..., None], 1), lambda x: F.scaled_dot_product_attention(x, x, x),
    ):  # fmt: skip
        refused = raised(fn, nothing)
        if refused is None:
            T.hold(fn, [nothing], [T.shard(1, (0, 3))], (2,))
            continue

        def run(fn=fn):
            return fn(st.distribute_tensor(nothing, T.make_mesh((2,)), [Shard(1)]))

        with pytest.raises(st.RankError, match=str(refused)):
            st.simulate(2, run)
    T.hold(F.scaled_dot_product_attention, [torch.zeros(2, 0, dtype=D)] * 3, [T.shard(0)] * 3, (2,))


def second(fn):
    """fn with the gradient of its gradient, which is a function as well."""

    def run(x):
        y = fn(x)
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y, (g * torch.linspace(1, 2, x.shape[0], dtype=D)[:, None]).sum() + 0 * x.sum()

    return run


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 4.5])
def test_norms_twice_with_a_part_that_is_zero_or_empty(p):
    zeros = x.clone()
    if p >= 2:
        zeros[3:] = 0
    for cut in ((3, 0, 2), (3, 2), (5, 0)):
        on = [T.shard(0, cut)]
        T.hold(second(lambda x: torch.linalg.vector_norm(x, p)), [zeros], on, (len(cut),))
        T.hold(second(lambda x: torch.linalg.vector_norm(x, p, 0)), [x], on, (len(cut),))
    T.hold(lambda x: torch.linalg.vector_norm(x, p), [x * 0], [ON], N)
    T.hold(lambda x: torch.linalg.vector_norm(x, p, 0), [torch.complex(x, x)], [ON], N)


@pytest.mark.parametrize("shape", [(0, 2, 3), (4, 2, 0), (0, 2, 3, 3), (0, 2, 3, 3, 3)])
def test_batch_norm_of_nothing(shape):
    norm = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](2).double()
    for d in (0, 1, len(shape) - 1):
        T.hold(norm, [torch.zeros(shape, dtype=D)], [T.shard(d)], (2,))


def test_running_statistics_that_are_cut_are_not_updated_in_a_copy():
    def run(x, mean, var):
        y = torch.native_batch_norm(x, None, None, mean.detach(), var.detach(), True, 0.1, 1e-5)
        return (*y, mean, var)

    args = [torch.randn(3, 4, 2, dtype=D), torch.zeros(4, dtype=D), torch.ones(4, dtype=D)]
    with pytest.raises(st.RankError, match="running statistics on"):
        T.hold(run, args, [None, T.shard(0), T.shard(0)], (2,), grad=False, gather=True)
    T.hold(run, args, [T.shard(0), None, None], (2,), grad=False, gather=True)


def test_histograms_of_nothing():
    none = torch.zeros(0, 2, dtype=D)
    for fn in (
        lambda x: tuple(torch.histogram(x, 4)),
        lambda x: torch.histc(x, 4),
        lambda x: torch.bincount(x[:, 0].long()),
        lambda x: torch.histogramdd(x, [2, 2])[0],
    ):
        T.hold(fn, [none], [T.shard(0)], (2,), grad=False, gather=True)


def test_prelu_of_any_number_of_dims():
    for shape in ((), (5,), (5, 4), (2, 4, 3)):
        y = torch.randn(shape, dtype=D)
        for w in (torch.tensor([0.3], dtype=D), torch.tensor(0.3, dtype=D)):
            T.hold(F.prelu, [y, w], [T.shard(0) if shape else T.replicated(), None], (2,))

    def refused():
        for y, n in ((x[0], 4), (x, 3)):
            with pytest.raises(RuntimeError, match="Mismatch of parameter numbers"):
                F.prelu(
                    st.distribute_tensor(y, T.make_mesh((2,)), [Shard(0)]), torch.ones(n).double()
                )
        return True

    assert all(st.simulate(2, refused))


# written into -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", [
    lambda a, out: torch.linalg.inv(a, out=out), lambda a, out: torch.kron(a, a, out=out),
    lambda a, out: torch.linalg.matrix_power(a, 2, out=out), lambda a, out: torch.mm(a, a, out=out),
    lambda a, out: torch.diff(a, dim=1, out=out), lambda a, out: torch.linalg.eigvals(a, out=out),
    lambda a, out: torch.linalg.cholesky(a @ a.mT + torch.eye(4), out=out),
    lambda a, out: torch.linalg.solve(a, a, out=out), lambda a, out: torch.amax(a, 0, out=out),
    lambda a, out: torch.linalg.det(a, out=out), lambda a, out: torch.cat([a, a], out=out),
    lambda a, out: torch.fft.fft(a, out=out), lambda a, out: torch.add(a, a, out=out),
    lambda a, out: torch.linalg.norm(a, out=out), lambda a, out: torch.linalg.multi_dot([a, a], out=out),
])  # fmt: skip
def test_out(fn):
    a = torch.randn(4, 4, dtype=D) + 3 * torch.eye(4, dtype=D)
    like = fn(a, torch.empty(0, dtype=D) if not fn(a, None).is_complex() else None)

    @torch.no_grad()
    def run(a, out):
        assert fn(a, out) is out
        return out

    out = torch.zeros_like(like)
    for place in (T.shard(0), T.replicated()) if out.ndim else (T.replicated(),):
        T.hold(run, [a, out], [T.shard(0, (3, 1)), place], (2,), grad=False, gather=True)


def test_several_outs():
    a = torch.randn(4, 4, dtype=D)

    @torch.no_grad()
    def run(a, q, r):
        torch.linalg.qr(a, out=(q, r))
        return q, r

    T.hold(run, [a, a * 0, a * 0], [T.shard(0)] * 3, (2,), grad=False, gather=True)


def test_outs_that_torch_does_not_return():
    a, outs = torch.randn(4, 4, dtype=D), [torch.zeros(n, 4, dtype=D) for n in (1, 3)]

    @torch.no_grad()
    def run(a, b, c):
        assert torch.split_with_sizes_copy(a, [1, 3], out=[b, c]) is None
        return b, c

    T.hold(run, [a, *outs], [T.shard(1)] * 3, (2,), grad=False, gather=True)


def test_a_write_without_a_record_into_a_partial_sum():
    def grads(a):
        b = a.clone()
        with torch.no_grad():
            b.clamp_(min=0.1)
        return torch.autograd.grad((b * b).sum(), a)[0]

    whole = torch.randn(4, 4, dtype=D)

    def run():
        mesh = T.make_mesh((2,))
        part = whole * (2, -1)[mesh.get_local_rank()]
        a = st.ShardTensor.from_local(part, mesh, [Partial()]).requires_grad_()
        return grads(a).full_tensor()

    for got in st.simulate(2, run):
        T.same(got, grads(whole.clone().requires_grad_()), "gradient")


# initialisation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "normal_", "uniform_", "constant_", "ones_", "zeros_", "eye_", "dirac_", "trunc_normal_",
    "xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_", "orthogonal_",
    "sparse_",
])  # fmt: skip
def test_initialisation(name):
    """As a plain tensor under match_single_device, where the numbers are drawn."""
    shape = (6, 4, 3) if name == "dirac_" else (6, 4)
    args = {"constant_": (0.1,), "sparse_": (0.5,)}.get(name, ())
    fn = getattr(nn.init, name)

    def run():
        mesh = T.make_mesh((3,))
        y = st.distribute_tensor(torch.ones(shape, dtype=D), mesh, [Shard(0)])
        torch.manual_seed(3)
        with match_single_device():
            assert fn(y, *args) is y
        return y.full_tensor()

    torch.manual_seed(3)
    want = fn(torch.ones(shape, dtype=D), *args)
    for found in st.simulate(3, run):
        assert torch.allclose(found, want, rtol=1e-12, atol=1e-12)


# tables -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [(3, 0, 2), (5, 0, 0)])
def test_embedding_with_max_norm(cut):
    table, at = torch.randn(7, 4, dtype=D), torch.tensor([0, 3, 3, 6, 1])

    def run(w, i):
        y = F.embedding(i, w, max_norm=0.7)
        return y, w

    T.hold(run, [table, at], [None, T.shard(0, cut)], N, grad=False)
    T.hold(run, [table, at], [T.shard(0), None], N, grad=False)
    T.hold(run, [table, at], [T.replicated(), T.shard(0, cut)], N, grad=False)
    with pytest.raises(st.RankError, match="which cuts its rows"):
        T.hold(run, [table, at], [T.shard(1), None], N, grad=False)


def test_multinomial_of_rows_of_zeros_is_refused_on_every_rank():
    rows = torch.ones(5, 4)
    rows[1] = 0

    def on_rank():
        mesh = T.make_mesh((3,))
        with pytest.raises(RuntimeError, match="invalid multinomial distribution"):
            torch.multinomial(st.distribute_tensor(rows, mesh, [Shard(0)]), 2)
        none = st.distribute_tensor(rows[:0], mesh, [Shard(0)])
        return torch.multinomial(none, 2).shape == (0, 2)

    assert all(st.simulate(3, on_rank))
