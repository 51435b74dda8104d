"""Spectra that are read, written to, hooked and copied before and after modes were taken of them."""

import copy
import warnings

import pytest
import torch
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D, C = torch.float64, torch.complex128
X = torch.randn(2, 3, 24, 20, dtype=D)
CASES = {}


def case(fn):
    CASES[fn.__name__] = fn
    return fn


def size(y):
    return torch.view_as_real(y).square().sum()


def kept(y):
    return y[..., :2, :3]


@case
def base_written(y, w):
    a, b = kept(y), y[..., -2:, :3]
    c = a * 2
    y.mul_(3)
    return size(c) + size(y) + size(b)


@case
def slice_written_by_operators(y, w):
    a, b = kept(y), kept(y)
    a *= 2
    b += w
    b /= 3
    return size(y) + size(a)


@case
def slice_written(y, w):
    y[..., :2, :3] *= 2
    y[..., -2:, :3].mul_(w)
    y[..., 2:4, :3] = w
    return size(y)


@case
def slices_apart(y, w):
    a, b = kept(y), y[..., -2:, :3]
    c = a + b
    a.mul_(2)
    return size(a) + size(b) + size(c)


@case
def hooks(y, w):
    y.register_hook(lambda g: g * 2)
    a = kept(y)
    b = a * w
    a.register_hook(lambda g: g * 3)
    return size(b) + size(a * w)


@case
def gradients(y, w):
    a = kept(y)
    (g,) = torch.autograd.grad(size(a * w), a, create_graph=True)
    return size(g)


@case
def without_gradients(y, w):
    a = kept(y)
    with torch.no_grad():
        b, c = a * 2, kept(y) * 3
    with torch.inference_mode():
        d = size(kept(y) + 1).item()
    return size(a * w) + size(b) + size(c) + d


@case
def recomputed(y, w):
    a = kept(y)
    b = checkpoint(lambda a: a * w.exp(), a, use_reentrant=False)
    c = checkpoint(lambda v: kept(y) * v.exp(), w, use_reentrant=False)
    d = checkpoint(lambda v: y * v.abs().sum(), w, use_reentrant=False)
    return size(b) + size(c) + size(d)


@case
def copied(y, w):
    with torch.no_grad():
        z, a = copy.deepcopy(y.detach()), copy.deepcopy(kept(y).detach())
        z.mul_(2)
    return size(z) + size(a) + size(y)


@case
def other_indices(y, w):
    parts = y[:, :, 0, :3], y[0, :, :3], y[..., None], y[:, [0, 2], :3], y[..., :0, :3], y[1:]
    strided = y[..., 1:][..., ::2, ::3], y[..., ::5, 1:4] * 2
    return sum(map(size, (*parts, *strided)))


@case
def attributes(y, w):
    a = kept(y)
    facts = y.requires_grad, y.is_leaf, y.is_contiguous(), a.is_contiguous(), a.is_complex(), len(y)
    more = a._is_view(), y._version, a.element_size(), a.is_inference(), *y.stride(), *a.stride()
    return torch.tensor([*facts, *more], dtype=D).sum() + size(y)


@case
def value_written(y, w):
    out, v = torch.zeros_like(y), kept(y) * w
    out[..., :2, :3] = v
    v.mul_(3)
    return torch.fft.irfft2(out).square().sum() + size(v)


@case
def zeros_read(y, w):
    out = torch.zeros_like(y)
    alias, before = out[...], out[..., :2, :3]
    out[..., :2, :3] = kept(y) * w
    out[..., 1:3, :3] = kept(y)
    out[..., -2:, :3] += kept(y)
    return torch.fft.irfft2(out).square().sum() + size(out) + size(alias) + size(before)


