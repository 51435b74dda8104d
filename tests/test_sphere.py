"""The boundary of the sphere on sharded grids against plain tensors and against harmonics."""

import math

import pytest
import torch
import torch_harmonics
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.ops.sphere import pad_sphere

torch.manual_seed(0)
D = torch.float64
PADS = [(1, 2, 3, 0), (0, 3, 1, 1), (4, 4, 0, 0), (0, 0, 2, 5), (0, 0, 0, 0), (5, 1, 6, 6)]


def grid(rows, columns, poles):
    """Colatitude and longitude, with or without the poles."""
    lat = (
        torch.linspace(0, math.pi, rows, dtype=D)
        if poles
        else ((torch.arange(rows, dtype=D) + 0.5) * math.pi / rows)
    )
    return lat, torch.arange(columns, dtype=D) * 2 * math.pi / columns


@pytest.mark.parametrize("poles", [False, True])
def test_smooth_fields_continue(poles):
    """A polynomial in x, y, z, and the wind of a solid rotation, continued by their formulas."""
    lat, lon = grid(7, 8, poles)
    north, south, west, east = 3, 2, 4, 1
    step = lat[1] - lat[0]
    wide_lat = torch.cat([
        lat[0] - step * torch.arange(north, 0, -1), lat, lat[-1] + step * torch.arange(1, south + 1)
    ])  # fmt: skip
    wide_lon = torch.arange(-west, 8 + east, dtype=D) * 2 * math.pi / 8

    def field(lat, lon):
        a, b = torch.meshgrid(lat, lon, indexing="ij")
        x, y, z = a.sin() * b.cos(), a.sin() * b.sin(), a.cos()
        return x * y + 2 * z * x - 0.3 * y + z**3

    def wind(lat, lon):
        """The components of (0.3, -0.5, 0.7) cross r along longitude and latitude."""
        a, b = torch.meshgrid(lat, lon, indexing="ij")
        u = 0.7 * a.sin() - a.cos() * (0.3 * b.cos() - 0.5 * b.sin())
        return torch.stack([u, -0.3 * b.sin() - 0.5 * b.cos()])

    got = pad_sphere(field(lat, lon), (north, south, west, east), poles=poles)
    assert torch.allclose(got, field(wide_lat, wide_lon), atol=1e-12)
    got = pad_sphere(wind(lat, lon), (north, south, west, east), sign=-1, poles=poles)
    # in the formulas the unit vectors turn around beyond a pole by themselves: same numbers
    want = wind(wide_lat, wide_lon)
    assert torch.allclose(got, want, atol=1e-12), (got - want).abs().max()


@pytest.mark.parametrize("poles", [False, True])
def test_one_dim(poles):
    x = torch.randn(2, 3, 7, 6, dtype=D)
    for d in (2, 3):
        for cut in [*T.cuts(x.shape[d]), *([(0, 2, 5), (0, 7, 0)] if d == 2 else [(0, 5, 1)])]:
            for pad in PADS:

                def fn(x, p=pad):
                    return pad_sphere(x, p, sign=-1, poles=poles)

                T.hold(fn, [x], [T.shard(d, cut)], (len(cut),))


def test_two_dims_and_other_orders():
    x, sign = torch.randn(2, 7, 6, dtype=D), torch.tensor([1.0, -1.0], dtype=D)[:, None, None]
    for on in [
        T.On([Shard(1), Shard(2)], {1: (1, 6), 2: (4, 2)}), T.On([Shard(2), Shard(1)]),
        T.On([Shard(1), Shard(1)], {1: (1, 2, 0, 4)}), T.On([Shard(2), Shard(2)]),
        T.On([Replicate(), Shard(1)]), T.On([Shard(0), Shard(1)]),
    ]:  # fmt: skip
        for pad in PADS:
            T.hold(lambda x, s, p=pad: pad_sphere(x, p, sign=s), [x, sign], [on, None], (2, 2))
    y = torch.randn(6, 5, 7, dtype=D)
    T.hold(lambda y: pad_sphere(y, (2, 1, 1, 3), dims=(2, 0)), [y], [T.shard(2)], (3,))
    T.hold(lambda y: pad_sphere(y, (2, 1, 1, 3), dims=(2, 0)), [y], [T.shard(0)], (3,))


@pytest.mark.parametrize("d, rows", [(2, 0), (3, 4)])
def test_only_the_pad_is_sent(d, rows):
    """Latitude sharded: nothing. Longitude sharded: the pad's rows, half turned, and its columns."""

    def sent():
        x = torch.randn(1, 3, 32, 16)
        x = st.distribute_tensor(x, T.make_mesh((2,)), [Shard(d)], src_data_rank=None)
        with st.trace() as t:
            pad_sphere(x, (2, 2, 1, 1))
        return t.bytes

    columns = 36 if d == 3 else 0
    assert st.simulate(2, sent) == [4 * 3 * (rows * 8 + columns)] * 2


@pytest.mark.parametrize("pad, shape", [((1, 0, 0, 0), (4, 5)), ((5, 0, 0, 0), (4, 6)),
                                        ((0, 0, 7, 0), (4, 6)), ((0, -1, 0, 0), (4, 6))])  # fmt: skip
def test_too_much_raises(pad, shape):
    with pytest.raises(ValueError, match="pad_sphere"):
        pad_sphere(torch.randn(shape), pad)
    with pytest.raises(ValueError, match="dims"):
        pad_sphere(torch.randn(4, 6), (1, 1, 0, 0), dims=(0, 3))


@pytest.mark.parametrize("d", [2, 3])
def test_torch_harmonics(d):
    """Its scalar and vector transforms, unmodified, there and back."""
    x = torch.randn(2, 2, 8, 16, dtype=torch.float64)
    for grid in ("equiangular", "legendre-gauss"):
        for kinds in (("RealSHT", "InverseRealSHT"), ("RealVectorSHT", "InverseRealVectorSHT")):
            there, back = (getattr(torch_harmonics, k)(8, 16, grid=grid).double() for k in kinds)
            for cut in T.cuts(x.shape[d]):
                T.hold(
                    lambda x, there=there, back=back: back(there(x)), [x], [T.shard(d, cut)],
                    (len(cut),), rtol=1e-11,
                )  # fmt: skip
