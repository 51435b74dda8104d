"""Sliding blocks, rotations and max-unpooling against torch."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor.ranks.testing import On, cuts, hold, shard

BLOCKS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 1)},
    {"kernel_size": 3, "stride": 3, "padding": 2, "dilation": (2, 1)},
    {"kernel_size": (1, 2), "stride": (4, 2)},
    {"kernel_size": (5, 1), "padding": (4, 0), "stride": 2},
]


def image(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("how", BLOCKS)
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("sizes", cuts(9))
def test_unfold(how, dim, sizes):
    shape = [2, 3, 6, 6]
    shape[dim] = 9
    hold(F.unfold, [image(*shape)], [shard(dim, sizes)], (len(sizes),), kwargs=how)


@pytest.mark.parametrize("how", BLOCKS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("uneven", [False, True])
def test_fold(how, ranks, uneven):
    x = F.unfold(image(2, 3, 9, 6), **how)
    n = x.shape[-1]
    sizes = (1, *[0] * (ranks - 2), n - 1) if uneven else None
    specs = hold(F.fold, [x, (9, 6)], [shard(2, sizes), None], (ranks,), kwargs=how)
    assert specs[0].dims[2].axes == (0,)


@pytest.mark.parametrize("fn", [F.unfold, lambda x, **k: F.fold(x, (7, 5), **k)])
@pytest.mark.parametrize("place", [
    On([Shard(0), Shard(-1)]), On([Shard(1), Shard(-1)]), On([Shard(-1), Shard(-1)]),
    On([Shard(0), Shard(1)]), On([Replicate(), Shard(-1)]),
])  # fmt: skip
def test_two_axes(fn, place):
    x = image(2, 3, 7, 5)
    x = x if fn is F.unfold else F.unfold(x, 3, padding=1)
    hold(fn, [x], [place], (2, 2), kwargs={"kernel_size": 3, "padding": 1})


def test_rows_and_columns_and_small_ones():
    how = {"kernel_size": 3, "padding": 1}
    hold(F.unfold, [image(2, 7, 5)], [On([Shard(1), Shard(2)])], (2, 2), kwargs=how)
    hold(F.unfold, [image(2, 1, 5)], [shard(2, (1, 0, 4))], (3,), kwargs=how)
    hold(F.unfold, [image(2, 3, 4, 4)], [shard(0, (2, 0))], (2,), kwargs=how)
    hold(F.unfold, [image(2, 3, 4, 4)], [shard(1, (0, 3))], (2,), kwargs=how)
    hold(F.fold, [image(2, 27, 16), 4], [shard(1, (5, 22)), None], (2,), kwargs=how)
    hold(F.fold, [image(2, 27, 16), 4], [shard(0, (0, 2)), None], (2,), kwargs=how)
    hold(F.unfold, [image(2, 3, 8, 5).float()], [shard(2, (3, 5))], (2,), kwargs=how)


@pytest.mark.parametrize(("size", "step"), [(1, 1), (3, 1), (2, 2), (4, 3), (2, 5), (8, 1)])
@pytest.mark.parametrize("sizes", cuts(8))
def test_tensor_unfold(size, step, sizes):
    hold(
        lambda x: x.unfold(1, size, step), [image(2, 8, 3)], [shard(1, sizes)], (len(sizes),),
    )  # fmt: skip
    hold(lambda x: x.unfold(-1, 2, 1), [image(2, 8, 3)], [shard(1, sizes)], (len(sizes),))


@pytest.mark.parametrize("k", [-1, 0, 1, 2, 3])
def test_rot90(k):
    x = image(3, 5, 4)
    hold(lambda x: torch.rot90(x, k, (1, 2)), [x], [On([Shard(1), Shard(2)])], (2, 2))
    hold(lambda x: torch.rot90(x, k), [x], [shard(1, (1, 0, 4))], (3,))


def halo_bytes():
    mesh = st.testing.make_mesh((2,))
    x = st.distribute_tensor(torch.ones(1, 2, 8, 6), mesh, [Shard(2)], src_data_rank=None)
    with st.trace() as t:
        cols = F.unfold(x, 3, padding=1)
    with st.trace() as u:
        F.fold(cols, (8, 6), 3, padding=1)
    with st.trace() as none:
        F.fold(F.unfold(x, 2, stride=2), (8, 6), 2, stride=2)
        x.unfold(2, 2, 2)
    return t.bytes, u.bytes, none.bytes


def test_only_halos_are_sent():
    assert st.simulate(2, halo_bytes)[0] == (1 * 2 * 6 * 4, 1 * 2 * 6 * 4, 0)


def unpooled(x, kernel=2, stride=None, **more):
    fn, back = {
        3: (F.max_pool1d, F.max_unpool1d), 4: (F.max_pool2d, F.max_unpool2d),
        5: (F.max_pool3d, F.max_unpool3d),
    }[x.ndim]  # fmt: skip
    y, index = fn(x, kernel, stride, return_indices=True)
    return back(y, index, kernel, stride, **more)


@pytest.mark.parametrize(("shape", "dim"), [
    ((2, 3, 8), 2), ((2, 3, 8), 1), ((2, 8, 6), 0), ((2, 3, 8, 6), 2), ((2, 3, 6, 8), 3),
    ((2, 2, 4, 8, 6), 3), ((2, 2, 8, 4, 6), 2),
])  # fmt: skip
def test_max_unpool(shape, dim):
    for sizes in cuts(shape[dim]):
        hold(unpooled, [image(*shape)], [shard(dim, sizes)], (len(sizes),))
        if dim > 1:
            overlapping = {"kernel": 3, "stride": 1}
            hold(
                unpooled, [image(*shape)], [shard(dim, sizes)], (len(sizes),), kwargs=overlapping
            )  # fmt: skip


@pytest.mark.parametrize("dims", [(2, 3), (0, 2), (2, 2), (3, 3)])
def test_max_unpool_two_axes(dims):
    x = image(2, 3, 10, 8)
    hold(unpooled, [x], [On([Shard(d) for d in dims])], (2, 2))
    hold(
        unpooled, [x], [On([Replicate(), Shard(dims[1])])], (2, 2), kwargs={"output_size": (11, 9)}
    )
    index = torch.randperm(40).view(1, 1, 8, 5)
    hold(
        lambda x, i: F.max_unpool2d(x, i, 2, output_size=(16, 10)), [image(1, 1, 8, 5), index],
        [On([Shard(d) if d > 1 else Replicate() for d in dims]), None], (2, 2),
    )  # fmt: skip


def bad_index():
    x = st.distribute_tensor(image(1, 1, 4, 2), st.testing.make_mesh((2,)), [Shard(2)])
    index = torch.arange(8).view(1, 1, 4, 2)
    index[0, 0, 3, 1] = 99
    with pytest.raises(RuntimeError, match="invalid max index"):
        F.max_unpool2d(x, index, 2)


def test_an_index_outside_is_an_error_on_all_ranks():
    st.simulate(2, bad_index)


def compiled():
    mesh = st.testing.make_mesh((3,))
    x = image(2, 3, 7, 5)
    blocks = {"kernel_size": 3, "padding": 1}
    fns = [
        lambda x: F.unfold(x, **blocks),
        lambda x: F.fold(F.unfold(x, **blocks), (7, 5), **blocks),
        lambda x: x.unfold(2, 3, 2),
        lambda x: unpooled(x, output_size=(7, 5)),
    ]
    for fn in fns:
        s = st.distribute_tensor(x, mesh, [Shard(2)], src_data_rank=None).requires_grad_()
        out = st.compile(fn, backend="aot_eager")(s)
        out.square().sum().backward()
        plain = x.clone().requires_grad_()
        want = fn(plain)
        want.square().sum().backward()
        assert torch.allclose(out.full_tensor(), want)
        assert torch.allclose(s.grad.full_tensor(), plain.grad)


def test_compiled():
    st.simulate(3, compiled)
