"""What compile asks of classes, and what a process shares, does not change what a program does."""

import os

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.compile import guards
from shardtensor.ranks.testing import make_mesh


class Settings:
    """Its class may have what compile looks at attributes by."""

    def __init__(self):
        self.scale = 2.0


class Guarded(Settings):
    def __setattr__(self, name, value):
        object.__setattr__(self, name, value)


class Asking(nn.Module):
    """Reads a class, by names that may be those."""

    def __init__(self, settings):
        super().__init__()
        self.settings = settings()

    def forward(self, x):
        kind = type(self.settings)
        if hasattr(kind, "__setattr__") and kind.__getattribute__ is not None:
            x = x * self.settings.scale
        return x * getattr(kind, "factor", 1)


def asked(settings):
    mesh = make_mesh((2,))
    compiled = st.compile(Asking(settings), backend="eager", fullgraph=True)
    found = []
    for factor in (1, 1, 1, 3, 3):
        settings.factor = factor
        x = torch.ones(4, 4, dtype=torch.float64)
        y = compiled(st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None))
        found.append((float(y.sum()), compiled.traces))
    return found


@pytest.mark.parametrize("settings", [Settings, Guarded])
def test_a_class_is_as_it_was_though_it_was_looked_at(settings):
    for found in st.simulate(2, asked, settings):
        assert found == [(32.0, 1), (32.0, 1), (32.0, 1), (96.0, 2), (96.0, 2)]
    del settings.factor


KINDS = {}


class Cached(nn.Module):
    """Keeps in a global of the process what it found out of a type."""

    def forward(self, x):
        if type(x) not in KINDS:
            KINDS[type(x)] = 2
        return (x * KINDS[type(x)]).sum(0)


def test_ranks_of_one_process_that_share_a_cache_run_alike():
    KINDS.clear()

    def run():
        x = torch.ones(4, 4, dtype=torch.float64)
        s = st.distribute_tensor(x, make_mesh((2,)), [Shard(0)], src_data_rank=None)
        compiled = st.compile(Cached(), backend="eager")
        return [(compiled(s).tolist(), compiled.traces) for _ in range(3)]

    for found in st.simulate(2, run):
        assert found == [([8.0] * 4, n) for n in (0, 1, 1)]


class Scales:
    k = 1e300


TABLE = {"k": 2.0}


class Scaled(nn.Module):
    def forward(self, x):
        return x * float(os.environ["SCALE"]) * TABLE["k"] * Scales.k


def compared_in_full():
    """How many of the calls after the first compare all that was read one by one."""
    os.environ["SCALE"], TABLE["k"], Scales.k = "2", 2.0, 1e300
    fn = st.compile(Scaled(), backend="eager")
    x = st.distribute_tensor(torch.ones(4, 4), make_mesh((1,)), [Shard(0)])
    found = [fn(x)]
    # equal, but other objects
    os.environ["SCALE"], TABLE["k"], Scales.k = "".join(["2"]), float("2"), float("1e300")
    with pytest.MonkeyPatch.context() as patch:
        times, changed = [], guards.Reads.changed
        patch.setattr(guards.Reads, "changed", lambda self: times.append(1) or changed(self))
        found += [fn(x) for _ in range(5)]
    assert fn.traces == 1 and all(torch.equal(y.to_local(), found[0].to_local()) for y in found)
    return len(times)


def test_equal_state_is_compared_once():
    assert st.simulate(1, compared_in_full) == [1]
