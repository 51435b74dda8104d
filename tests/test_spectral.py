"""Transforms that keep few modes: rfftn and slices, zeros and irfftn, sending the modes only."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.ops.spectral import truncated_irfftn, truncated_rfftn

torch.manual_seed(0)
D = torch.float64
NORMS = [None, "ortho", "forward"]


def sliced(x, modes, norm=None):
    """rfft2 and slices, as spectral layers have it."""
    (a, b), m = modes
    y = torch.fft.rfft2(x, norm=norm)
    return torch.cat([y[..., :a, :m], y[..., y.shape[-2] - b :, :m]], -2)


def spread(y, modes, s, norm=None):
    (a, b), m = modes
    full = torch.zeros(*y.shape[:-2], s[0], s[1] // 2 + 1, dtype=y.dtype)
    full[..., :a, :m] = y[..., :a, :]
    full[..., s[0] - b :, :m] = y[..., a:, :]
    return torch.fft.irfft2(full, s=s, norm=norm)


@pytest.mark.parametrize("modes", [((2, 1), 2), ((1, 0), 1), ((4, 5), 6), ((3, 3), 5)])
def test_plain(modes):
    for norm in NORMS:
        x = torch.randn(2, 9, 10, dtype=D)
        y = truncated_rfftn(x, modes, norm=norm)
        assert torch.allclose(y, sliced(x, modes, norm), atol=1e-14)
        z = truncated_irfftn(y, modes, (9, 10), norm=norm)
        assert torch.allclose(z, spread(y, modes, (9, 10), norm), atol=1e-14)


class Layer(nn.Module):
    def __init__(self, modes, norm=None, kept=True):
        super().__init__()
        self.modes, self.norm = modes, norm
        (a, b), m = modes
        self.weight = nn.Parameter(torch.randn(3, 2, a + b, m, dtype=torch.complex128))

    def forward(self, x):
        y = truncated_rfftn(x, self.modes, norm=self.norm)
        y = torch.einsum("bixy,ioxy->boxy", y, self.weight)
        return truncated_irfftn(y, self.modes, x.shape[-2:], norm=self.norm, like=x) + x[:, :2]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("modes", [((2, 1), 2), ((1, 0), 1), ((5, 5), 4), ((1, 1), 8)])
def test_layer(modes, norm):
    x = torch.randn(2, 3, 12, 14, dtype=D)
    net = Layer(modes, norm)
    want = spread(torch.einsum("bixy,ioxy->boxy", sliced(x, modes, norm), net.weight), modes,
                  (12, 14), norm) + x[:, :2]  # fmt: skip
    assert torch.allclose(net(x), want, atol=1e-12)
    for d in (2, 3):
        for cut in T.cuts(x.shape[d]):
            (spec,) = T.hold(net, [x], [T.shard(d, cut)], (len(cut),))
            assert spec.dims[d].sizes == cut
    for on in [
        T.On([Shard(2), Shard(3)], {2: (3, 9)}), T.On([Shard(3), Shard(2)], {3: (0, 14)}),
        T.On([Shard(2), Shard(2)], {2: (1, 5, 0, 6)}), T.On([Shard(3), Shard(3)]),
        T.On([Replicate(), Shard(2)]), T.On([Shard(0), Shard(3)]), T.On([Shard(2), Shard(1)]),
    ]:  # fmt: skip
        T.hold(net, [x], [on], (2, 2))


def test_three_dims_and_single_precision():
    x = torch.randn(2, 12, 5, 8)
    modes, dims = ((1, 1), 2, 3), (1, 2, 3)

    def fn(x):
        y = truncated_rfftn(x, modes, dims)
        return torch.view_as_real(y), truncated_irfftn(y * 2, modes, (12, 5, 8), dims, like=x)

    for d in (0, 1, 2, 3):
        T.hold(fn, [x], [T.shard(d)], (2,))
        T.hold(fn, [x.double()], [T.shard(d)], (3,), gather=True)
    y = torch.randn(2, 3, 2, dtype=torch.complex128)
    for on in (None, T.shard(0), T.shard(1), T.shard(2)):
        T.hold(
            lambda y, x: truncated_irfftn(y, ((2, 1), 2), (12, 4), like=x) + x,
            [y, torch.randn(2, 12, 4, dtype=D)], [on, T.shard(1)], (3,), gather=True,
        )  # fmt: skip


def test_only_the_modes_are_sent():
    """64 x 64 points, 8 x 4 modes on 4 ranks: forward and backward, against the full transform."""

    def run():
        mesh, x = T.make_mesh((4,)), torch.randn(1, 3, 64, 64, dtype=D)
        x = st.distribute_tensor(x, mesh, [Shard(2)], src_data_rank=None).requires_grad_()
        modes = ((4, 4), 4)
        with st.trace() as few:
            y = truncated_irfftn(truncated_rfftn(x, modes), modes, (64, 64), like=x)
            y.sum().backward()
        with st.trace() as all_of_it:
            torch.fft.irfft2(torch.fft.rfft2(x), s=(64, 64)).sum().backward()
        return sum(s.bytes for s in few.sent if s.op != "sum"), all_of_it.bytes

    few, full = st.simulate(4, run)[0]
    # 3 channels of 8 x 4 modes of 16 bytes, 3/4 of which go elsewhere: reduce-scatters; gathers
    modes = 3 * 8 * 4 * 16
    assert few == 2 * (modes * 3 // 4 + modes * 3 // 4) and 16 * few < full


def test_compiled():
    def run():
        x = torch.randn(2, 3, 12, 8, dtype=D)
        x = st.distribute_tensor(x, T.make_mesh((2,)), [Shard(2)], src_data_rank=None)
        net = Layer(((2, 1), 2))
        got = st.compile(net, backend="aot_eager", fullgraph=True)(x)
        assert torch.allclose(got.full_tensor(), net(x).full_tensor())

    st.simulate(2, run)


@pytest.mark.parametrize(
    "modes", [((7, 6), 2), ((0, 0), 2), ((2, 1), 8), ((-1, 3), 1), (2, (1, 1))]
)
def test_wrong_modes(modes):
    with pytest.raises(ValueError, match="modes"):
        truncated_rfftn(torch.randn(12, 12), modes)
    with pytest.raises(ValueError, match="modes in dims"):
        truncated_rfftn(torch.randn(12, 12), (2, 2), dim=(0, 3))
