"""Layers of 8-bit floats as libraries write them: a subclass that wraps bits and scale, and scales
of past steps in a buffer. Each trains on shards as on one device."""

import pytest
import torch
from drawn import drawn
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh

F8 = torch.float8_e4m3fn
MOST = torch.finfo(F8).max
B, T, K, N = 2, 12, 32, 16


class Scaled(torch.Tensor):
    """Bits and the scale that they were multiplied by, shown as one tensor of numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data, scale, dtype, kernel):
        self = torch.Tensor._make_wrapper_subclass(
            cls, data.size(), strides=data.stride(), storage_offset=data.storage_offset(),
            dtype=dtype, layout=data.layout, requires_grad=data.requires_grad, device=data.device,
        )  # fmt: skip
        self._data, self._scale, self._kernel = data, scale, kernel
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        if not all(issubclass(cls, t) for t in types):
            return NotImplemented
        x, aten = args[0], torch.ops.aten
        if func is aten.mm.default:
            return x._kernel(x._data, x._scale, args[1]._data, args[1]._scale)
        scale = x._scale
        if scale.ndim and func is aten.t.default:
            scale = scale.t()
        elif scale.ndim and func is aten.view.default:
            scale = scale.view(-1, 1)
        elif func not in (aten.t.default, aten.view.default, aten.detach.default):
            raise NotImplementedError(func)
        return Scaled(func(x._data, *args[1:]), scale, x.dtype, x._kernel)


def emulated(a, sa, b, sb):
    return (a.double() / sa.double()) @ (b.double() / sb.double())


def by_hardware(a, sa, b, sb):
    b = b if b.stride(0) == 1 else b.t().contiguous().t()
    sa, sb = sa.reciprocal(), sb.reciprocal()
    return torch._scaled_mm(a.contiguous(), b, scale_a=sa, scale_b=sb, out_dtype=torch.float32)


def cast(x, dim, kernel):
    """x in 8 bits; dim: of which each row has its own scale, None: one for all."""
    most = x.abs().max() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = (MOST / most.double().clamp(min=1e-12)).float()
    return Scaled((x.float() * scale).clamp(-MOST, MOST).to(F8), scale, x.dtype, kernel)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, by_row, kernel):
        ctx.save_for_backward(x, weight)
        ctx.by_row, ctx.kernel = by_row, kernel
        x8 = cast(x, -1 if by_row else None, kernel)
        w8 = cast(weight, 0 if by_row else None, kernel)
        return torch.mm(x8.reshape(-1, x.shape[-1]), w8).reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        g, rows = grad.reshape(-1, grad.shape[-1]), -1 if ctx.by_row else None
        columns = 0 if ctx.by_row else None
        gx = torch.mm(cast(g, rows, ctx.kernel), cast(weight, rows, ctx.kernel).t())
        flat = x.reshape(-1, x.shape[-1])
        gw = torch.mm(cast(g, columns, ctx.kernel).t(), cast(flat, columns, ctx.kernel))
        return gx.reshape(x.shape).to(x.dtype), gw.t().to(weight.dtype), None, None


class Linear8(nn.Linear):
    by_row, kernel = False, staticmethod(emulated)

    def forward(self, x):
        return Product.apply(x, self.weight.t(), self.by_row, self.kernel) + self.bias


def net(layer, **options):
    torch.manual_seed(0)
    model = nn.Sequential(layer(K, 32), nn.GELU(), layer(32, N))
    for m in (model[0], model[2]):
        for name, value in options.items():
            setattr(m, name, value)
    return model


def whole(x):
    return x.full_tensor() if isinstance(x, st.ShardTensor) else x


def trained(model, x, dtype):
    x = x.detach().requires_grad_()
    y = model.to(dtype)(x)
    (y * torch.linspace(0.5, 1.5, y.numel(), dtype=dtype).view(y.shape)).sum().backward()
    grads = [p.grad for p in model.parameters()]
    assert not any(isinstance(g, st.ShardTensor) for g in grads)
    return [whole(y.detach()), whole(x.grad), *grads]


LIES = [
    ((2,), [Shard(1)], {1: (6, 6)}),
    ((3,), [Shard(1)], {1: (5, 0, 7)}),
    ((4,), [Shard(1)], {1: (1, 2, 3, 6)}),
    ((2,), [Shard(0)], {0: (2, 0)}),
    ((2,), [Shard(2)], {2: (11, 21)}),
    ((2, 2), [Shard(1), Shard(1)], {1: (1, 4, 4, 3)}),
    ((2, 2), [Shard(0), Shard(1)], {0: (1, 1), 1: (5, 7)}),
]


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("lies", LIES, ids=str)
def test_a_subclass_that_wraps_shards_trains_as_on_one_device(lies, by_row):
    mesh, placements, sizes = lies
    x = drawn(B, T, K)
    wants = trained(net(Linear8, by_row=by_row), x, torch.float64)

    def run():
        s = st.distribute_tensor(x, make_mesh(mesh), placements, src_data_rank=None, sizes=sizes)
        with st.fallback("error"):
            return trained(net(Linear8, by_row=by_row), s, torch.float64)

    for found in st.simulate(torch.Size(mesh).numel(), run):
        for got, want in zip(found, wants, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("by_row", [False, True])
def test_it_trains_with_the_products_of_the_hardware(by_row):
    x = drawn(B, T, K).float()
    options = dict(by_row=by_row, kernel=by_hardware)
    wants = trained(net(Linear8, **options), x, torch.float32)

    def run():
        s = st.distribute_tensor(
            x, make_mesh((3,)), [Shard(1)], src_data_rank=None, sizes={1: (5, 0, 7)}
        )
        with st.fallback("error"):
            return trained(net(Linear8, **options), s, torch.float32)

    for found in st.simulate(3, run):
        for got, want in zip(found, wants, strict=True):
            # an eighth of a unit may be rounded up here and down there
            torch.testing.assert_close(got, want, rtol=0.02, atol=0.02 * float(want.abs().max()))
            assert float((got - want).norm() / want.norm()) < 2e-3


def test_a_scale_of_all_is_one_number_and_one_of_rows_sends_nothing():
    x = drawn(1, T, K)

    def run():
        s = st.distribute_tensor(
            x, make_mesh((2,)), [Shard(1)], src_data_rank=None, sizes={1: (5, 7)}
        )
        found = []
        for by_row in (False, True):
            with st.trace() as t:
                net(Linear8, by_row=by_row)[0].double()(s)
            found.append([(m.collective, m.op, m.bytes) for m in t.sent])
        return found

    for tensors, rows in st.simulate(2, run):
        assert [op for _, op, _ in tensors] == ["max"] and tensors[0][2] <= 16
        assert rows == []


class Delayed(torch.autograd.Function):
    """x W of bits by the scales that the last steps left; writes down how large each operand is."""

    @staticmethod
    def forward(ctx, x, weight, history, scale):
        ctx.save_for_backward(x, weight)
        ctx.history, ctx.scale = history, scale
        history[0, 0] = x.abs().max()
        history[0, 1] = weight.abs().max()
        x8, w8 = bits(x, scale[0]), bits(weight, scale[1])
        y = emulated(x8.reshape(-1, x.shape[-1]), scale[0], w8, scale[1])
        return y.reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        scale, g = ctx.scale, grad.reshape(-1, grad.shape[-1])
        ctx.history[0, 2] = grad.abs().max()
        g8, x8 = bits(g, scale[2]), bits(x.reshape(-1, x.shape[-1]), scale[0])
        gx = emulated(g8, scale[2], bits(weight, scale[1]).t(), scale[1])
        return gx.reshape(x.shape), emulated(x8.t(), scale[0], g8, scale[2]), None, None


def bits(x, scale):
    return (x.float() * scale).clamp(-MOST, MOST).to(F8)


class DelayedLinear(nn.Linear):
    """As Transformer Engine's: a history of the largest absolute values, scales of it in between."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("history", torch.zeros(3, 3))
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x):
        if self.training:
            self.scale.copy_(MOST / self.history.amax(0).clamp(min=1e-3))
            self.history.copy_(torch.roll(self.history, 1, 0))
        return Delayed.apply(x, self.weight.t(), self.history, self.scale) + self.bias


