"""Grid sampling over sharded images and sharded places against torch."""

import pytest
import torch
import torch.nn.functional as F
from cases.grid_sample import MODES, places, sampled
from drawn import drawn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import full, hold, make_mesh, shard
from shardtensor.rules.images import grid_sample


@pytest.mark.parametrize("dim", [2, 3])
def test_places_stay_sharded_as_the_image(dim):
    args = [drawn(2, 2, 7, 7), places(2, 4, 6, 2)]
    (spec,) = hold(sampled(*MODES[0]), args, [shard(dim, (3, 0, 4)), None], (3,))
    assert spec.dims[dim].axes == (0,)
    (spec,) = hold(F.affine_grid, [drawn(3, 2, 3), (3, 1, 4, 5)], [shard(0, (2, 1)), None], (2,))
    assert spec.dims[0].sizes == (2, 1)


def identity(n, h, w, align, dtype=torch.float64):
    theta = torch.eye(2, 3, dtype=dtype).expand(n, 2, 3)
    return F.affine_grid(theta, [n, 1, h, w], align)


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("size", [4, 5, 7, 8, 13])
def test_samples_on_rows_and_between(how, size):
    """Whole rows, whose slopes differ on both sides; halves, which round to even; the edges."""
    for step in (1.0, 0.5):
        at = torch.arange(-2.0, size + 1.5, step, dtype=torch.float64)
        at = 2 * at / (size - 1) - 1 if how[2] else (2 * at + 1) / size - 1
        for flip in (1, -1):
            g = torch.stack([torch.zeros_like(at), flip * at], -1).view(1, -1, 1, 2)
            args = [drawn(1, 2, size, 3), g]
            hold(sampled(*how), args, [shard(2), None], (3,))
            hold(sampled(*how), [args[0].mT, g.flip(-1)], [shard(3, (size - 1, 1)), shard(1)], (2,))


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("size", [7, 11, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_identity(align, size, dtype):
    """The first step of a spatial transformer: rounding alone decides the row below."""
    for dim in (2, 3):
        shape = [1, 2, 5, 5]
        shape[dim] = size
        g = identity(1, *shape[2:], align, dtype)
        args = [drawn(*shape).to(dtype), g]
        rtol = 1e-12 if dtype is torch.float64 else 5e-5
        hold(sampled("bilinear", "zeros", align), args, [shard(dim), None], (3,), rtol=rtol)
        hold(sampled("bilinear", "border", align), args, [shard(dim), shard(1)], (2,), rtol=rtol)


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("size", [7, 11])
def test_identity_of_volumes(align, size):
    args = [
        drawn(1, 1, size, 3, 3),
        F.affine_grid(torch.eye(3, 4).double()[None], [1, 1, size, 3, 3], align),
    ]
    hold(sampled("bilinear", "zeros", align), args, [shard(2), None], (2,))


@pytest.mark.parametrize("how", [m for m in MODES if m[1] == "zeros"])
def test_not_finite(how):
    g = places(1, 6, 1, 2)
    g[0, 1, 0, 1], g[0, 2, 0, 1], g[0, 4, 0, 1] = float("nan"), float("inf"), -float("inf")
    args = [drawn(1, 2, 6, 3), g]
    hold(sampled(*how), args, [shard(2), None], (3,), grad=False)


@pytest.mark.parametrize("how", [m for m in MODES if m[1] == "border" and m[0] != "bicubic"])
def test_infinities_are_clipped(how):
    g = places(1, 6, 1, 2)
    g[0, 2, 0, 1], g[0, 4, 0, 1] = float("inf"), -float("inf")
    hold(sampled(*how), [drawn(1, 2, 6, 3), g], [shard(2), None], (3,))


def far_away():
    mesh = make_mesh((2,))
    x = st.distribute_tensor(drawn(1, 1, 6, 3), mesh, [Shard(2)], src_data_rank=None)
    g = torch.tensor([[[[0.0, float("nan")], [0.0, 1e30]], [[0.0, -1e30], [0.0, 0.3]]]]).double()
    for padding in ("border", "reflection"):
        y = full(F.grid_sample(x, g, padding_mode=padding, align_corners=True))
        assert y.isnan().flatten().tolist() == [True, False, False, False]


def test_places_that_are_no_numbers_crash_nothing():
    st.simulate(2, far_away)


def test_batches_channels_and_small_images():
    for how in (MODES[0], MODES[3], MODES[14]):
        for d, sizes in ((0, (0, 3)), (1, (2, 0)), (0, (1, 2)), (2, (1, 0)), (3, (0, 1))):
            args = [drawn(3, 2, 1, 1), places(3, 4, 2, 2)]
            hold(sampled(*how), args, [shard(d, sizes), None], (2,))
            hold(sampled(*how), args, [shard(d, sizes), shard(1)], (2,))
        hold(sampled(*how), args, [None, shard(0, (0, 3))], (2,))
        hold(sampled(*how), args, [None, shard(3)], (2,))
    hold(sampled(*MODES[0]), [drawn(1, 1, 6, 5).float(), places(1, 4, 3, 2).float()],
         [shard(2), None], (2,))  # fmt: skip


def sent():
    mesh = make_mesh((4,))
    x = st.distribute_tensor(torch.ones(1, 3, 64, 8), mesh, [Shard(2)], src_data_rank=None)
    g = identity(1, 64, 8, False, torch.float32) + torch.tensor([0.5, 2 * 2.5 / 64])
    with st.trace() as t:
        F.grid_sample(x, g, align_corners=False)
    return [s.bytes for s in t.sent if s.collective == "window"]


def test_a_small_displacement_moves_few_rows():
    """Rows shifted by 2.5: the last of the four ranks' shards lends nothing, the others 3 rows."""
    rows = [sum(b) / (3 * 8 * 4) for b in st.simulate(4, sent)]
    assert rows == [0, 3, 3, 3]


@pytest.mark.parametrize("how", MODES)
def test_all_rows_of_a_small_image_come_where_a_look_would_wait(how, monkeypatch):
    """As on a GPU: nothing is told."""
    monkeypatch.setattr(grid_sample, "waits", lambda x: True)
    monkeypatch.setattr(grid_sample, "tell", None)
    for dim, cut in ((2, (3, 0, 4)), (3, (1, 6))):
        hold(
            sampled(*how),
            [drawn(2, 2, 7, 7), places(2, 4, 6, 2)],
            [shard(dim, cut), None],
            (len(cut),),
        )


def compiled():
    mesh = make_mesh((2,))
    for how in (MODES[0], MODES[9], MODES[16]):
        x, g = drawn(1, 2, 6, 4), places(1, 4, 3, 2)
        fn = st.compile(sampled(*how), backend="aot_eager")
        s = st.distribute_tensor(x, mesh, [Shard(2)], src_data_rank=None).requires_grad_()
        for more in (0.0, 0.3):
            want = sampled(*how)(x, g + more)
            assert torch.allclose(full(fn(s, g + more)), want)


def test_compiled():
    st.simulate(2, compiled)


def nameless():
    x = st.distribute_tensor(drawn(1, 2, 6, 4), make_mesh((2,)), [Shard(2)], src_data_rank=None)
    for way in ((-1, 0), (3, 0), (0, -9), (0, 3)):
        with pytest.raises(st.UnsupportedOpError, match="no name"):
            torch.grid_sampler(x, places(1, 4, 3, 2), *way, False)


def test_modes_that_have_no_name():
    st.simulate(2, nameless)
