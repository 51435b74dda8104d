"""A compiled program gives what Python would: its state is read anew, or the call runs eagerly."""

import array
import collections
import contextvars
import dataclasses
import functools
import io
import itertools
import os
import random
import sys
import threading
import types
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh

F64 = torch.float64
FACTOR = 2.0
TABLE = {"k": 2.0}
LOG = []
HANDLES = []
# a file from which nothing is read
ERRORS = sys.__stderr__


class Names:
    k = 2.0


def scaled(x):
    return x * FACTOR


@dataclasses.dataclass
class Config:
    k: float = 2.0
    items: list = dataclasses.field(default_factory=lambda: [1.0, 2.0])


class Slotted:
    __slots__ = ("k",)

    def __init__(self):
        self.k = 2.0


class Net(nn.Module):
    def __init__(self, body, init):
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(4, 4, dtype=F64)
        self.body = body
        init(self)

    def forward(self, x):
        return self.body(self, x)


class Special(Net):
    """Its class gets attributes."""


class Doubling(Special):
    def forward(self, x):
        return super().forward(x) * 2


def put(**values):
    return lambda m: [setattr(m, k, v() if isinstance(v, type) else v) for k, v in values.items()]


def set_factor(m, i):
    global FACTOR
    FACTOR = 3.0 + i


def counting(m, x):
    m.n += 1
    return m.lin(x) * m.n


def logging(m, x):
    LOG.append(1)
    return m.lin(x) * len(LOG)


def caching(m, x):
    if m.c is None:
        m.c = torch.arange(4, dtype=F64)
    return m.lin(x) * m.c


def keeping(m, x):
    m.last = m.lin(x)
    return m.last


def buffering(m, x):
    m.mean = m.mean * 0.5 + m.lin.weight.detach().mean(0)
    return m.lin(x) - m.mean


def with_closure():
    k = 2.0

    def body(m, x):
        return m.lin(x) * k

    def change(m, i):
        nonlocal k
        k = 3.0 + i

    return body, change


CLOSURE = with_closure()


def linear(m, x):
    return m.lin(x)


def hook_for_all(m, i):
    register = nn.modules.module.register_module_forward_hook
    HANDLES.append(register(lambda mod, a, y: y * 1.5))


COUNT = itertools.count(1)
CONTEXT = contextvars.ContextVar("k", default=2.0)
LOCAL = threading.local()
SCALE = [1.0]


class Kind(type):
    k = 2.0


class OfKind(metaclass=Kind):
    pass


class Inherited(Names):
    pass


class Called:
    """What it does is in special methods, which Python looks up in its class."""

    def __init__(self):
        self.n = 2.0

    def __getitem__(self, i):
        return self.n * SCALE[0]

    def __call__(self, x):
        return x * self.n


def attributed(x):
    return x * attributed.k


@functools.lru_cache
def remembered(k):
    return k * SCALE[0]


def class_counter(m, x):
    type(m).extra = getattr(type(m), "extra", 0) + 1
    return m.lin(x) * type(m).extra


def names_counter(m, x):
    Names.k += 1
    return m.lin(x) * Names.k


def array_counter(m, x):
    m.c[0] += 1
    return m.lin(x) * float(m.c[0])


def patched(m, i):
    m.c = Called()
    Called.__call__ = lambda self, x: x * (3.0 + i)


