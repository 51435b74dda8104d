"""A plain tensor that takes a sharded part becomes sharded, or takes the whole of it."""

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import nn
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T

D = torch.float64
X = torch.randn(2, 3, 9, 5, dtype=D)


def blocks(x):
    """The two blocks of modes of a Fourier layer."""
    out = torch.zeros(2, 3, 12, 7, dtype=x.dtype)
    out[:, :, :4, :5] = x[:, :, :4] * 2
    out[:, :, -4:, :5] = x[:, :, -4:] * 3
    return out + 1


def rows(x):
    out = x.new_zeros(1) + torch.zeros(2, 9, 5, dtype=x.dtype)
    plain = torch.empty(2, 9, 5, dtype=torch.float64)
    plain[...] = x[:, 0]
    plain[1, 3] = x[0, 1, 3] * 2
    return plain * 2 + out


@pytest.mark.parametrize("fn", [blocks, rows])
@pytest.mark.parametrize("cut", T.cuts(9))
def test_values_and_gradients(fn, cut):
    T.hold(fn, [X], [T.shard(2, cut)], (len(cut),))


@pytest.mark.parametrize("fn", [blocks, rows])
def test_placements(fn):
    for place in (
        [Shard(2), Shard(3)],
        [Shard(2), Shard(2)],
        [Shard(0), Shard(2)],
        [Replicate(), Shard(3)],
    ):
        T.hold(fn, [X], [T.On(place)], (2, 2))


def kinds():
    x = st.distribute_tensor(X, T.make_mesh((2,)), [Shard(2)], src_data_rank=None)
    value = x[0, 0]

    def taken():
        out = torch.zeros(9, 5, dtype=D)
        out[:] = value
        return out

    out = taken()
    assert isinstance(out, st.ShardTensor) and out.spec.dims[0].sizes == (5, 4)

    # what something else can see, or needs to stay plain, takes the whole value
    def stays(out, seen=None):
        with st.trace() as t:
            out[:] = value
        assert not isinstance(out, st.ShardTensor) and t.gathered
        assert torch.equal(out, X[0, 0]) and (seen is None or np.allclose(seen, X[0, 0]))

    array = np.zeros((9, 5))
    stays(torch.from_numpy(array), array)
    out = torch.zeros(9, 5, dtype=D)
    stays(out, out.numpy())
    out = torch.zeros(9, 5, dtype=D)
    stays(out, out.view(9, 5))
    with torch.no_grad():
        out = torch.zeros(9, 5, dtype=D)
        stays(out, out.view(9, 5))
    out = torch.zeros(9, 5, dtype=D)
    held = [out]
    out[:] = value
    assert not isinstance(held[0], st.ShardTensor)
    module = nn.Module()
    module.register_buffer("kept", torch.zeros(9, 5, dtype=D))
    module.kept[:] = value
    assert not isinstance(module.kept, st.ShardTensor) and torch.equal(module.kept, X[0, 0])
    grows = torch.zeros(9, 5, dtype=D, requires_grad=True) * 1
    grows[:] = value
    assert not isinstance(grows, st.ShardTensor)


def several():
    """As an adaptive Fourier layer: each of a function's tensors, and rows of another dim."""
    x = st.distribute_tensor(X, T.make_mesh((2,)), [Shard(2)], src_data_rank=None)
    value = x[0, 0]

    def filtered():
        real, imaginary = torch.zeros(9, 5, dtype=D), torch.zeros(9, 5, dtype=D)
        both = torch.zeros(9, 5, 2, dtype=D)
        real[2:7, :3] = value[2:7, :3]
        imaginary[2:7, :3] = value[2:7, :3] * 2
        for i, part in enumerate((real, imaginary)):
            both[..., i] = part
        return real, imaginary, both

    with st.trace() as t:
        found = filtered()
    assert all(isinstance(y, st.ShardTensor) for y in found) and not t.gathered
    want = torch.zeros(9, 5, dtype=D)
    want[2:7, :3] = X[0, 0, 2:7, :3]
    assert torch.equal(found[2].full_tensor(), torch.stack((want, want * 2), -1))

    def listed():
        out = torch.zeros(9, 5, dtype=D)
        names = locals()
        out[:] = value
        return names

    assert "out" in listed()


