"""Spectral layers as they are written send the kept modes only."""

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.ops.spectral import truncated_irfftn, truncated_rfftn
from shardtensor.ranks.measure import saved_bytes

torch.manual_seed(0)
D, C = torch.float64, torch.complex128
MUL = "bixy,ioxy->boxy"
X = torch.randn(2, 3, 24, 20, dtype=D)
W = torch.randn(3, 2, 4, 3, dtype=C)


def corners(x, w, m=2, k=3):
    """As Li et al. (arXiv 2010.08895) and most after them have it."""
    y = torch.fft.rfft2(x)
    out = torch.zeros(len(x), w.shape[1], x.size(-2), x.size(-1) // 2 + 1, dtype=y.dtype)
    out[:, :, :m, :k] = torch.einsum(MUL, y[:, :, :m, :k], w[:, :, :m])
    out[:, :, -m:, :k] = torch.einsum(MUL, y[:, :, -m:, :k], w[:, :, m:])
    return torch.fft.irfft2(out, s=(x.size(-2), x.size(-1)))


def like(x, w, m=2, k=3):
    y = torch.fft.rfft2(x, norm="ortho")
    out = y.new_zeros(len(x), w.shape[1], *y.shape[2:])
    out[..., :m, :k] = torch.einsum(MUL, y.narrow(2, 0, m).narrow(3, 0, k), w[:, :, :m])
    out[..., -m:, :k] = torch.einsum(MUL, y[..., -m:, :k], w[:, :, m:])
    return torch.fft.irfft2(out, s=x.shape[-2:], norm="ortho")


def shifted(x, w, m=2, k=3):
    """The zero frequency in the middle, dims by number, indices as tuples of slices."""
    y = torch.fft.fftshift(torch.fft.rfftn(x, dim=(-2, -1), norm="forward"), dim=(-2,))
    c = y.shape[-2] // 2
    at = (slice(None), slice(None), slice(c - m, c + m), slice(None, k))
    out = torch.zeros([len(x), w.shape[1], *y.shape[2:]], dtype=y.dtype)
    out[at] = torch.einsum(MUL, y[at], w)
    out = torch.fft.ifftshift(out, dim=(-2,))
    return torch.fft.irfftn(out, s=x.shape[2:], dim=(-2, -1), norm="forward")


def joined(x, w, m=2, k=3):
    """Corners joined, real weights, factors of a low rank one after the other."""
    y = torch.fft.rfft2(x)
    z = torch.cat([y[..., :m, :k], y[..., -m:, :k]], -2)
    u = torch.view_as_complex(torch.view_as_real(w))
    z = torch.einsum("bixy,io,ixy->boxy", z, u[..., 0, 0], u[:, 0])
    out = torch.zeros_like(y[:, :1]).repeat(1, w.shape[1], 1, 1)
    out[..., :m, :k], out[..., -m:, :k] = z[..., :m, :], z[..., m:, :]
    return torch.fft.irfft2(out, s=x.shape[-2:])


def spectral(x, w, m=2, k=3):
    z = torch.einsum(MUL, truncated_rfftn(x, (m, k)), w)
    return truncated_irfftn(z, (m, k), x.shape[-2:], like=x)


LAYERS = [corners, like, shifted, joined]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda f: f.__name__)
def test_layers(layer):
    for d, cut in [(2, (6, 6, 6, 6)), (2, (15, 0, 9)), (3, (9, 11)), (3, (0, 13, 7)), (2, (1, 23))]:
        T.hold(layer, [X, W], [T.shard(d, cut), None], (len(cut),))
    for on in [
        T.On([Shard(2), Shard(3)], {2: (5, 19)}), T.On([Shard(2), Shard(2)], {2: (1, 9, 0, 14)}),
        T.On([Replicate(), Shard(3)]), T.On([Shard(0), Shard(2)]),
    ]:  # fmt: skip
        T.hold(layer, [X, W], [on, None], (2, 2))


def test_one_and_three_dims():
    def line(x, w):
        y = torch.fft.rfft(x)
        out = torch.zeros(len(x), 2, y.shape[-1], dtype=y.dtype)
        out[:, :, :3] = torch.einsum("bix,iox->box", y[:, :, :3], w)
        return torch.fft.irfft(out, n=x.size(-1))

    def volume(x, w):
        y = torch.fft.rfftn(x, dim=[-3, -2, -1])
        out = torch.zeros_like(y)
        for i, a in enumerate((slice(2), slice(-2, None))):
            for j, b in enumerate((slice(2), slice(-2, None))):
                part = w[..., 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, :]
                out[:, :, a, b, :2] = torch.einsum("bixyz,ioxyz->boxyz", y[:, :, a, b, :2], part)
        return torch.fft.irfftn(out, s=x.shape[-3:], dim=[-3, -2, -1])

    x, w = torch.randn(2, 3, 26, dtype=D), torch.randn(3, 2, 3, dtype=C)
    for cut in [(13, 13), (20, 0, 6), (7, 7, 6, 6)]:
        T.hold(line, [x, w], [T.shard(2, cut), None], (len(cut),))
    x, w = torch.randn(1, 2, 18, 10, 6, dtype=D), torch.randn(2, 2, 4, 4, 2, dtype=C)
    for d, cut in [(2, (7, 11)), (3, (5, 5)), (2, (6, 6, 6)), (4, (1, 5))]:
        T.hold(volume, [x, w], [T.shard(d, cut), None], (len(cut),))
    T.hold(volume, [x, w], [T.On([Shard(2), Shard(3)]), None], (2, 2))


