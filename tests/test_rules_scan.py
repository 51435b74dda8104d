"""Scans along sharded dims, against plain torch."""

import pytest
import torch
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T

D = torch.float64
torch.manual_seed(0)
X = torch.randn(3, 7, 4, dtype=D)
SCANS = {
    "cumsum": lambda x: x.cumsum(1), "cumprod": lambda x: x.cumprod(-2),
    "logcumsumexp": lambda x: x.logcumsumexp(1), "cummax": lambda x: x.cummax(1),
    "cummin": lambda x: torch.cummin(x, dim=1), "cumsum_": lambda x: (x * 1).cumsum_(1),
    "cumprod_": lambda x: (x * 1).cumprod_(1), "float": lambda x: x.cumsum(1, dtype=torch.float32),
    "trapezoid": lambda x: torch.cumulative_trapezoid(x, dim=1), "trapz": lambda x: torch.trapezoid(x, dim=1),
    "gradient": lambda x: torch.gradient(x, dim=1)[0], "diff": lambda x: torch.diff(x, 2, 1),
}  # fmt: skip


@pytest.mark.parametrize("cut", T.cuts(7))
@pytest.mark.parametrize("name", SCANS)
def test_scans(name, cut):
    # the gradient of a sum in single precision is in single precision
    rtol = 1e-6 if name == "float" else None
    T.hold(SCANS[name], [X], [T.shard(1, cut)], (len(cut),), rtol=rtol)


@pytest.mark.parametrize("name", ["cumsum", "cumprod", "cummax"])
def test_placements(name):
    for place in ([Shard(0), Shard(1)], [Shard(1), Shard(1)]):
        T.hold(SCANS[name], [X], [T.On(place)], (2, 2))
    T.hold(SCANS[name], [X], [T.shard(2)], (3,))


def test_zeros_in_products():
    x = X.clone()
    x[0, 2], x[1, 1], x[1, 5] = 0, 0, 0
    for cut in T.cuts(7):
        T.hold(SCANS["cumprod"], [x], [T.shard(1, cut)], (len(cut),))


def test_ties_nan_and_infinities():
    x = torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0, float("nan"), 1.0, float("-inf")], dtype=D)
    for cut in T.cuts(8):
        for scan in (lambda x: x.cummax(0), lambda x: x.cummin(0)):
            T.hold(scan, [x], [T.shard(0, cut)], (len(cut),), grad=False)
        low = x[:5].clone()
        low[:3] = float("-inf")
        T.hold(lambda x: x.logcumsumexp(0), [low], [T.shard(0)], (2,), grad=False)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16, torch.complex64])
def test_dtypes(dtype):
    x = torch.randint(0, 3, (9,)).to(dtype)
    for scan in (lambda x: x.cumsum(0), lambda x: x.cumprod(0)):
        T.hold(scan, [x], [T.shard(0, (4, 0, 5))], (3,), grad=False, rtol=1e-2)


def test_sends_one_row():
    def run():
        x = st.distribute_tensor(torch.ones(8, 5), T.make_mesh((2,)), [Shard(0)])
        with st.trace() as t:
            x.cumsum(0)
        return t.bytes, t.messages

    assert st.simulate(2, run) == [(4 * 5, 1), (0, 0)]


def test_scalars():
    T.hold(lambda x: x.sum().cumsum(0), [X], [T.shard(1)], (2,))