ACTS = [torch.tanh, torch.sigmoid, torch.exp, torch.relu]
# forward, what the module has, what changes between calls, graphs that are made (None: any)
CASES = {
    "attribute": (lambda m, x: m.lin(x) * m.k, put(k=2.0), lambda m, i: setattr(m, "k", 3.0 + i), 4),
    "an attribute that returns": (
        lambda m, x: m.lin(x) * m.k, put(k=2.0), lambda m, i: setattr(m, "k", 3.0 - i % 2), 2),
    "its type": (lambda m, x: (x * 4).to(torch.int32) * m.k, put(k=2),
                 lambda m, i: setattr(m, "k", [2, 2.0, True, 2][i]), 3),
    "absent, then there": (lambda m, x: m.lin(x) * getattr(m, "k", 1.0), put(),
                           lambda m, i: setattr(m, "k", 3.0 + i), 4),
    "global": (lambda m, x: scaled(m.lin(x)), put(), set_factor, 4),
    "global dict": (lambda m, x: m.lin(x) * TABLE["k"], put(),
                    lambda m, i: TABLE.update(k=3.0 + i), 4),
    "closure": (CLOSURE[0], lambda m: CLOSURE[1](m, -1), CLOSURE[1], 4),
    "class as names": (lambda m, x: m.lin(x) * Names.k, put(),
                       lambda m, i: setattr(Names, "k", 3.0 + i), 4),
    "class attribute": (lambda m, x: m.lin(x) * getattr(m, "extra", 1.0), put(),
                        lambda m, i: setattr(Special, "extra", 3.0 + i), 4),
    "object": (lambda m, x: m.lin(x) * m.c.k, put(c=Config), lambda m, i: setattr(m.c, "k", 3.0 + i), 4),
    "list of an object": (lambda m, x: m.lin(x) * m.c.items[0], put(c=Config),
                          lambda m, i: m.c.items.__setitem__(0, 3.0 + i), 4),
    "slots": (lambda m, x: m.lin(x) * m.c.k, put(c=Slotted), lambda m, i: setattr(m.c, "k", 3.0 + i), 4),
    "nested": (lambda m, x: m.lin(x) * m.c["a"][1].k, lambda m: put(c={"a": (1, Config())})(m),
               lambda m, i: setattr(m.c["a"][1], "k", 3.0 + i), 4),
    "set": (lambda m, x: m.lin(x) * len(m.c), lambda m: put(c={1})(m), lambda m, i: m.c.add(10 + i), 4),
    "deque": (lambda m, x: m.lin(x) * m.c[0], lambda m: put(c=collections.deque([1.0]))(m),
              lambda m, i: m.c.appendleft(3.0 + i), 4),
    "namespace": (lambda m, x: m.lin(x) * m.c.k, lambda m: put(c=types.SimpleNamespace(k=2.0))(m),
                  lambda m, i: setattr(m.c, "k", 3.0 + i), 4),
    "array": (lambda m, x: m.lin(x) * float(m.c[0]), lambda m: put(c=np.ones(2))(m),
              lambda m, i: m.c.__setitem__(0, 3.0 + i), 4),
    "what is not read": (linear, put(step=0), lambda m, i: setattr(m, "step", i + 1), 1),
    "hook": (linear, put(), lambda m, i: m.lin.register_forward_hook(lambda mod, a, y: y * (2 + i)), 4),
    "hook before": (linear, put(),
                    lambda m, i: m.register_forward_pre_hook(lambda mod, a: (a[0] * (2 + i),)), 4),
    "hook of all modules": (linear, put(), hook_for_all, 4),
    "another module": (linear, put(),
                       lambda m, i: setattr(m, "lin", nn.Sequential(nn.Linear(4, 4, dtype=F64))), 4),
    "modules in a list": (lambda m, x: m.c[0](x), lambda m: put(c=[nn.Linear(4, 4, dtype=F64)])(m),
                          lambda m, i: m.c.__setitem__(0, nn.Linear(4, 4, dtype=F64)), 4),
    "function": (lambda m, x: m.act(m.lin(x)), put(act=torch.relu),
                 lambda m, i: setattr(m, "act", ACTS[i]), 4),
    "partial": (lambda m, x: m.act(m.lin(x)), put(act=functools.partial(torch.mul, other=2.0)),
                lambda m, i: setattr(m, "act", functools.partial(torch.mul, other=3.0 + i)), 4),
    "tensor": (lambda m, x: m.lin(x) * m.c, lambda m: put(c=torch.ones(4, dtype=F64))(m),
               lambda m, i: setattr(m, "c", torch.full((4,), 3.0 + i, dtype=F64)), 4),
    "tensor in place": (lambda m, x: m.lin(x) * m.c, lambda m: put(c=torch.ones(4, dtype=F64))(m),
                        lambda m, i: m.c.add_(1), 1),
    "frozen": (linear, put(), lambda m, i: m.lin.weight.requires_grad_(bool(i % 2)), 2),
    "train": (lambda m, x: m.lin(x) * (2.0 if m.training else 3.0), put(),
              lambda m, i: m.train(bool(i % 2)), 2),
    "counter": (counting, put(n=0), lambda m, i: None, 0),
    "log": (logging, put(), lambda m, i: None, 0),
    "cache": (caching, put(c=None), lambda m, i: None, 1),
    "kept result": (keeping, put(), lambda m, i: None, 0),
    "buffer replaced": (buffering, lambda m: m.register_buffer("mean", torch.zeros(4, dtype=F64)),
                        lambda m, i: None, 0),
    "Python's random numbers": (lambda m, x: m.lin(x) * random.random(), put(), lambda m, i: None, 0),
    "metaclass": (lambda m, x: m.lin(x) * OfKind.k, put(), lambda m, i: setattr(Kind, "k", 3.0 + i), 4),
    "base class": (lambda m, x: m.lin(x) * Inherited.k, put(), lambda m, i: setattr(Names, "k", 3.0 + i), 4),
    "attribute of a function": (lambda m, x: attributed(m.lin(x)), put(),
                                lambda m, i: setattr(attributed, "k", 3.0 + i), 4),
    "what lru_cache keeps": (lambda m, x: m.lin(x) * remembered(2.0), put(), lambda m, i: (
        SCALE.__setitem__(0, 3.0 + i), remembered.cache_clear()), 4),
    "special method": (lambda m, x: m.lin(x) * m.c[0], put(c=Called),
                       lambda m, i: SCALE.__setitem__(0, 3.0 + i), 4),
    "method replaced": (lambda m, x: m.c(m.lin(x)), put(c=Called), patched, 4),
    "class replaced": (linear, put(), lambda m, i: setattr(m, "__class__", Doubling), 2),
    "context variable": (lambda m, x: m.lin(x) * CONTEXT.get(), put(), lambda m, i: CONTEXT.set(3.0 + i), 4),
    "of a thread": (lambda m, x: m.lin(x) * LOCAL.k, put(), lambda m, i: setattr(LOCAL, "k", 3.0 + i), 4),
    "environment": (lambda m, x: m.lin(x) * float(os.environ["SCALE"]), put(),
                    lambda m, i: os.environ.update(SCALE=str(3 + i)), 4),
    "UserDict": (lambda m, x: m.lin(x) * m.c["k"], lambda m: put(c=collections.UserDict(k=2.0))(m),
                 lambda m, i: m.c.update(k=3.0 + i), 4),
    "weak reference": (lambda m, x: m.lin(x) * m.r().k, lambda m: (
        put(c=Config)(m), setattr(m, "r", weakref.ref(m.c))), lambda m, i: setattr(m.c, "k", 3.0 + i), 4),
    "bytes": (lambda m, x: m.lin(x) * m.c[0], lambda m: put(c=bytearray(b"12"))(m),
              lambda m, i: m.c.__setitem__(0, i), 4),
    "numbers": (lambda m, x: m.lin(x) * m.c[0], lambda m: put(c=array.array("d", [2.0]))(m),
                lambda m, i: m.c.__setitem__(0, 3.0 + i), 4),
    "bytes of a file": (lambda m, x: m.lin(x) * m.c.getvalue()[0], lambda m: put(c=io.BytesIO(b"2"))(m),
                        lambda m, i: (m.c.seek(0), m.c.write(bytes([3 + i]))), 4),
    "where a file stands": (lambda m, x: m.lin(x) * m.c.tell(), lambda m: put(c=io.StringIO("123456"))(m),
                            lambda m, i: m.c.seek(1 + i), 4),
    "a file that is not read": (lambda m, x: m.lin(x) if ERRORS else x, put(), lambda m, i: None, 1),
    "read from a file": (lambda m, x: m.lin(x) * m.c.read(1)[0], lambda m: put(c=io.BytesIO(bytes(range(9))))(m),
                         lambda m, i: None, 0),
    "written to a file": (lambda m, x: m.lin(x) * m.c.write("1"), lambda m: put(c=io.StringIO())(m),
                          lambda m, i: None, 0),
    "counter of the class": (class_counter, put(), lambda m, i: None, 0),
    "counter of names": (names_counter, put(), lambda m, i: None, 0),
    "counter in an array": (array_counter, lambda m: put(c=np.ones(2))(m), lambda m, i: None, 0),
    "iterator": (lambda m, x: m.lin(x) * next(m.c), lambda m: put(c=iter([1.0 * i for i in range(9)]))(m),
                 lambda m, i: None, 0),
    "count": (lambda m, x: m.lin(x) * next(COUNT), put(), lambda m, i: None, 0),
    "its own random numbers": (lambda m, x: m.lin(x) * m.c.random(),
                               lambda m: put(c=random.Random(1))(m), lambda m, i: None, 0),
    "numpy's generator": (lambda m, x: m.lin(x) * m.c.random(),
                          lambda m: put(c=np.random.default_rng(1))(m), lambda m, i: None, 0),
    "numpy's random numbers": (lambda m, x: m.lin(x) * np.random.rand(), put(), lambda m, i: None, 0),
}  # fmt: skip