def test_each_tensor_of_a_function():
    st.simulate(2, several)


@pytest.mark.filterwarnings("ignore::shardtensor.FallbackWarning")
def test_what_stays_plain():
    st.simulate(2, kinds)


def test_nothing_is_gathered():
    def run():
        x = st.distribute_tensor(X, T.make_mesh((2,)), [Shard(2)], src_data_rank=None)
        with st.fallback("error"), st.trace() as t:
            out = torch.zeros(2, 3, 9, 5, dtype=D)
            out[...] = x
        return t.bytes

    assert st.simulate(2, run) == [8, 8]


def branches(x):
    return x if x.sum() > 0 else -x


def test_after_a_program_that_dynamo_refused():
    """Every later call in the process holds its arguments once more."""
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(branches, backend="eager", fullgraph=True)(torch.ones(3))
    test_nothing_is_gathered()
    test_what_stays_plain()
    test_each_tensor_of_a_function()


def guarded_writes():
    whole = torch.arange(X.numel(), dtype=D).reshape(X.shape).sin()
    x = st.distribute_tensor(whole, T.make_mesh((2,)), [Shard(2)], src_data_rank=None)
    with st.guard(20.0):
        T.same(blocks(x), blocks(whole), "blocks")
        T.same(rows(x), rows(whole), "rows")


def test_writes_into_plain_tensors_under_the_guard():
    T.run_workers(2, guarded_writes)


class Passing(torch.overrides.TorchFunctionMode):
    """A user's mode, of which nobody knows what it keeps."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def under_default_device():
    x = st.distribute_tensor(X, T.make_mesh((2,)), [Shard(2)], src_data_rank=None)[0]

    def filled(keep):
        out = torch.zeros(3, 9, 5, dtype=D)
        kept = (out,) if keep else ()
        out[:, 1:] = x[:, 1:]
        return type(kept[0] if keep else out), T.full(out)

    nodes = x[:, :, 0].t().contiguous()
    ends = st.distribute_tensor(torch.arange(20) % 9, T.make_mesh((2,)), [Shard(0)])

    def added(keep):
        values = nodes[ends]
        out = torch.zeros(9, 3, dtype=D)
        kept = [out] if keep else []
        out.index_add_(0, ends, values)
        return type(kept[0] if keep else out), T.full(out)

    def indexed(keep):
        values = nodes[ends]
        out = torch.zeros(9, 3, dtype=D)
        kept = [out] if keep else []
        out[ends] = values
        return type(kept[0] if keep else out), T.full(out)

    with torch.device("cpu"):
        kinds = [fn(keep) for fn in (filled, added, indexed) for keep in (False, True)]
        with Passing():
            kinds += [filled(False)]
        one = torch.zeros(3, 9, 5, dtype=D)
        two = one
        one[:, :, 0] = x[:, :, 0]
    return kinds, two is one, T.full(one)


def test_under_a_default_device():
    want = X[0].clone()
    want[:, 0] = 0
    for kinds, same, one in st.simulate(2, under_default_device):
        found = [kind for kind, _ in kinds]
        assert found == [*[st.ShardTensor, torch.Tensor] * 3, torch.Tensor]
        for i in (0, 1, 6):
            assert torch.equal(kinds[i][1], want)
        for i in (2, 3):
            times = torch.tensor([3.0, 3, *[2] * 7], dtype=D)[:, None]
            torch.testing.assert_close(kinds[i][1], X[0, :, :, 0].t() * times)
            assert torch.equal(kinds[i + 2][1], X[0, :, :, 0].t())
        assert same and torch.equal(one[:, :, 0], X[0, :, :, 0])
