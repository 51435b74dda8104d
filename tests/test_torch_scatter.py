"""torch_scatter's runs of rows on shards, against loops; the package itself has no build to test."""

from functools import wraps

import pytest
import torch
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.ops import torch_scatter

D = torch.float64
SIZES = [0, 3, 1, 0, 6, 2, 0, 0, 4, 1]
ENDS = torch.tensor([0, *SIZES]).cumsum(0)
ROWS = int(ENDS[-1])


def kernel(src, indptr, out=None):
    """It takes plain tensors, as one of the package's own."""
    if isinstance(src, st.ShardTensor):
        raise TypeError("a kernel of a ShardTensor")
    return src + 0 if out is None else out


@wraps(kernel)
def asked(*args):
    raise NotImplementedError


def reduced(rule, mean):
    def run(x, indptr):
        if isinstance(x, st.ShardTensor):
            return rule(asked, (x, indptr), {})
        if indptr.ndim == 2:
            ends = indptr.expand(len(x), -1)
            return torch.stack([run(a, b) for a, b in zip(x, ends, strict=True)])
        runs = [x[a:b] for a, b in zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True)]
        sums = torch.stack([r.sum(0) for r in runs])
        counts = indptr.diff().clamp(min=1).view(-1, *[1] * (x.ndim - 1))
        return sums / counts if mean else sums

    return run


CALLS = [reduced(torch_scatter.segment_sum, False), reduced(torch_scatter.segment_mean, True)]


@pytest.mark.parametrize("call", CALLS, ids=["sum", "mean"])
def test_runs_of_rows(call):
    x = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    for cut in [c for c in T.cuts(ROWS) if len(c) > 1]:
        T.hold(call, [x, ENDS], [T.shard(0, cut), None], (len(cut),))
    T.hold(call, [x, ENDS], [T.shard(0), T.shard(0)], (2,))
    T.hold(call, [x[:, 0], ENDS.int()], [T.shard(0), None], (3,))


@pytest.mark.parametrize("call", CALLS, ids=["sum", "mean"])
def test_samples(call):
    x = torch.randn(2, ROWS, 3, generator=torch.Generator().manual_seed(1), dtype=D)
    other = torch.tensor([0, *reversed(SIZES)]).cumsum(0)
    for ends in (torch.stack([ENDS, other]), ENDS[None]):
        T.hold(call, [x, ends], [T.shard(1, (12, 5)), None], (2,))
        T.hold(call, [x, ends], [T.shard(1), T.shard(1)], (3,))


def test_what_has_no_rule_is_the_package_s():
    def rank():
        x = torch.randn(2, ROWS, dtype=D, generator=torch.Generator().manual_seed(2))
        shard = st.distribute_tensor(x, T.make_mesh((2,)), [Shard(1)], src_data_rank=None)
        with pytest.raises(TypeError):
            torch_scatter.segment_sum(asked, (shard, torch.tensor([0, 1, 2])), {})
        with pytest.raises(TypeError):
            torch_scatter.segment_sum(asked, (shard, ENDS[None], shard), {})
        with pytest.raises(TypeError):
            torch_scatter.segment_sum(asked, (shard.long(), ENDS[None]), {})

    st.simulate(2, rank)
