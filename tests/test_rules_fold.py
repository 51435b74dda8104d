"""Sliding blocks, rotations and max-unpooling against torch."""

import pytest
import torch
import torch.nn.functional as F
from cases.fold import unpooled
from drawn import drawn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import hold, shard


def test_columns_stay_sharded():
    columns = F.unfold(drawn(2, 3, 9, 6), 3)
    (spec,) = hold(F.fold, [columns, (9, 6), 3], [shard(2), None, None], (3,))
    assert spec.dims[2].axes == (0,)


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


def bad_index():
    x = st.distribute_tensor(drawn(1, 1, 4, 2), st.testing.make_mesh((2,)), [Shard(2)])
    index = torch.arange(8).view(1, 1, 4, 2)
    index[0, 0, 3, 1] = 99
    with pytest.raises(RuntimeError, match="invalid max index"):
        F.max_unpool2d(x, index, 2)


def test_an_index_outside_is_an_error_on_all_ranks():
    st.simulate(2, bad_index)


def compiled():
    mesh = st.testing.make_mesh((3,))
    x = drawn(2, 3, 7, 5)
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