def calls(name, place, compiled):
    """Outputs and gradients of calls of a model whose state changes between them."""
    body, init, change, _ = CASES[name]
    set_factor(None, -1)
    TABLE["k"] = Names.k = 2.0
    LOG.clear()
    random.seed(0)
    np.random.seed(0)
    global COUNT
    COUNT = itertools.count(1)
    CONTEXT.set(2.0)
    os.environ["SCALE"] = "2"
    Kind.k = LOCAL.k = attributed.k = 2.0
    SCALE[0] = 1.0
    remembered.cache_clear()
    Called.__call__ = lambda self, x: x * self.n
    if hasattr(Special, "extra"):
        del Special.extra
    m = Special(body, init)
    fn, found = compiled(m), []
    x = torch.linspace(-1, 2, 16, dtype=F64).view(4, 4)
    for i in range(4):
        for _ in range(2):
            s = place(x.clone()).requires_grad_()
            y = fn(s)
            found += [y, *(torch.autograd.grad(y.square().sum(), [s]) if y.requires_grad else [])]
        torch.manual_seed(i)
        change(m, i)
    while HANDLES:
        HANDLES.pop().remove()
    return found, getattr(fn, "traces", None)


def on_a_rank(name):
    mesh = make_mesh((1,))
    found, traces = calls(
        name,
        lambda x: st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None),
        lambda m: st.compile(m, backend="eager"),
    )
    return [t.full_tensor().detach() for t in found], traces


