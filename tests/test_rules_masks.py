"""Masks, nonzero, repeats: results sharded in sizes that depend on values."""

import pytest
import torch
from cases.masks import SELECT, repeats, rows, whole, x
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor._torch.world import silent_world
from shardtensor.ranks.measure import peak_bytes
from shardtensor.rules.index import masks
from shardtensor.spec import Spec
from shardtensor.tensor import wrap

torch.manual_seed(0)
D = torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_dtypes(dtype):
    a = (3 * x).to(dtype)
    T.hold(
        lambda a, m: (
            a[m],
            a.masked_select(m[:, None, None]),
            a.nonzero(),
            a.repeat_interleave(repeats, 0),
            a.masked_scatter(m[:, None, None], a),
        ),
        [a, rows],
        [T.shard(0)] * 2,
        (2,),
    )


@pytest.mark.parametrize("cut", [(8,), (3, 5), (0, 7, 1), (2, 0, 0, 6)])
def test_a_whole_mask_is_counted_in_parts(cut, monkeypatch):
    monkeypatch.setattr(masks, "_SOME", 3)
    a, m = torch.randn(8, 2, dtype=D), torch.tensor([1, 0, 0, 1, 1, 0, 1, 1]).bool()
    for some in (m, ~m, m & False, m | True):
        T.hold(lambda a, m=some: a[m], [a], [T.shard(0, cut)], (len(cut),))


def test_a_whole_mask_takes_no_running_sum_of_all():
    n = 2**20
    with silent_world(1, 4):
        spec = Spec.of(T.make_mesh((4,)), [Shard(0)], (n,))
        a, m = wrap(torch.zeros(spec.local_shape), spec), torch.zeros(n, dtype=torch.bool)
        # it was 16 bytes an element
        assert peak_bytes(lambda: a[m]) < 2 * n


def test_results_stay_sharded():
    for fn, mask in (SELECT["x[rows]"], SELECT["repeats"]):
        (spec, *_) = T.hold(fn, [x, mask], [T.shard(0), T.shard(0)], (2,))
        assert spec.varying == (0,)
    (spec,) = T.hold(lambda m: m.nonzero(), [whole], [T.shard(0)], (2,))
    assert spec.sizes[0] == (int(whole[:4].sum()), int(whole[4:].sum()))


def small():
    mesh = T.make_mesh((2,))
    s = st.distribute_tensor(torch.tensor([1.0, 0.0]), mesh, [Shard(0)])
    assert s.sum().nonzero().shape == (1, 0) and len(torch.where(s.sum())) == 1
    assert s.sum().masked_select(torch.tensor(True)).shape == (1,)
    with pytest.raises(IndexError):
        s[torch.tensor([True])]
    with pytest.raises(RuntimeError):
        s.masked_scatter(torch.ones(2, dtype=torch.bool), torch.ones(1))
    with pytest.raises(RuntimeError):
        s[torch.tensor([True, False])] = torch.ones(2)
    with st.trace() as t:
        s[s > 0]
    assert [c.collective for c in t.sent] == ["all_gather"] and t.bytes == 8


def test_small():
    st.simulate(2, small)


def test_numbers_as_masks_of_an_index():
    index, mask = torch.tensor([2, 9, 0, -1]), torch.tensor([2, 0, 1, -3])
    fn = torch.ops.aten._unsafe_masked_index
    T.hold(
        lambda x, m: fn(x, m, [index], 0.5),
        [torch.arange(4.0), mask],
        [T.shard(0), T.shard(0)],
        (2,),
    )
