"""What plans and rehearsals say where values decide: the op, and the user's line."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.plan.estimate import Layout, Task, estimate


def line_of(function, text):
    """ "file:line" of the one line of a function that has the text."""
    code = function.__code__
    lines = Path(code.co_filename).read_text().splitlines()
    at = next(i for i in range(code.co_firstlineno, len(lines)) if text in lines[i])
    return f"{code.co_filename}:{at + 1}"


class Halving(nn.Module):
    def forward(self, x):
        while (x.abs() > 1).any():
            x = x / 2
        return x


class ByHelper(nn.Module):
    def far(self, x):
        return bool((x.abs() > 1).any())

    def forward(self, x):
        while self.far(x):
            x = x / 2
        return x


class Kept(nn.Module):
    def forward(self, x):
        active = (x > 1).any()
        while ~active.logical_not():
            x = x / 2
            active = (x > 1).any()
        return x


class Broken(nn.Module):
    def forward(self, x):
        while True:
            if x.norm() < 1:
                break
            x = x / 2
        return x


class Bounded(nn.Module):
    def forward(self, x):
        i = 0
        while i < 3:
            x, i = x * 0.5, i + 1
        for _ in range(2):
            if (x > 7).any():
                break
            x = x + 1
        while torch.tensor(i).item() > 0:
            i -= 1
        return x


LOOPS = [(Halving, "while"), (ByHelper, "while"), (Kept, "while"), (Broken, "if x.norm")]


@pytest.mark.parametrize(("model", "text"), LOOPS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_plan_refuses_a_loop_that_values_end(model, text, ranks):
    task = Task(model, [(1, 4, 8)], dims=(2,), train=False)
    found = estimate(task, Layout(1, (2,), (ranks,)))
    where = line_of(model.forward, text)
    assert "how many turns a loop takes depends on values" in found.refused
    assert where in found.refused


@pytest.mark.parametrize("ranks", [1, 2])
def test_loops_that_numbers_end_are_planned(ranks):
    task = Task(Bounded, [(1, 4, 8)], dims=(2,), train=False)
    found = estimate(task, Layout(1, (2,), (ranks,)))
    assert not found.refused
    assert any("any is taken to be False" in a for a in found.assumed)


def rehearsed(step):
    def prepare():
        mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("d",))
        x = st.ShardTensor.from_local(
            torch.arange(12.0).view(4, 3), mesh, [Shard(0)], sizes={0: (4, 4, 4)}
        )
        return lambda: step(x)

    return st.rehearse(prepare, 3, repeats=1)


@pytest.mark.parametrize(("model", "text"), LOOPS)
def test_a_rehearsal_refuses_a_loop_that_values_end(model, text):
    where = re.escape(line_of(model.forward, text))
    with pytest.raises(st.UnsupportedOpError, match=f"cannot be rehearsed .{where}"):
        rehearsed(model())


def test_a_rehearsal_runs_loops_that_numbers_end():
    rehearsed(lambda x: [x.sum().item(), Bounded()(x)])


def rows(x):
    return x[torch.argsort(x[:, 0])]


def places(x):
    return torch.nonzero(x > 3)


@pytest.mark.parametrize(
    ("step", "op", "text"), [(places, "nonzero: ", "nonzero"), (rows, "__getitem__: ", "argsort")]
)
def test_a_rehearsal_names_the_op_and_the_line(step, op, text):
    where = re.escape(line_of(step, f"torch.{text}"))
    with pytest.raises(st.UnsupportedOpError, match=f"{op}.*cannot be rehearsed .{where}"):
        rehearsed(step)


def chosen(x):
    """Indices and matrices of this rank's rows; other ranks are only asked whether all is well."""
    values, at = x.topk(2, 1)
    kept = torch.zeros_like(x).scatter(1, at, values)
    matrices = torch.eye(3) + 0 * x[:, :, None]
    return kept.gather(1, at).sum() + torch.linalg.cholesky(matrices).sum()


def test_a_rehearsal_runs_indices_of_rows_that_lie_here():
    def real():
        mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("d",))
        x = st.distribute_tensor(torch.arange(36.0).view(12, 3), mesh, [Shard(0)])
        with st.trace() as t:
            chosen(x)
        return [(s.collective, s.bytes, s.messages) for s in t.sent]

    found = rehearsed(chosen).sent
    assert [(s.collective, s.bytes, s.messages) for s in found] == st.simulate(3, real)[0]
    assert sum(s.collective == "all_gather" for s in found) == 3
    with pytest.raises(st.UnsupportedOpError, match="what is sent depends on values"):
        rehearsed(lambda x: x[x[:, 0].argsort()])