@case
def zeros_written_again(y, w):
    out = torch.zeros_like(y)
    out[..., :2, :3] = kept(y) * w
    z = torch.fft.irfft2(out)
    out[..., -2:, :3] = y[..., -2:, :3]
    z = z + torch.fft.irfft2(torch.fft.fftshift(out, dim=-2))
    with torch.no_grad():
        out[..., 4:6, :3] = kept(y)
    return z.square().sum() + torch.fft.irfft2(out, s=(36, 26)).square().sum() + size(out)


@case
def not_zeros(y, w):
    out = torch.ones(y.shape, dtype=y.dtype)
    out[..., :2, :3] = kept(y)
    return torch.fft.irfft2(out).square().sum()


@case
def shifts(y, w):
    z = torch.fft.fftshift(y, dim=(-2,))
    a = z[..., 10:14, :4] * 2
    b = torch.fft.ifftshift(z[..., :4], dim=(-2,))
    y.mul_(2)
    return size(a) + size(z) + size(y) + size(b)


def differentiated(fn, x, w, where):
    x = where(x.clone()).requires_grad_()
    w = w.clone().requires_grad_()
    y = torch.fft.rfft2(x)
    loss = fn(y, w)
    loss.backward()
    found = loss.detach(), x.grad, w.grad
    return [f.full_tensor() if isinstance(f, st.ShardTensor) else f for f in found]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("d, cut", [(2, (15, 0, 9)), (3, (9, 11))])
def test_as_torch(name, d, cut):
    w = torch.randn(2, 3, dtype=C, generator=torch.Generator().manual_seed(2))
    want = differentiated(CASES[name], X, w, lambda x: x)

    def run():
        mesh = T.make_mesh((len(cut),))

        def place(x):
            return st.distribute_tensor(x, mesh, [Shard(d)], src_data_rank=None).redistribute(
                sizes={d: cut}
            )

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", st.FallbackWarning)
            return differentiated(CASES[name], X, w, place)

    for got in st.simulate(len(cut), run):
        for a, b in zip(got, want, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_input_is_written_afterwards():
    def run(d):
        x = st.distribute_tensor(X, T.make_mesh((3,)), [Shard(d)], src_data_rank=None).clone()
        y, z = torch.fft.rfft2(x), torch.fft.rfft(x, dim=d)
        x.zero_()
        z.narrow(d, 0, 2).mul_(2)
        want = torch.fft.rfft(X, dim=d)
        want.narrow(d, 0, 2).mul_(2)
        assert torch.allclose((kept(y) + 0).full_tensor(), kept(torch.fft.rfft2(X)))
        assert torch.allclose(z.full_tensor(), want)

    for d in (2, 3):
        st.simulate(3, run, d)


def test_refusals():
    """Where the memory of a slice that was sent is not the spectrum's, nothing stale is read."""

    def run():
        x = st.distribute_tensor(X, T.make_mesh((2,)), [Shard(2)], src_data_rank=None)
        x.requires_grad_()

        def fresh():
            y = torch.fft.rfft2(x)
            a = kept(y)
            return y, a, a + 1

        y, a, _ = fresh()
        y.mul_(2)
        with pytest.raises(st.UnsupportedOpError, match="after the tensor behind it was written"):
            a + 1
        y, a, _ = fresh()
        a.mul_(2)
        with pytest.raises(st.UnsupportedOpError, match="after a view of it"):
            y + 1
        y, _, b = fresh()
        with pytest.raises(st.UnsupportedOpError, match="modes were taken"):
            torch.autograd.grad(size(b), y)
        y, _, b = fresh()
        with pytest.raises(st.UnsupportedOpError, match="modes were taken"):
            y.register_hook(print)
        y, _, b = fresh()
        with pytest.raises(st.UnsupportedOpError, match="modes were taken"):
            y.retain_grad()
        # what autograd saved of a slice was written to, as torch has it
        y = torch.fft.rfft2(x)
        b = kept(y) * torch.ones((), dtype=C, requires_grad=True)
        y.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            size(b).backward()

    st.simulate(2, run)
