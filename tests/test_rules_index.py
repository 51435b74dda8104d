"""x[...] and x[...] = v by slices, integers and tensors of indices; parts written back."""

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.spec import Spec
from shardtensor.tensor import wrap

torch.manual_seed(0)
D = torch.float64
x = torch.randn(8, 5, 3, dtype=D)
i = torch.tensor([6, -1, 0, 2, 3])
v = torch.randn(5, 5, 3, dtype=D)


def local():
    """A dim that no rank shares with another needs no message, few rows come whole."""
    mesh = T.make_mesh((2,))
    s = st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)
    with st.trace() as t:
        y = s[:, i % 5]
        s[:, [1, 2]] = 3.0
        s[1:, :, torch.tensor([[0, 2], [-3, 1]]) % 3] = 0.0
        s[i] = v
    assert not t.bytes and y.spec.varying == (0,)
    assert s[[3]].spec.varying == () and s[i].spec.varying == (0,)
    for out in (8, -9, (0, 5)):
        with pytest.raises(IndexError):
            s[out] = 1.0
    with pytest.raises(IndexError):
        s[[0.5]]
    with pytest.raises(IndexError):
        s[i, i, i, i]
    with pytest.raises(RuntimeError):
        s.slice_scatter(v, 0, 1, 2)


def test_local():
    st.simulate(2, local)


def rows_refused():
    mesh = T.make_mesh((2,))
    s = st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)
    row, other, same = s[1], s[2], s[1]
    row.add_(1)
    with pytest.raises(st.UnsupportedOpError, match="take it anew"):
        same.add_(1)
    other.add_(1)
    T.same(s[1:3], x[1:3] + 1, "rows")
    torch.sin(s[0], out=row)
    T.same(s[1], x[0].sin(), "row")
    nested = st.distribute_tensor(x.clone(), mesh, [Shard(0)], src_data_rank=None)[1]
    nested.add_(1)
    T.same(nested, x[1] + 1, "the base is gone")
    leaf = st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None).requires_grad_()
    with pytest.raises(RuntimeError, match="leaf"):
        leaf[1] += 1


def test_rows_that_were_written():
    st.simulate(2, rows_refused)


@pytest.mark.parametrize("cut", [None, 0, 1])
def test_an_index_may_be_in_addends(cut):
    """Which alone may be out of range."""
    rows, at = x[..., 0].clone(), torch.tensor([5, -1, 0])

    def run():
        mesh = T.make_mesh((2,))
        mine = at * 3 if mesh.get_local_rank() == 0 else at * -2
        n = wrap(mine, Spec.of(mesh, [Partial()], (3,)))
        where = [Replicate() if cut is None else Shard(cut)]
        s = st.distribute_tensor(rows, mesh, where, src_data_rank=None)
        values = st.distribute_tensor(v[:3, :, 0], mesh, [Shard(0)], src_data_rank=None)
        return s[n].full_tensor(), s.index_put((n,), values).full_tensor()

    for got, put in st.simulate(2, run):
        assert torch.equal(got, rows[at])
        assert torch.equal(put, rows.index_put((at,), v[:3, :, 0]))