def steps(model, xs):
    found = []
    optimizer = torch.optim.SGD(model.double().parameters(), lr=0.05)
    for m in (model[0], model[2]):
        m.history, m.scale = m.history.float(), m.scale.float()
    for x in xs:
        optimizer.zero_grad()
        y = model(x)
        y.square().mean().backward()
        optimizer.step()
        found.append(whole(y.detach()))
    return [*found, *(whole(t.detach()) for t in (*model.parameters(), *model.buffers()))]


@pytest.mark.parametrize("lies", LIES, ids=str)
def test_scales_of_past_steps_are_those_of_one_device(lies):
    mesh, placements, sizes = lies
    xs = [drawn(B, T, K, seed=s) * (1 + s) for s in range(5)]
    wants = steps(net(DelayedLinear), xs)

    def run():
        m = make_mesh(mesh)
        shards = [
            st.distribute_tensor(x, m, placements, src_data_rank=None, sizes=sizes) for x in xs
        ]
        with st.fallback("error"):
            return steps(net(DelayedLinear), shards)

    for found in st.simulate(torch.Size(mesh).numel(), run):
        for got, want in zip(found, wants, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_torchao_as_it_is():
    float8 = pytest.importorskip("torchao.float8")
    x = drawn(B, T, K).bfloat16()

    def model(recipe):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(K, 32), nn.GELU(), nn.Linear(32, N)).bfloat16()
        config = float8.Float8LinearConfig.from_recipe_name(recipe)
        object.__setattr__(config, "emulate", True)
        return float8.convert_to_float8_training(plain, config=config)

    for recipe in ("tensorwise", "rowwise", "rowwise_with_gw_hp"):
        wants = trained(model(recipe), x, torch.bfloat16)

        def run(recipe=recipe):
            s = st.distribute_tensor(
                x, make_mesh((3,)), [Shard(1)], src_data_rank=None, sizes={1: (5, 0, 7)}
            )
            with st.fallback("error"):
                return trained(model(recipe), s, torch.bfloat16)

        for found in st.simulate(3, run):
            for got, want in zip(found, wants, strict=True):
                # sums over tokens are rounded otherwise
                torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-5)
