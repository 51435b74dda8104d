"""Compiled calls that take and give dataclasses, objects and what TorchScript made."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh


@dataclass
class State:
    x: Tensor
    time: float = 1.0
    more: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    y: Tensor
    beside: tuple = ()


@dataclass(slots=True)
class Slots:
    y: Tensor


@dataclass
class Items(dict):
    y: Tensor

    def __post_init__(self):
        self["y"] = self.y


class Box:
    def __init__(self, y):
        self.y = y


RESULTS = {
    "frozen": lambda y, x: Result(y, (y.mean(), [x])),
    "slots": lambda y, x: Slots(y),
    "inside": lambda y, x: [Result(y), {"of": Slots(y + 1)}],
    "box": lambda y, x: Box(y),
    "items": lambda y, x: Items(y),
}


class Model(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.conv, self.kind = nn.Conv2d(2, 3, 3, padding=1), kind

    def forward(self, state):
        y = self.conv(state.x) * state.time
        for scale in state.more.values():
            y = y * scale
        return RESULTS[self.kind](y, state.x)


def tensors(x):
    if isinstance(x, Tensor):
        return [x.full_tensor()]
    if isinstance(x, dict):
        x = list(x.values())
    if not isinstance(x, list | tuple):
        x = [getattr(x, n) for n in getattr(type(x), "__dataclass_fields__", {"y": None})]
    return [t for part in x for t in tensors(part)]


def states(mesh):
    """The same twice with other values, then with another time and with more of it."""
    whole = torch.arange(96.0, dtype=torch.float64).reshape(2, 2, 6, 4).sin()
    scale = torch.full((), 2.0, dtype=torch.float64)
    for i, (time, more) in enumerate([(1.0, {}), (1.0, {}), (2.0, {}), (1.0, {"scale": scale})]):
        x = st.distribute_tensor(whole * (i + 1), mesh, [Shard(2)], src_data_rank=None)
        yield State(x.requires_grad_(), time, more)


def compared(kind):
    mesh = make_mesh((2,))
    torch.manual_seed(0)
    model = Model(kind).double()
    compiled, traces = st.compile(model, backend="eager"), []
    for state in states(mesh):
        found = []
        for call in (model, compiled):
            out = call(state)
            held = tensors(out)
            wrt = [state.x, *model.parameters()]
            grads = torch.autograd.grad(sum(t.square().sum() for t in held), wrt)
            found.append((type(out), [*held, grads[0].full_tensor(), *grads[1:]]))
        (kind, want), (other, got) = found
        assert kind is other
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        traces.append(compiled.traces)
    return traces


@pytest.mark.parametrize("kind", ["frozen", "slots", "inside"])
def test_dataclasses(kind):
    assert st.simulate(2, compared, kind) == [[1, 1, 2, 3]] * 2


@pytest.mark.parametrize("kind, name", [("box", "Box"), ("items", "Items")])
def test_an_object_with_tensors_is_no_result_of_a_graph(kind, name):
    with pytest.warns(UserWarning, match=f"a result of type {name} with tensors in it: return "):
        assert st.simulate(2, compared, kind) == [[0] * 4] * 2


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_weights_that_only_torchscript_sees():
    """They would be constants of the graph, without gradients."""
    model = nn.Sequential(torch.jit.script(nn.Linear(3, 4)), nn.ReLU())
    compiled, x = st.compile(model, backend="eager"), torch.ones(2, 3)
    with pytest.warns(UserWarning, match="Linear is scripted, whose weights a compiled program"):
        compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    # what has no weights is as any function
    small = st.compile(torch.jit.script(nn.Sequential(nn.ReLU())), backend="eager")
    assert torch.equal(small(-x), 0 * x) and small.traces == 1
