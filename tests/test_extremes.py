"""NaN and infinities: at the places of one device, in values and gradients, and nowhere else."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64
NAN, INF = math.nan, math.inf
ON = T.shard(2, (4, 0, 2))


def image(value):
    """An image with a few such numbers."""
    x = torch.randn(1, 2, 6, 6, dtype=D)
    x[0, 0, 3, 1] = x[0, 1, 4] = x[0, 1, 0, 5] = value
    return x


@pytest.mark.parametrize("value", [NAN, -INF])
@pytest.mark.parametrize("size", [(3, 5), (7, 5), (12, 6), (6, 5), (2, 6), (4, 12)])
@pytest.mark.parametrize("corners", [False, True])
def test_bilinear_rows_that_count_for_zero(value, size, corners):
    def fn(x):
        return F.interpolate(x, size=size, mode="bilinear", align_corners=corners)

    for on in (ON, T.shard(3, (4, 0, 2))):
        T.hold(fn, [image(value)], [on], (3,))


@pytest.mark.parametrize("mode", ["bicubic", "bicubic antialias", "bilinear antialias"])
@pytest.mark.parametrize("size", [(3, 5), (2, 6), (7, 5), (6, 4), (12, 12)])
def test_wider_kernels_beside_nan(mode, size):
    def fn(x):
        way, *antialias = mode.split()
        return F.interpolate(x, size=size, mode=way, antialias=bool(antialias))

    def spoilt(x):
        y = fn(x)
        w = torch.ones(y.shape, dtype=D)
        w[..., 1, 1] = NAN
        return y * w

    for on in (ON, T.shard(3, (4, 0, 2))):
        T.hold(fn, [image(NAN)], [on], (3,))
        # torch's backward antialiases where no size changes, its forward does not
        if 6 not in size or mode == "bicubic":
            T.hold(spoilt, [image(0.0)], [on], (3,))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_attention_where_a_shard_has_no_score_that_is_a_number(value):
    """The kernel for CPUs tells its rows from those that see no key by nothing."""
    q, k, v = (torch.randn(1, 2, 6, 8, dtype=D) for _ in range(3))
    k[:, :, 4:] = value
    on = T.shard(2, (4, 0, 2))
    T.hold(F.scaled_dot_product_attention, [q, k, v], [on] * 3, (3,))
    k, q[0, 1, 2] = torch.randn_like(k), NAN
    T.hold(F.scaled_dot_product_attention, [q, k, v], [on] * 3, (3,))
    for heads in (q, q[:1, :1]):
        T.hold(F.scaled_dot_product_attention, [heads, k[:, :1], v[:, :1]], [on] * 3, (3,))


@pytest.mark.parametrize("weight", [None, torch.linspace(1, 2, 5, dtype=D)])
def test_rms_norm_of_infinity(weight):
    x, w = torch.randn(4, 5, dtype=D), torch.ones(4, 5, dtype=D)
    x[0, 1], x[1, 0], x[1, 4], x[2, 2] = INF, INF, -INF, NAN
    w[3, 3] = INF

    def fn(x):
        return F.rms_norm(x, (5,), weight)

    T.hold(lambda x: fn(x[:3]), [x], [T.shard(1, (3, 0, 2))], (3,))
    T.hold(lambda x: fn(x) * w.isfinite(), [x], [T.shard(1, (3, 0, 2))], (3,), grad=False)


@pytest.mark.parametrize("fn", [
    lambda x: x.amax(0), lambda x: x.amin(0), lambda x: torch.linalg.vector_norm(x, INF, 0),
    lambda x: torch.linalg.vector_norm(x, -INF, 0), lambda x: torch.stack([x.max(), x.min()]),
])  # fmt: skip
def test_a_cotangent_of_nan_beside_the_largest(fn):
    x = torch.randn(5, 2, dtype=D)
    for value in (x[1, 0].item(), NAN, INF):
        x[1, 0] = value
        T.hold(lambda x: fn(x) * torch.tensor([NAN, 2.0]), [x], [T.shard(0, (3, 0, 2))], (3,))


@pytest.mark.parametrize("rows", [[0], [5], [2, 4]])
def test_products_beside_infinity(rows):
    """Of an infinity in the last shard nobody else's slopes are to know."""
    x = torch.randn(6, 2, dtype=D)
    x[rows, 0] = INF
    for cut in ((4, 2), (3, 0, 3), (4, 2, 0)):
        for fn in (
            lambda x: x.prod(0),
            *[lambda x: x.cumprod(0), lambda x: x.logcumsumexp(0)] * (rows == [5]),
        ):
            T.hold(fn, [x], [T.shard(0, cut)], (len(cut),))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_products_of_large_and_small_numbers(dtype):
    """Of neighbours they stay in range; of large halves in single precision, as on a GPU."""
    big = 300.0 if dtype is torch.float16 else 1e30
    rows = [big, 1 / big, big, 1 / big] if dtype is torch.float32 else [big, big, 1 / big, 1 / big]
    x = torch.tensor(rows, dtype=dtype)

    def run():
        y = st.distribute_tensor(x, T.make_mesh((4,)), [Shard(0)], src_data_rank=None)
        return y.prod(0).full_tensor(), y.prod().full_tensor()

    for found in st.simulate(4, run):
        for got in found:
            torch.testing.assert_close(got, x.double().prod().to(dtype))


@pytest.mark.parametrize("equation", ["ik,kj->", "ik,kj->i", "kj,ik->j"])
def test_einsum_sums_what_broadcasts_before_the_product(equation):
    """Infinity times a sum is infinite, a sum of its products NaN where signs differ."""
    many = torch.tensor([1.0, 2.0, 3.0, -1.0, -1.0, -1.0], dtype=D)[:, None].repeat(1, 4)
    operands, on = [torch.full((5, 1), -INF, dtype=D), many], [None, T.shard(0)]
    if equation[0] == "k":
        operands, on = operands[::-1], on[::-1]
    T.hold(lambda *x: torch.einsum(equation, *x), operands, on, (2,), grad=False)
