"""Tables that functions of others keep (functools.lru_cache) outlive a plan as they were made."""

import copy
import functools
import gc
import sys
import types

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import shardtensor as st
from shardtensor.plan.estimate import Layout, Task, estimate
from shardtensor.plan.step import caches, collector


@functools.lru_cache
def table(n):
    return torch.linspace(0, 1, n)


def copied(f):
    kept = functools.lru_cache(maxsize=20)(f)
    return lambda *args: copy.deepcopy(kept(*args))


@copied
def weights(n):
    return torch.ones(n), {"scale": torch.full((n,), 2.0)}


class Tables:
    @staticmethod
    @functools.cache
    def shared(n):
        return torch.arange(n)


@functools.lru_cache
def number(n):
    return n + 1


class Scaled(nn.Module):
    """reads: the constructor needs values, so that it runs a second time, for real."""

    def __init__(self, reads):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.register_buffer("at", table(8).clone())
        if reads:
            # C++ of others reads memory as this does
            self.at.data_ptr()
            self.first = bytes(self.at.numpy())

    def forward(self, x):
        ones, more = weights(8)
        return self.conv(x) * (self.at + ones + more["scale"]) + Tables.shared(8)


@pytest.mark.parametrize("reads", [False, True])
def test_a_plan_leaves_no_tables_without_memory(reads):
    for cached in (table, Tables.shared):
        cached.cache_clear()
    number(1)
    (first, *_) = st.plan(lambda: Scaled(reads), [(1, 1, 16, 8)], 2)
    assert not first.refused
    assert number.cache_info().currsize == 1
    model = Scaled(reads=True)
    x = torch.ones(1, 1, 16, 8)
    want = model.conv(x) * (torch.linspace(0, 1, 8) + 3) + torch.arange(8)
    torch.testing.assert_close(model(x), want)


class Keeps(Scaled):
    """Values are read, and what is cached goes with the model, round which it lies."""

    def __init__(self):
        super(Scaled, self).__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.at = functools.lru_cache(self.made)
        bytes(self.at(8).numpy())

    def made(self, n):
        return torch.linspace(0, self.conv.kernel_size[0], n)

    def forward(self, x):
        return self.conv(x) + self.at(8)


# table, weights and Tables.shared are filled once, where the constructor runs for real once more
@pytest.mark.parametrize(
    ("make", "most"),
    [(lambda: nn.Conv2d(1, 2, 3, padding=1), 0), (Keeps, 0), (lambda: Scaled(True), 2)],
)
def test_modules_are_looked_through_where_something_is_left(make, most, monkeypatch):
    for cached in (table, Tables.shared):
        cached.cache_clear()
    looked = []
    stock = caches._caches
    monkeypatch.setattr(caches, "_caches", lambda module: looked.append(module) or stock(module))
    assert len(st.plan(make, [(1, 1, 16, 8)], 2)) > 1
    assert sum(m is sys.modules[__name__] for m in looked) == most
    assert len(looked) <= most * len(sys.modules)


def test_nothing_that_a_plan_did_not_make_is_collected(monkeypatch):
    """Of a process with many modules it was a fifth of the time."""
    done = []
    for name in ("collect", "freeze", "unfreeze"):
        monkeypatch.setattr(gc, name, lambda name=name: done.append(name))
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 0)
    with collector.quick_collector():
        collector.collect()
    assert done == ["freeze", "collect", "freeze", "collect", "unfreeze"]


class Layers(nn.Module):
    """As DETR and nn.TransformerEncoder make theirs; too large to be made for real."""

    def __init__(self):
        super().__init__()
        layer = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
        self.layers = nn.ModuleList([copy.deepcopy(layer) for _ in range(2)])
        self.heavy = nn.Parameter(torch.empty(2**32))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_are_copied_deeply():
    (first, *_) = st.plan(Layers, [(1, 2, 16, 8)], 2, precisions=(None,))
    parameters = 2 * (2 * 2 + 2 + 2 + 2) + 2**32
    assert first.memory["parameters"] == 4 * parameters


def test_what_keeps_none_is_left():
    """Of any module, also one without a dictionary of names."""
    module = types.ModuleType("made_up")
    module.kept = functools.lru_cache(lambda: torch.ones(2))
    sys.modules["made_up"], sys.modules["odd"] = module, None
    try:
        value = module.kept()
        caches.forget()
        assert module.kept() is value
    finally:
        del sys.modules["made_up"], sys.modules["odd"]


class Elsewhere:
    """What stands for a module until it is asked, as those of six.moves do."""

    def __getattr__(self, name):
        raise ModuleNotFoundError("No module named 'elsewhere'")


class Moved:
    elsewhere = Elsewhere()


def test_what_stands_for_a_module_is_not_asked():
    caches.forget()


class Reads(nn.Module):
    """Constants and numbers that become tensors, batch norms, and weights whose sums are sent."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 4.0]))

    def forward(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x)).relu() * self.scale.view(1, 4, 1, 1)
        return x


def test_a_second_layout_asks_torch_for_no_op(monkeypatch):
    given = Task(Reads, [(1, 4, 16, 16)], dims=(2,)), Layout(1, (2,), (2,))
    first = estimate(*given)
    asked = []
    stock = FakeTensorMode.dispatch

    def dispatch(self, func, *args, **kwargs):
        asked.append(str(func))
        return stock(self, func, *args, **kwargs)

    monkeypatch.setattr(FakeTensorMode, "dispatch", dispatch)
    again = estimate(*given)
    assert again.memory == first.memory and again.collectives() == first.collectives()
    assert not asked
