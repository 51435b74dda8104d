"""Numbers and dtypes that torch refuses are refused on every rank, also on one without elements."""

import pytest
import torch
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
        assert isinstance(error, RuntimeError | IndexError), repr(error)


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
