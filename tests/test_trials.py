"""Numbers and dtypes that torch refuses are refused on every rank, also on one without elements."""

import pytest
import torch
import torch.nn.functional as F
from raising import raised
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh, same

X = torch.arange(9).reshape(3, 3)
I = torch.tensor([0])  # noqa: E741
REFUSED = {
    "addmm, a factor of int8": lambda x: torch.addmm(x.char(), x.char(), x.char(), beta=300),
    "addmm, a negative factor of uint8": lambda x: torch.addmm(x.byte(), x.byte(), x.byte(), alpha=-1.5),
    "addmm, inf": lambda x: torch.addmm(x, x, x, beta=float("inf")),
    "addmm, a large factor of halves": lambda x: torch.addmm(x.half(), x.half(), x.half(), beta=1e300),
    "addmm, complex": lambda x: torch.addmm(x.double(), x.double(), x.double(), beta=1j),
    "addmv": lambda x: torch.addmv(x.char()[0], x.char(), x.char()[0], alpha=300),
    "baddbmm": lambda x: torch.baddbmm(x.char()[None], x.char()[None], x.char()[None], alpha=300),
    "addr": lambda x: torch.addr(x.double(), x.double()[0], x.double()[1], alpha=1j),
    "matmul of bools": lambda x: x.bool() @ x.bool(),
    "bmm of bools": lambda x: torch.bmm(x.bool()[None], x.bool()[None]),
    "addmm of bools": lambda x: torch.addmm(x.bool(), x.bool(), x.bool()),
    "index_add": lambda x: x.bfloat16().index_add(0, I, x[:1].bfloat16(), alpha=1e300),
    "index_add of bytes": lambda x: x.byte().index_add(0, I, x[:1].byte(), alpha=-300),
    "softmax of integers": lambda x: x.softmax(1),
    "softmax of integers along the cut": lambda x: x.softmax(0),
    "amax of complex numbers": lambda x: (x * 1j).amax(1),
    "amax of complex numbers along the cut": lambda x: (x * 1j).amax(0),
    "cummin of complex numbers": lambda x: (x * 1j).cummin(0),
    "digamma of complex numbers": lambda x: (x * 1j).digamma(),
    "an op in place": lambda x: (x * 1j).erfinv_(),
    "of a list": lambda x: torch.stack([x, x]).double().gather(0, x[None].double()),
    "floor by name": lambda x: torch.floor(input=x * 1j),
    "median": lambda x: (x * 1j).median(0),
    "std of integers": lambda x: x.std(0),
    "rows by name": lambda x: x.gather(0, index=x.double()),
    "interpolation of integers": lambda x: F.interpolate(x[None, None], scale_factor=2, mode="bilinear"),
    "interpolation of complex numbers": lambda x: F.interpolate(x[None] * 1j, 5),
    "batch norm of integers": lambda x: F.batch_norm(x[None], None, None, training=True),
    "unpooling by narrow indices": lambda x: F.max_unpool1d(x[None].double(), x[None].int(), 2),
    "one pooling too many dims": lambda x: F.adaptive_max_pool2d(x[None, None, None].double(), 1),
    "histogram": lambda x: (x * 1j).histc(3),
    "products of two dtypes": lambda x: x.double() @ x.T.float(),
    "a batch for mm": lambda x: torch.mm(x[None].double(), x.double()),
    "a matrix for bmm": lambda x: torch.bmm(x[None].double(), x.double()),
    "batches of two sizes": lambda x: torch.bmm(x[None].double(), torch.stack([x, x]).double()),
    "vecdot of integers": lambda x: torch.linalg.vecdot(x, x),
    "vecdot of two dtypes": lambda x: torch.linalg.vecdot(x.double(), x.float()),
    "addmm, a sum of another dtype": lambda x: torch.addmm(x.double(), x.float(), x.float()),
    "addmv, a sum of another dtype": lambda x: torch.addmv(x[0], x.double(), x[0].double()),
    "bilinear": lambda x: F.bilinear(x.double(), x[0].double(), x[None].double()),
    "max of complex numbers": lambda x: (x * 1j).max(),
    "max of a complex number": lambda x: (x * 1j).sum().max(0),
    "argmax of bools": lambda x: (x > 0).argmax(),
    "trace of bools": lambda x: (x > 0).trace(),
    "histogram of halves": lambda x: torch.histogram(x.half(), 3),
    "movedim of a dim twice": lambda x: x[None].movedim((0, -3), (1, 2)),
    "movedim to a place twice": lambda x: x[None].movedim((0, 1), (1, -2)),
    "movedim of more dims than places": lambda x: x[None].movedim((0, 1), (1,)),
    "cross entropy of integers": lambda x: F.cross_entropy(x, x[:, 0] * 0),
    "norm of nothing": lambda x: torch.linalg.vector_norm(x[:0].double(), -2, 0),
    "largest of nothing": lambda x: torch.linalg.vector_norm(x[:0].double(), float("inf"), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize(("d", "cut"), [(0, (3, 0)), (1, (0, 3)), (0, (2, 1))])
def test_refused_on_every_rank(name, d, cut):
    want = raised(REFUSED[name], X)
    assert want is not None

    def run():
        x = st.distribute_tensor(X, make_mesh((2,)), [Shard(d)], src_data_rank=None, sizes={d: cut})
        return raised(REFUSED[name], x)

    for error in st.simulate(2, run):
        # torch 2.15 raises TypeError for some
        assert isinstance(error, RuntimeError | IndexError | type(want)), repr(error)


def test_addr_is_of_the_dtype_of_the_sum():
    def run():
        x = st.distribute_tensor(X > 1, make_mesh((2,)), [Shard(0)], src_data_rank=None)
        for plain in (X.double(), X, X.double().sum()):
            want = torch.addr(plain, X[0] > 1, X[2] > 1, beta=2, alpha=3)
            same(torch.addr(plain, x[0], x[2], beta=2, alpha=3).full_tensor(), want, "addr")

    st.simulate(2, run)


@pytest.mark.parametrize(
    "name", ["softmax of integers", "amax of complex numbers", "interpolation of integers"]
)
def test_what_may_follow_is_right(name):
    """An op that is refused is tried once, and what is not is done."""

    def run():
        x = st.distribute_tensor(
            X, make_mesh((2,)), [Shard(0)], src_data_rank=None, sizes={0: (3, 0)}
        )
        first, second = (raised(REFUSED[name], x) for _ in range(2))
        assert first is not None
        assert (type(first), str(first)) == (type(second), str(second))
        return x.double().softmax(1).full_tensor()

    for got in st.simulate(2, run):
        same(got, X.double().softmax(1), name, 1e-12)


def test_softmax_of_no_complex_numbers():
    def run():
        x = st.distribute_tensor(X[:0] * 1j, make_mesh((2,)), [Shard(1)], src_data_rank=None)
        same(x.softmax(1).full_tensor(), (X[:0] * 1j).softmax(1), "softmax")

    st.simulate(2, run)


def test_nothing_is_drawn_to_try():
    def run():
        x = st.distribute_tensor(
            X.double(), make_mesh((2,)), [Shard(0)], src_data_rank=None, sizes={0: (3, 0)}
        )
        before = torch.get_rng_state()
        x.softmax(1), x @ x.T, F.interpolate(x[None], 5), x.sort(0), x.clone().sigmoid_()
        assert torch.equal(before, torch.get_rng_state())

    st.simulate(2, run)


def test_renorm_beside_nan():
    whole = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3)
    whole[1, 0] = torch.nan

    def run():
        x = st.distribute_tensor(whole, make_mesh((2,)), [Shard(1)], src_data_rank=None)
        found = []
        for each in (whole.clone(), x):
            each.requires_grad_()
            y = torch.renorm(each, 2, 0, 1.0)
            (g,) = torch.autograd.grad((y * y.detach().nan_to_num()).sum(), each, create_graph=True)
            found.append((y, g))
        for got, want in zip(found[1], found[0], strict=True):
            same(got.full_tensor(), want, "renorm", 1e-9)

    st.simulate(2, run)


def test_large_factors_of_halves():
    whole = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float16)

    def run():
        x = st.distribute_tensor(whole, make_mesh((2,)), [Shard(0)], src_data_rank=None)
        got = torch.addmm(x, x, whole, beta=-2e5, alpha=1e5)
        same(got.full_tensor(), torch.addmm(whole, whole, whole, beta=-2e5, alpha=1e5), "addmm")

    st.simulate(2, run)


@pytest.mark.parametrize("cut", [(3, 0), (0, 3), (2, 1)])
def test_variance_of_numbers_whose_squares_overflow(cut):
    whole = torch.full((3, 2), 1e200, dtype=torch.float64)
    whole[0, 1] = -1e300

    def run():
        x = st.distribute_tensor(
            whole, make_mesh((2,)), [Shard(0)], src_data_rank=None, sizes={0: cut}
        )
        for fn in (lambda t: t.var(0), lambda t: t.std(0), lambda t: torch.var_mean(t, 0)[0]):
            same(fn(x).full_tensor(), fn(whole), "variance", 1e-9)

    st.simulate(2, run)
