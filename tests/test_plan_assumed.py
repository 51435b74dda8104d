"""A plan says what it takes for values that it does not know, and at which line."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.plan.estimate import Layout, Task, estimate

# of x (12, 4), whose rows are cut, and of indices that it decides: what is told, and what does it
TOLD = {
    "__getitem__: indices are taken to name no row twice, and rows of all ranks evenly": (
        lambda x, i: x[i[:, 0]]
    ),
    "gather: indices are taken to name rows of all ranks evenly": lambda x, i: x.gather(0, i),
    "segment_reduce: other ranks are taken to ask for as many rows as this one asks of them": (
        lambda x, i: torch.segment_reduce(x, "sum", lengths=torch.tensor([5, 7]))
    ),
    "sort: elements are taken to go to all ranks evenly": (
        lambda x, i: x[:, 0].repeat(5000).sort().values
    ),
    "grid_sampler: samples are taken to lie less than a row from their place": (
        lambda x, i: F.grid_sample(x[None, None], x[None, :, None, :2], align_corners=True)
    ),
    "grid_sampler: samples are taken to lie in all rows": (
        lambda x, i: F.grid_sample(x[None, None], x[None, ::3, None, :2], align_corners=True)
    ),
    "max_unpool2d: rows are taken to fall where they were pooled from": (
        lambda x, i: F.max_unpool2d(*F.max_pool2d(x[None, None], 2, return_indices=True), 2)
    ),
    "quantile: any is taken to be False": lambda x, i: x.quantile(0.5, 0),
    "masked_scatter: a number that is read is taken to be 0": (
        lambda x, i: torch.zeros_like(x).masked_scatter(x > 0, x)
    ),
}  # fmt: skip


class Of(nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op, self.scale = op, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.op(x * self.scale, (x * 5).long())


def planned(op, ranks=2):
    return estimate(Task(lambda: Of(op), [(12, 4)], dims=(0,)), Layout(1, (0,), (ranks,)))


@pytest.mark.parametrize("what", TOLD)
def test_what_is_taken_is_told_with_its_line(what):
    op, found = TOLD[what], planned(TOLD[what])
    line = f"{op.__code__.co_filename}:{op.__code__.co_firstlineno}"
    assert not found.refused and found.assumed == (f"{what} ({line})",)


def test_nothing_is_told_of_what_is_known():
    table = torch.arange(12).flip(0)
    assert planned(lambda x, i: torch.ones(12, 4)[table] + x.roll(1, 0)).assumed == ()
    counted = planned(lambda x, i: x.sum() * i[:, 0].bincount(minlength=5))
    assert not counted.refused and counted.assumed == ()
    assert len([s for s in counted.sent if s.op == "aminmax"]) == 2


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "op", [lambda x, i: x * i[:, 0].bincount().sum(), lambda x, i: F.one_hot(i[:, 0]) * x.sum()]
)
def test_sizes_that_values_decide_are_refused_alike(op, ranks):
    assert "depends on values" in planned(op, ranks).refused


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_samples_near_their_place(plain_transport, mode, padding):
    """Of samples that lie less than a row from it what is fetched is what a plan takes."""
    shift = torch.tensor([-0.9, 0.9]).repeat(6)[:, None]

    def op(x, y):
        rows = torch.arange(12) + y[:, 0] * 0
        at = (2 * (rows + shift[:, 0] * x[:, 0].detach().exp() ** 0) + 1) / 12 - 1
        at = torch.stack([at * 0, at], -1)[None, :, None]
        return F.grid_sample(x[None, None], at, mode, padding, align_corners=False)

    def step():
        mesh = T.make_mesh((3,))
        x = st.distribute_tensor(torch.rand(12, 4), mesh, [Shard(0)])
        with st.trace() as t:
            Of(op)(x).square().mean().backward()
        return [(s.collective, s.bytes) for s in t.sent if s.op == "grid_sampler"]

    sent = [(s.collective, s.bytes) for s in planned(op, 3).sent if s.op == "grid_sampler"]
    assert sent == st.simulate(3, step)[1] and any(n for c, n in sent if c == "window")


def test_what_is_refused_is_told_once(caplog):
    """By its row, not by torch's log of what fails without memory, too."""
    found = planned(lambda x, i: torch.view_as_complex(x.bfloat16().view(12, 2, 2)))
    assert "BFloat16" in found.refused and not caplog.records