@pytest.mark.parametrize("name", CASES)
def test_state_that_changes(name):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ((got, traces),) = st.simulate(1, on_a_rank, name)
    want, _ = calls(name, lambda x: x, lambda m: m)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype and torch.allclose(g, w, rtol=1e-12, atol=0)
    expected = CASES[name][3]
    assert traces == expected
    assert any("runs eagerly" in str(w.message) for w in seen) == (expected == 0)


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("n", torch.tensor(2))

    def forward(self, x):
        return x[: int(self.n)]


def reads_a_buffer():
    x = st.distribute_tensor(torch.ones(4, 4), make_mesh((2,)), [Shard(0)], src_data_rank=None)
    with pytest.raises(st.UnsupportedOpError, match="needs the value of a tensor"):
        st.compile(Steps(), backend="eager", fullgraph=True)(x)
    assert st.compile(Steps(), backend="eager")(x).shape == (2, 4)


def test_an_int_of_a_plain_buffer():
    st.simulate(2, reads_a_buffer)


def first_op(placements):
    mesh = make_mesh((2, 2))
    x = torch.arange(32.0, dtype=F64).view(8, 4)
    s = st.distribute_tensor(x, mesh, placements, src_data_rank=None)
    # the group is made by the op that is traced
    y = st.compile(lambda t: (t.softmax(0) + t.sum(0)).flip(0), backend="eager")(s)
    assert torch.allclose(y.full_tensor(), (x.softmax(0) + x.sum(0)).flip(0), rtol=1e-12)


@pytest.mark.parametrize("placements", [[Shard(0), Shard(1)], [Shard(0), Shard(0)]])
def test_the_first_op_on_a_group(placements):
    st.simulate(4, first_op, placements)
