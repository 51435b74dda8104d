"""Batches, inputs and outputs in containers of any make: what is in them is cut, and comes back."""

import copy
import gc
import weakref
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import shardtensor as st
from shardtensor import containers
from shardtensor import testing as T
from shardtensor.train.batch import cut_batch

D = torch.float64
Pair = namedtuple("Pair", "x y")


@dataclass
class Sample:
    x: Any
    y: Any = None
    name: str = "here"


@dataclass(frozen=True, slots=True)
class Fixed:
    x: Any
    y: Any


class Batch(dict):
    pass


class Rows(list):
    pass


class Two(tuple):
    def __new__(cls, x, y):
        return super().__new__(cls, (x, y))


class Known:
    def __init__(self, x, y):
        self.x, self.y = x, y


pytree.register_pytree_node(Known, lambda k: ([k.x, k.y], None), lambda v, _: Known(*v))

MAKE = {
    "dict": lambda x, y: {"x": x, "y": [y, None, 3]},
    "class of dict": lambda x, y: Batch(x=x, y=y),
    "UserDict": lambda x, y: UserDict(x=x, y=y),
    "OrderedDict": lambda x, y: OrderedDict(x=x, y=y),
    "defaultdict": lambda x, y: defaultdict(list, x=x, y=(y, "text")),
    "mapping": lambda x, y: MappingProxyType({"x": x, "y": y}),
    "namedtuple": lambda x, y: Pair(x, {0: y}),
    "class of list": lambda x, y: Rows([x, y]),
    "class of tuple": Two,
    "deque": lambda x, y: deque([x, y]),
    "dataclass": lambda x, y: Sample(x, [y]),
    "frozen": lambda x, y: Fixed(x, Sample(y)),
    "registered": Known,
}


@pytest.mark.parametrize("name", MAKE)
def test_batches_are_cut(name):
    x, y = torch.arange(14.0).view(2, 7), torch.arange(7.0)
    batch = MAKE[name](x, y)
    paths = [p for p, _ in containers.leaves(batch)]

    def run():
        cut = cut_batch(batch, -1, T.make_mesh((2,)))
        found = [*containers.leaves(cut)]
        shards = [v for _, v in found if isinstance(v, st.ShardTensor)]
        return type(cut), [p for p, _ in found], [v.full_tensor() for v in shards]

    for kind, found, wholes in st.simulate(2, run):
        assert found == paths
        assert kind is type(batch) or name == "mapping"
        assert len(wholes) == 2 and wholes[0].equal(x) and wholes[1].equal(y)
    # the caller's is as it was
    assert not any(isinstance(v, st.ShardTensor) for v in containers.tensors(batch))


def test_what_occurs_twice_is_made_once():
    x = torch.ones(3)
    made = containers.mapped(lambda v: v + v, Sample([x, x], {"x": x}))
    assert made.x[0] is made.x[1] is made.y["x"]


def test_nothing_is_kept():
    x = torch.ones(3)
    gone, batch = weakref.ref(x), Sample({"x": x}, [x])
    gc.disable()
    try:
        form, many = containers.Form(batch), [make(x, x) for make in MAKE.values()]
        forms = [containers.Form(b) for b in many]
        containers.mapped(torch.neg, batch.x)
        del x, batch, many
        assert gone() is None and form.of([1, 2, 3]) == Sample({"x": 1}, [2], 3)
        assert len(forms) == len(MAKE)
    finally:
        gc.enable()


class Net(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.conv, self.make = nn.Conv1d(2, 2, 3, padding=1), make

    def forward(self, batch):
        x, y = containers.tensors(batch)
        return self.make(self.conv(x) * y, (x + y).mean())


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", MAKE)
def test_tiled(name, grad, tmp_path):
    torch.manual_seed(0)
    net = Net(MAKE[name]).to(D)
    xs = [torch.randn(1, 2, 9, dtype=D, requires_grad=grad) for _ in range(2)]

    def run(call):
        net.zero_grad()
        with torch.set_grad_enabled(grad):
            out = call(MAKE[name](*xs))
        found = containers.tensors(out)
        if grad:
            sum(v.sin().sum() for v in found).backward()
            found += [v.grad for v in (*xs, *net.parameters())]
            for x in xs:
                x.grad = None
        return type(out), [v.detach().clone() for v in found]

    want, got = run(net), run(st.tiled(net, 3, 2, memory=2**20, spill=tmp_path))
    assert got[0] is want[0] or name == "mapping"
    for a, b in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_an_iterator_of_a_tiled_model_is_refused(tmp_path):
    net = Net(lambda x, y: iter([x, y]))
    with pytest.raises(st.RankError, match="tensors in a list_iterator: return them in a tuple"):
        st.tiled(net, 3, 2, memory=2**20, spill=tmp_path)(torch.ones(2, 1, 2, 9).unbind())


@pytest.mark.filterwarnings("ignore:.*eagerly")
@pytest.mark.parametrize("name", ["class of dict", "class of list", "UserDict", "frozen"])
def test_compiled(name):
    torch.manual_seed(0)
    net = Net(MAKE[name]).to(D)
    pairs = [torch.randn(2, 1, 2, 9, dtype=D).unbind() for _ in range(2)]

    def run():
        mesh = T.make_mesh((2,))
        compiled = st.compile(copy.deepcopy(net), backend="eager")
        outs = [compiled(cut_batch(MAKE[name](*pair), 2, mesh)) for pair in pairs]
        return [[v.detach().full_tensor() for v in containers.tensors(out)] for out in outs]

    for found in st.simulate(2, run):
        for pair, got in zip(pairs, found, strict=True):
            for a, b in zip(got, containers.tensors(net(MAKE[name](*pair))), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
