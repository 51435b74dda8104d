"""Views, indexing, joining: against plain torch; slices and views send nothing."""

import pytest
import torch
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64
x = torch.randn(2, 3, 8, 6, dtype=D)


def test_a_class_token_lies_on_the_first_shard():
    tokens, cls = torch.randn(2, 7, 4, dtype=D), torch.randn(2, 1, 4, dtype=D)
    specs = T.hold(
        lambda t, c: (y := torch.cat([c, t], 1), y[:, 0]), [tokens, cls], [T.shard(1, (4, 0, 3)), None], (3,)
    )  # fmt: skip
    assert specs[0].sizes == {1: (5, 0, 3)} and not specs[1].varying


def test_zero_sized():
    empty = torch.randn(2, 0, 4, dtype=D)
    T.hold(lambda a: a.reshape(2, 0, 2, 2).flatten(1), [empty], [T.shard(2)], (2,))
    T.hold(lambda a: (a.flatten(), a.view(1, 1)[0]), [x[0, 0, 0, 0]], [T.replicated()], (2,))
    T.hold(lambda a: a[:, :, 3:3].sum(), [x], [T.shard(2)], (3,))


def silent():
    mesh = T.make_mesh((2,))
    s = st.distribute_tensor(x, mesh, [Shard(2)], src_data_rank=None, sizes={2: (5, 3)})
    with st.trace() as t, st.fallback("error"):
        s[:, :, 1:-2].flatten(2).transpose(1, 2).unflatten(1, (-1, 6))
        s.split(3, 2), s[:, :, ::3], s.permute(2, 0, 1, 3).view(8, 6, 6)
        s.repeat_interleave(2, 2), torch.cat([s, s], 1), s.reshape(2, 3, 8, 2, 3)
    assert t.messages == 0
    with st.trace() as t:
        s.reshape(2, 3, 2, 4, 6)
    assert t.bytes in (0, 2 * 3 * 1 * 6 * 8)
    with st.trace() as t:
        s.roll(1, 2)
    return t.bytes


def test_what_is_sent():
    # one row of 2 x 3 x 6 numbers of 8 bytes to the right neighbour
    assert st.simulate(2, silent) == [288, 288]


def test_a_write_to_a_view_of_other_ranks_makes_its_base_unreadable():
    def write():
        mesh = T.make_mesh((2,))
        for view in (lambda s: s.flatten(1), lambda s: s.view(-1)):
            s = st.distribute_tensor(x, mesh, [Shard(2)])
            v = view(s)
            v.add_(1)
            T.same(v, view(x) + 1, "the view")
            with pytest.raises(st.UnsupportedOpError, match="a view of it"):
                s.sum()
        s = st.distribute_tensor(x, mesh, [Shard(2)])
        s.flatten(2).add_(1)
        s.unbind(2)[0].add_(1)
        T.same(s, torch.cat([x[:, :, :1] + 2, x[:, :, 1:] + 1], 2), "through a local view")

    st.simulate(2, write)


def test_dims_of_a_number_are_moved():
    def run():
        x = st.distribute_tensor(torch.arange(3.0), T.make_mesh((2,)), [Shard(0)]).sum()
        for y in (x.movedim(0, -1), x.transpose(0, -1), x.permute(())):
            assert y.shape == () and y.item() == 3

    st.simulate(2, run)


def test_a_flip_of_too_few_dims_is_refused_as_in_torch():
    def run():
        x = st.distribute_tensor(torch.arange(3.0), T.make_mesh((2,)), [Shard(0)])
        for fn, y in ((torch.flipud, x.sum()), (torch.fliplr, x)):
            with pytest.raises(RuntimeError, match="Input must be"):
                fn(y)

    st.simulate(2, run)
