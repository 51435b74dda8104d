"""Scaled products of 8-bit floats on shards, and training of layers that use them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Shard
from torch.nn.functional import ScalingType

import shardtensor as st
from shardtensor.ranks.testing import cuts, make_mesh

F8 = torch.float8_e4m3fn
M, K, N = 20, 32, 16


def matrix(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def eighth(x, dim=None):
    """(an 8-bit copy, the scale that gives x back) of a tensor or of each row or column."""
    most = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = torch.finfo(F8).max / most.clamp(min=1e-12).float()
    return (x * scale).clamp(-448, 448).to(F8), scale.reciprocal()


def placed(x, mesh, dim, sizes):
    if dim is None:
        return x
    return st.distribute_tensor(x, mesh, [Shard(dim)], src_data_rank=None, sizes={dim: sizes})


def whole(x):
    return x.full_tensor() if isinstance(x, st.ShardTensor) else x


def by_v2(a, b, sa, sb, bias, dtype):
    kind = ScalingType.TensorWise if sa.numel() == 1 else ScalingType.RowWise
    return F.scaled_mm(a, b, sa, kind, sb, kind, bias=bias, output_dtype=dtype)


def by_v1(a, b, sa, sb, bias, dtype):
    return torch._scaled_mm(a, b, scale_a=sa, scale_b=sb, bias=bias, out_dtype=dtype)


# which dims of the two matrices are cut: rows, columns, what is summed over (in one or in both)
LIES = {"rows": (0, None), "columns": (None, 1), "both": (1, 0), "one": (1, None), "across": (0, 0)}


@pytest.mark.parametrize("run", [by_v1, by_v2])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("lies", LIES)
def test_products(lies, by_row, run):
    a, b = matrix(M, K), matrix(N, K, seed=1)
    (a8, sa), (b8, sb) = eighth(a, 1 if by_row else None), eighth(b, 1 if by_row else None)
    bias = matrix(N, seed=2)
    wants = {d: run(a8, b8.t(), sa, sb.t(), bias.to(d), d) for d in (torch.float32, torch.bfloat16)}
    da, db = LIES[lies]

    def ranks(sizes_a, sizes_b):
        mesh = make_mesh((len(sizes_a or sizes_b),))
        x, w = placed(a8, mesh, da, sizes_a), placed(b8.t(), mesh, db, sizes_b)
        # scales of cut rows are cut alike, as those that are computed of shards
        s = placed(sa, mesh, 0, sizes_a) if by_row and da == 0 else sa
        t = placed(sb.t(), mesh, 1, sizes_b) if by_row and db == 1 else sb.t()
        with st.fallback("error"):
            for dtype, want in wants.items():
                got = run(x, w, s, t, bias.to(dtype), dtype)
                assert got.dtype is dtype and got.shape == want.shape
                # what is added up in another order is rounded otherwise
                close = dict(rtol=2**-7, atol=2**-6) if dtype is torch.bfloat16 else {}
                torch.testing.assert_close(whole(got), want, **close)
        return [None if d is None else x._spec.dims[d].sizes for d in [da]]

    rows, inner, columns = cuts(M), cuts(K), cuts(N)
    for i in range(max(len(rows), len(inner))):
        of = {0: rows[i % len(rows)], 1: inner[i % len(inner)]}
        size_a = None if da is None else of[da]
        size_b = (
            None if db is None else inner[i % len(inner)] if db == 0 else columns[i % len(columns)]
        )
        if size_a and size_b and len(size_a) != len(size_b):
            continue
        st.simulate(len(size_a or size_b), ranks, size_a, size_b)


def test_rows_send_nothing_and_a_sum_is_one_message():
    a8, sa = eighth(matrix(M, K), 1)
    b8, sb = eighth(matrix(N, K, seed=1), 1)

    def run():
        mesh = make_mesh((2,))
        x, s = placed(a8, mesh, 0, (3, 17)), placed(sa, mesh, 0, (3, 17))
        with st.trace() as rows:
            by_v1(x, b8.t(), s, sb.t(), None, torch.bfloat16)
        g, w = placed(a8.t().contiguous(), mesh, 1, (3, 17)), placed(a8, mesh, 0, (3, 17))
        one = torch.ones(())
        with st.trace() as summed:
            by_v1(g, w, one, one, None, torch.bfloat16)
        return rows.sent, [s.collective for s in summed.sent]

    assert st.simulate(2, run) == [([], ["all_reduce"])] * 2


def test_what_has_no_rule_is_gathered_and_mistakes_raise():
    a8, b8 = eighth(matrix(M, K))[0], eighth(matrix(N, K, seed=1))[0].t()
    one = torch.ones(())
    want = torch._scaled_mm(a8, b8, scale_a=one, scale_b=one)

    def run():
        x = placed(a8, make_mesh((3,)), 0, (1, 0, 19))
        with pytest.raises(st.UnsupportedOpError, match="_scaled_mm"), st.fallback("error"):
            torch._scaled_mm(x, b8, scale_a=one, scale_b=one)
        got = torch._scaled_mm(x, b8, scale_a=one, scale_b=one)
        torch.testing.assert_close(got.full_tensor().float(), want.float())
        with pytest.raises((RuntimeError, ValueError)):
            # rows here, one there: of one row, too, which the first rank has
            by_v1(x, b8, torch.ones(M, 1), one, None, torch.float32)
        with pytest.raises(RuntimeError):
            by_v1(x, b8[:16], one, one, None, torch.float32)

    with pytest.warns(st.FallbackWarning):
        st.simulate(3, run)


class Product(torch.autograd.Function):
    """x W^T of 8-bit floats, forward and backward, each scaled anew."""

    @staticmethod
    def forward(ctx, x, weight, by_row):
        ctx.save_for_backward(x, weight)
        ctx.by_row = by_row
        return scaled(x, weight.t(), by_row)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return scaled(g, weight, ctx.by_row), scaled(g.t(), x, ctx.by_row), None


def scaled(a, b, by_row):
    (a8, sa), (b8, sb) = eighth(a, 1 if by_row else None), eighth(b, 0 if by_row else None)
    b8 = b8.t().contiguous().t()
    return torch._scaled_mm(a8.contiguous(), b8, scale_a=sa, scale_b=sb, out_dtype=torch.float32)


class Linear8(nn.Linear):
    """As torchao's Float8Linear: dynamic scales, of tensors or of rows."""

    by_row = False

    def forward(self, x):
        y = Product.apply(x.reshape(-1, x.shape[-1]), self.weight, self.by_row)
        return (y + self.bias).reshape(*x.shape[:-1], -1)


def trained(model, x):
    x = x.detach().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    return [whole(t) for t in (y.detach(), x.grad, *(p.grad for p in model.parameters()))]


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("sizes", [(5, 5), (7, 3), (4, 0, 6), (1, 2, 3, 4)])
def test_layers_train_as_on_one_device(sizes, by_row):
    def net():
        torch.manual_seed(0)
        model = nn.Sequential(Linear8(K, 32), nn.GELU(), Linear8(32, N))
        for layer in (model[0], model[2]):
            layer.by_row = by_row
        return model

    x = matrix(2, 10, K, seed=3)
    wants = trained(net(), x)

    def run():
        mesh = make_mesh((len(sizes),))
        s = st.distribute_tensor(x, mesh, [Shard(1)], src_data_rank=None, sizes={1: sizes})
        with st.fallback("error"):
            return trained(net(), s)

    for found in st.simulate(len(sizes), run):
        for got, want in zip(found, wants, strict=True):
            # an eighth of a unit may be rounded up here and down there
            torch.testing.assert_close(got, want, rtol=0.02, atol=0.02 * float(want.abs().max()))
            assert float((got - want).norm() / want.norm()) < 2e-3
