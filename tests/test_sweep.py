"""Where a task stops fitting: what is computed, what lies between, and what is not known."""

import pytest
import torch
from torch import nn

import shardtensor as st
from shardtensor.observe.network import DGX_H100
from shardtensor.plan.estimate import H100, Device, Layout, Task, estimate
from shardtensor.plan.sweep import scaled, sweep

SMALL = Device("small", 0.8 * 2**20, 1e12, {64: 1e13, 32: 1e13, 16: 1e14})


def net():
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 2, 3, padding=1))


@pytest.fixture(scope="module")
def plans():
    return st.plan(net, [(1, 2, 64, 32)], 2, SMALL, precisions=[None])


def test_a_sweep_says_what_is_computed_and_what_is_between(plans):
    task = plans.task
    found = sweep(task, plans[0], SMALL, DGX_H100, (0.3, 1, 2, 4), (1, 2, 4))
    # 0.3 of 64 rows is no size
    assert found.shapes == ((64, 32), (128, 64), (256, 128)) and found.devices == (1, 2, 4)
    for n in found.devices:
        for shape in found.shapes:
            point = found.at(n, shape)
            assert point.how == "computed"
            if n == 4:
                want = estimate(
                    Task(net, [(1, 2, *shape)]), scaled(plans[0].layout, n), SMALL, DGX_H100
                )
                assert point.peak == want.peak
    # half of the way in elements; and a number of devices of which no estimate was made
    between = found.at(2, (96, 107))
    low, high = found.at(2, (64, 32)).peak, found.at(2, (128, 64)).peak
    assert between.how == "interpolated" and high < between.peak < found.at(2, (256, 128)).peak
    middle = found.at(2, (80, 64)).peak
    assert middle == pytest.approx(low + (high - low) * (80 * 64 - 64 * 32) / (128 * 64 - 64 * 32))
    three = found.at(3, (128, 64))
    assert three.how == "interpolated"
    assert found.at(4, (128, 64)).peak < three.peak < found.at(2, (128, 64)).peak


def test_where_it_stops_fitting(plans):
    found = sweep(plans.task, plans[0], SMALL, DGX_H100, (1, 2, 4), (1, 2, 4))
    for n in (1, 2, 4):
        last = found.last(n, SMALL)
        sizes = found.sizes(240)
        after = sizes[sizes.index(last) + 1]
        assert found.at(n, last).peak <= SMALL.memory < found.at(n, after).peak
    assert found.last(1, SMALL) < found.last(2, SMALL) < found.last(4, SMALL)
    assert found.least((64, 32), SMALL) == 1 and found.least((256, 128), SMALL) is None
    assert found.last(4, H100) == (256, 128)
    # where there are some between, those that are computed
    assert found.least((180, 90), SMALL) == 3 and found.least((180, 90), SMALL, (1, 2, 4)) == 4


def test_what_is_refused_is_not_interpolated(plans):
    class Fixed(nn.Module):
        def forward(self, x):
            return x * self.weight

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64, 32))

    task = Task(Fixed, [(1, 2, 64, 32)])
    best = estimate(task, Layout(1, (2, 3), (2, 1)))
    found = sweep(task, best, H100, DGX_H100, (1, 2), (2,))
    assert found.at(2, (64, 32)).how == "computed"
    for size in ((70, 40), (128, 64)):
        assert not found.at(2, size).known and "refused" in found.at(2, size).how
    assert found.last(2, H100) == (64, 32)


@pytest.mark.parametrize(
    "data, cuts, devices, want",
    [
        (1, (4,), 8, (1, (8,))),
        (1, (2, 2), 2, None),
        (1, (1, 4), 8, (1, (1, 8))),
        (4, (2,), 4, (4, (1,))),
        (4, (2,), 6, (2, (3,))),
        (2, (3,), 12, (2, (6,))),
        (2, (2, 2), 1, (1, (1, 1))),
        (1, (1,), 6, (1, (6,))),
    ],
)
def test_the_same_way_to_cut_on_other_numbers(data, cuts, devices, want):
    dims = tuple(range(2, 2 + len(cuts)))
    found = scaled(Layout(data, dims, cuts), devices)
    assert found.ranks == devices and data % found.data == 0
    assert want is None or (found.data, found.cuts) == want
