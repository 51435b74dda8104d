"""Fourier transforms over sharded dims against plain torch, and the layers made of them."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D, C = torch.float64, torch.complex128


def test_other_arguments():
    x = torch.randn(2, 3, 8)
    T.hold(lambda x: torch.fft.rfft2(x), [x], [T.shard(2)], (3,))
    T.hold(lambda x: torch.fft.fft(x.to(torch.complex64), dim=1), [x], [T.shard(1)], (3,))
    T.hold(lambda x: torch.fft.fft(x), [torch.arange(12).view(2, 6)], [T.shard(1)], (2,))
    T.hold(lambda x: torch.fft.fftn(x, dim=()), [torch.randn(4, 3, dtype=C)], [T.shard(0)], (2,))
    y = torch.randn(3, 6, dtype=C)
    for fn in [torch.fft.fftshift, torch.fft.ifftshift, torch.view_as_real]:
        T.hold(fn, [y], [T.shard(1, (4, 0, 2))], (3,))
    T.hold(lambda y: torch.fft.fftshift(y, dim=(0,)), [y], [T.shard(0)], (2,))
    T.hold(torch.view_as_complex, [torch.randn(5, 3, 2, dtype=D)], [T.shard(0)], (3,))

    def errors():
        x = st.distribute_tensor(torch.randn(4, 6), T.make_mesh((2,)), [Shard(1)])
        for bad in [lambda: torch.fft.fft(x, 0), lambda: torch.fft.fftn(x, dim=(1, 1)),
                    lambda: torch.fft.rfft(x.cfloat()), lambda: torch.fft.fft(x, norm="?")]:  # fmt: skip
            # torch 2.14 raises a TypeError for numbers of the wrong kind
            with pytest.raises((RuntimeError, TypeError)):
                bad()
        with pytest.raises(IndexError):
            torch.fft.fft(x, dim=2)
        out = st.distribute_tensor(torch.zeros(4, 4, dtype=torch.cfloat), x.device_mesh, [Shard(0)])
        assert torch.fft.rfft(x, out=out) is out and out.full_tensor().any()

    st.simulate(2, errors)


def test_shards_move_to_the_largest_other_dim():
    (spec,) = T.hold(torch.fft.rfft, [torch.randn(2, 3, 7, dtype=D)], [T.shard(2)], (3,))
    assert spec.dims[1].axes == (0,)


def test_gradient_of_gradient():
    def run():
        x = torch.randn(3, 6, dtype=D, generator=torch.Generator().manual_seed(1))
        found = []
        for place in (False, True):
            y = x.clone()
            if place:
                y = st.distribute_tensor(y, T.make_mesh((2,)), [Shard(0)], src_data_rank=None)
            y.requires_grad_()
            z = torch.fft.rfft2(y).abs().square().mul(y.mean()).sum()
            (g,) = torch.autograd.grad(z, y, create_graph=True)
            (h,) = torch.autograd.grad(g.square().sum(), y)
            found.append(h.full_tensor() if place else h)
        assert torch.allclose(*found, rtol=1e-11)

    st.simulate(2, run)


def test_a_pair_costs_two_swaps():
    def run():
        x = torch.randn(2, 3, 16, 8)
        x = st.distribute_tensor(x, T.make_mesh((2,)), [Shard(2)], src_data_rank=None)
        with st.trace() as t:
            f = torch.fft.rfft2(x)
            y = torch.fft.irfft2(f * 2)
        assert f._spec.dims[3].axes == (0,) and y._spec == x._spec
        # half of this rank's numbers go to the other rank, there and back
        there, back = 2 * 3 * 8 * 2 * 8, 2 * 3 * 8 * 3 * 8
        return [(s.collective, s.bytes) for s in t.sent], (there, back)

    for rank, (sent, (there, back)) in enumerate(st.simulate(2, run)):
        assert sent == [("swap", (there, back)[rank]), ("swap", (back, there)[rank])]


def test_compiled():
    def run():
        x = torch.randn(2, 6, 5, dtype=D)
        x = st.distribute_tensor(x, T.make_mesh((2,)), [Shard(1)], src_data_rank=None)

        def fn(x):
            f = torch.fft.rfft2(x)
            return torch.fft.irfft2(f * f.abs(), s=x.shape[-2:]) + x

        got = st.compile(fn, backend="aot_eager", fullgraph=True)(x)
        assert torch.allclose(got.full_tensor(), fn(x).full_tensor())

    st.simulate(2, run)


# layers ------------------------------------------------------------------------------------------


class SpectralConv2d(nn.Module):
    """The layer of Li et al., "Fourier Neural Operator" (arXiv 2010.08895), as it is written."""

    def __init__(self, channels, modes1, modes2, dtype=C):
        super().__init__()
        self.modes = modes1, modes2
        shape = (channels, channels, modes1, modes2)
        self.weights1 = nn.Parameter(torch.rand(shape, dtype=dtype) / channels)
        self.weights2 = nn.Parameter(torch.rand(shape, dtype=dtype) / channels)

    def forward(self, x):
        m1, m2 = self.modes
        x_ft = torch.fft.rfft2(x)
        out_ft = torch.zeros(
            *x.shape[:2], x.size(-2), x.size(-1) // 2 + 1, dtype=x_ft.dtype, device=x.device
        )
        mul = "bixy,ioxy->boxy"
        out_ft[:, :, :m1, :m2] = torch.einsum(mul, x_ft[:, :, :m1, :m2], self.weights1)
        out_ft[:, :, -m1:, :m2] = torch.einsum(mul, x_ft[:, :, -m1:, :m2], self.weights2)
        return torch.fft.irfft2(out_ft, s=(x.size(-2), x.size(-1)))


class FNO2d(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.lift, self.project = nn.Linear(2, 4, dtype=D), nn.Conv2d(4, 1, 1, dtype=D)
        self.convs = nn.ModuleList(SpectralConv2d(4, 3, 2) for _ in range(2))
        self.ws = nn.ModuleList(nn.Conv2d(4, 4, 1, dtype=D) for _ in range(2))

    def forward(self, x):
        x = F.pad(self.lift(x).permute(0, 3, 1, 2), (0, 1, 0, 2))
        for conv, w in zip(self.convs, self.ws, strict=True):
            x = F.gelu(conv(x) + w(x))
        return self.project(x[..., :-2, :-1]).permute(0, 2, 3, 1)


@pytest.mark.filterwarnings("ignore::shardtensor.FallbackWarning")
def test_fno():
    x = torch.randn(2, 9, 8, 2, dtype=D)
    for d in (1, 2):
        for cut in T.cuts(x.shape[d]):
            T.hold(FNO2d(), [x], [T.shard(d, cut)], (len(cut),), gather=True, rtol=1e-11)
    for on in [T.On([Shard(1), Shard(2)], {1: (4, 5)}), T.On([Shard(1), Shard(1)])]:
        T.hold(FNO2d(), [x], [on], (2, 2), gather=True, rtol=1e-11)


def legendre(lmax, mmax, cos):
    """Orthonormal associated Legendre functions P[m, l, k] by their recurrence in the degree."""
    p = np.zeros((mmax, lmax, len(cos)))
    for m in range(min(mmax, lmax)):
        c = math.sqrt(
            (2 * m + 1) / (4 * math.pi) * math.prod((2 * i - 1) / (2 * i) for i in range(1, m + 1))
        )
        p[m, m] = (-1) ** m * c * (1 - cos**2) ** (m / 2)
        for n in range(m + 1, lmax):
            a = math.sqrt((4 * n * n - 1) / (n * n - m * m))
            b = math.sqrt(((n - 1) ** 2 - m * m) / (4 * (n - 1) ** 2 - 1)) if n > m + 1 else 0.0
            p[m, n] = a * (cos * p[m, n - 1] - b * p[m, n - 2])
    return torch.from_numpy(p)


class SHT(nn.Module):
    """Fields on a Gauss grid to coefficients (..., l, m); with pairs, as older code has it."""

    def __init__(self, nlat, nlon, lmax, mmax, pairs=False):
        super().__init__()
        self.nlat, self.nlon, self.lmax, self.mmax, self.pairs = nlat, nlon, lmax, mmax, pairs
        cos, weights = np.polynomial.legendre.leggauss(nlat)
        p = legendre(lmax, mmax, cos[::-1])
        self.register_buffer("pct", p)
        self.register_buffer("weights", p * torch.from_numpy(weights[::-1].copy()))

    def forward(self, x):
        x = 2 * torch.pi * torch.fft.rfft(x, dim=-1, norm="forward")
        eq = "...km,mlk->...lm"
        if not self.pairs:
            x = x[..., : self.mmax]
            parts = [torch.einsum(eq, v, self.weights) for v in (x.real, x.imag)]
            return torch.complex(*[v.contiguous() for v in parts])
        x = torch.view_as_real(x)
        out = torch.zeros(*x.shape[:-3], self.lmax, self.mmax, 2, dtype=x.dtype, device=x.device)
        out[..., 0] = torch.einsum(eq, x[..., : self.mmax, 0], self.weights)
        out[..., 1] = torch.einsum(eq, x[..., : self.mmax, 1], self.weights)
        return torch.view_as_complex(out)


class RoundTrip(SHT):
    """Filtered by degree and back."""

    def forward(self, x):
        c = super().forward(x) / (1 + torch.arange(self.lmax, dtype=x.dtype))[:, None]
        back = "...lm,mlk->...km"
        x = torch.complex(*[torch.einsum(back, v, self.pct) for v in (c.real, c.imag)])
        x = torch.complex(x.real, x.imag * (torch.arange(self.mmax) != 0))
        return torch.fft.irfft(x, n=self.nlon, dim=-1, norm="forward")


@pytest.mark.filterwarnings("ignore::shardtensor.FallbackWarning")
@pytest.mark.parametrize("pairs", [False, True])
def test_spherical_harmonics(pairs):
    net = RoundTrip(6, 12, 6, 6, pairs)
    with torch.no_grad():
        c = SHT.forward(net, torch.ones(6, 12, dtype=D))
        assert torch.allclose(c[0, 0].real, torch.tensor(4 * math.pi, dtype=D).sqrt())
    x = torch.randn(2, 3, 6, 12, dtype=D)
    for d in (2, 3):
        for cut in T.cuts(x.shape[d]):
            T.hold(net, [x], [T.shard(d, cut)], (len(cut),))
    T.hold(net, [x], [T.On([Shard(2), Shard(3)], {3: (5, 7)})], (2, 2))


def test_latitudes_meet_as_coefficients():
    """Contraction over sharded latitudes sends the coefficients only."""

    def run():
        net, x = SHT(32, 16, 4, 4).float(), torch.randn(1, 3, 32, 16)
        x = st.distribute_tensor(x, T.make_mesh((2,)), [Shard(2)], src_data_rank=None)
        with st.trace() as t:
            net(x)
        return [s.collective for s in t.sent], t.bytes

    names, sent = st.simulate(2, run)[0]
    assert names == ["all_reduce"] * 2 and sent <= 2 * 2 * 3 * 16 * 4


def halves_of_transforms(name):
    """Autocast on CPUs makes them wider first."""
    x = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    call = getattr(torch.fft, name)
    s = st.distribute_tensor(x, T.make_mesh((2,)), [Shard(1)], src_data_rank=None)
    s, x = s.requires_grad_(), x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = call(s), call(x)
    T.same(got.detach(), want.detach(), name)
    for y in (got, want):
        (y.abs() ** 2).sum().backward()
    T.same(s.grad, x.grad, f"gradient of {name}", 1e-2)


@pytest.mark.parametrize("name", ["fft2", "rfft2", "rfftn", "ifft2"])
def test_transforms_of_halves_under_autocast(name):
    st.simulate(2, halves_of_transforms, name)