def test_second_derivatives():
    def run(x):
        y = torch.fft.rfft2(x)
        out = torch.zeros_like(y)
        out[..., :2, :3] = y[..., :2, :3].square()
        z = torch.fft.irfft2(out, s=x.shape[-2:])
        (g,) = torch.autograd.grad(z.pow(2).sum(), x, create_graph=True)
        return g

    x = (X / 9).requires_grad_()
    for d, cut in [(2, (15, 0, 9)), (3, (9, 11))]:
        T.hold(run, [x], [T.shard(d, cut)], (len(cut),))


# what is sent, and who computes what ------------------------------------------------------------


def traced(layer, n, d, size, m, k):
    """(bytes that a rank sends both ways, the most modes of an einsum, messages forward)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 3, size, size, dtype=D, generator=generator)
    w = torch.randn(3, 3, 2 * m, k, dtype=C, generator=generator).requires_grad_()
    x = st.distribute_tensor(x, T.make_mesh((n,)), [Shard(d)], src_data_rank=None).requires_grad_()
    with st.trace() as t:
        y = layer(x, w, m, k)
    sent = len(t.sent)
    assert y._spec == x._spec
    with st.trace() as back:
        y.square().sum().backward()
    return t.bytes + back.bytes, sent


@pytest.mark.parametrize("layer", [corners, like, shifted], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "n, d, m, k", [(2, 2, 6, 6), (4, 2, 2, 4), (4, 2, 2, 6), (4, 2, 6, 6), (4, 3, 2, 4)]
)
def test_bytes(layer, n, d, m, k):
    """Few modes are summed and many are sliced from whole columns, as st.spectral does."""
    args = n, d, 32, m, k
    most = max(r[0] for r in st.simulate(n, traced, spectral, *args, transport="plain"))
    found = st.simulate(n, traced, layer, *args, transport="plain")
    assert max(r[0] for r in found) <= 1.1 * most
    # to agree on zeros; two sums and all modes; or columns, twice dealt, placed, and of the result
    assert max(r[1] for r in found) <= 7


def test_all_ranks_have_modes():
    def run():
        x = torch.randn(1, 3, 64, 20, dtype=D)
        x = st.distribute_tensor(x, T.make_mesh((4,)), [Shard(2)], src_data_rank=None)
        y = torch.fft.rfft2(x)
        for part in (y[..., :6, :8], y[..., -6:, :8], y[..., :8, :3]):
            z = part * 2
            assert z._local.numel() * 4 == z.numel()
        # what one has more of one sign, it has less of the other
        both = [y[..., :6, :6] * 2, y[..., -6:, :6] * 2]
        assert sum(z._local.numel() for z in both) * 4 == sum(z.numel() for z in both)

    st.simulate(4, run)


def test_nothing_large_is_kept():
    """Of a layer and what it saves, a rank keeps its share; parameters are not counted."""

    def run(n):
        x = torch.randn(1, 16, 64, 32, dtype=D)
        w = torch.randn(16, 16, 8, 5, dtype=C).requires_grad_()
        if n > 1:
            x = st.distribute_tensor(x, T.make_mesh((n,)), [Shard(2)], src_data_rank=None)
        x.requires_grad_()
        return saved_bytes(lambda: torch.tanh(like(x, w, 4, 5) + x))

    alone = run(1)
    assert max(st.simulate(4, run, 4)) <= 1.05 * alone / 4


def test_compiled():
    def run():
        x = st.distribute_tensor(X, T.make_mesh((2,)), [Shard(2)], src_data_rank=None)
        layer = st.compile(like, backend="aot_eager", fullgraph=True)
        got = layer(x, W)
        assert torch.allclose(got.full_tensor(), like(X, W))
        with st.trace() as t:
            layer(x, W)
        # the modes of one sign, and of the other, and all of them back: half goes to the other rank
        assert t.bytes <= 2 * (3 + 2) * 4 * 3 * 16 // 2

    st.simulate(2, run)
