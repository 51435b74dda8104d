"""Faults of kinds that ops on global tensors cannot have, planted: `check` names module, op and cause."""

import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.tensor import wrap

HERE = Path(__file__).name


def local(x):
    return x.to_local() if isinstance(x, st.ShardTensor) else x


def again(part, x):
    """A part of the same layout as a ShardTensor."""
    if not isinstance(x, st.ShardTensor):
        return part
    return st.ShardTensor.from_local(part, x.device_mesh, x.placements, sizes=x.spec.sizes)


class Doubled(torch.autograd.Function):
    """Its backward reads the rows of this rank only: a mean of the gradient over its shard."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return 2 * g + again(local(g) - local(g).mean(2, keepdim=True), g)


class WrongBackward(nn.Module):
    def forward(self, x):
        return Doubled.apply(x)


class LocalMean(nn.Module):
    def forward(self, x):
        return x - local(x).mean()


class Ranked(nn.Module):
    """State that each rank has its own of."""

    def forward(self, x):
        gain = 1.0
        if isinstance(x, st.ShardTensor):
            gain += 0.1 * x.device_mesh.get_local_rank()
        return x * gain


class LocalNorm(nn.Module):
    """Statistics of the shard."""

    def forward(self, x):
        part = local(x)
        part = (part - part.mean((2, 3), keepdim=True)) * 0.5
        return again(part, x)


class LocalPositions(nn.Module):
    """Positions that each rank counts from its first row."""

    def forward(self, x):
        rows = torch.arange(local(x).shape[2], dtype=x.dtype).view(1, 1, -1, 1)
        return again(local(x) + rows, x)


class LocalSize(nn.Module):
    def forward(self, x):
        return x / local(x).shape[2]


def library(**functions):
    """Functions in a module, as a library has them."""
    made = types.ModuleType("a_library_with_faults")
    for name, fn in functions.items():
        fn.__module__, fn.__qualname__, fn.__name__ = made.__name__, name, name
        setattr(made, name, fn)
    sys.modules[made.__name__] = made
    return made


class Smoothed(nn.Module):
    """Calls a function of a library for which the user wrote a rule."""

    def forward(self, x):
        return sys.modules["a_library_with_faults"].smooth(x)


class Pooled(nn.Module):
    def forward(self, x):
        return x + sys.modules["a_library_with_faults"].pool(x)


class Offset(nn.Module):
    """Positions of the right number that begin at the shard's first row."""

    def forward(self, x):
        rows = torch.arange(x.shape[2], dtype=x.dtype)
        if isinstance(x, st.ShardTensor):
            rows = rows - x.spec.spans[2][0]
        return x + rows.view(1, 1, -1, 1)


def smooth(x):
    return F.avg_pool2d(x, (3, 1), 1, (1, 0), count_include_pad=False)


def pool(x):
    return x.sum((2, 3), keepdim=True)


@pytest.fixture
def faulty_rules():
    library(smooth=smooth, pool=pool)

    @st.rule("a_library_with_faults.smooth")
    def rows_of_neighbours(x):
        """Its halo is one row short at the end of each shard."""
        (a, b), n = x.spec.spans[2], x.shape[2]
        whole = x.full_tensor()
        lo, hi = max(0, a - 1), min(n, b)
        part = smooth(whole[:, :, lo:hi])[:, :, a - lo : b - lo]
        return wrap(part, x.spec)

    @st.rule("a_library_with_faults.pool")
    def sum_of_shards(x):
        """Says that its addends are whole."""
        part = x.to_local().sum((2, 3), keepdim=True)
        whole = st.distribute_tensor(torch.zeros(*x.shape[:2], 1, 1, dtype=x.dtype), x.device_mesh)
        return wrap(part, whole.spec)

    yield
    del sys.modules["a_library_with_faults"]


def found(fault):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), fault, nn.Conv2d(4, 2, 1))
    x = torch.randn(2, 2, 9, 4)
    report = st.check(model, x, [Shard(2)], [(3,)])
    assert not report.ok and report.verdict == "wrong", str(report)
    assert all(f.module == "2" for f in report.findings if not f.ok), str(report)
    assert repr(report) == str(report)
    return report.findings[0]


FAULTS = {
    "a mean of to_local()": (LocalMean, "the size of this rank's shard"),
    "state of a rank": (Ranked, "right on the first rank only"),
    "statistics of a shard": (LocalNorm, "the size of this rank's shard"),
    "positions counted from the shard's start": (LocalPositions, "the size of this rank's shard"),
    "positions that begin at the shard": (Offset, "right on the first rank only"),
    "a size of the shard": (LocalSize, "size of this rank's shard"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_values_of_a_rank(name):
    fault, cause = FAULTS[name]
    f = found(fault())
    assert cause in f.advice and HERE in f.line, str(f)


def test_a_backward_that_reads_its_shard():
    f = found(WrongBackward())
    assert "output of 1" in f.what and "torch.autograd.Function" in f.advice, str(f)


def test_a_halo_that_is_short_by_one(faulty_rules):
    f = found(Smoothed())
    assert "1 rows at the edges of shards" in f.advice and "rows_of_neighbours" in f.advice, str(f)


def test_addends_that_a_rule_calls_whole(faulty_rules):
    f = found(Pooled())
    assert "their sum is missing" in f.advice and "sum_of_shards" in f.advice, str(f)
