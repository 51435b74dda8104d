"""Nodes of ShardTensors that somebody holds: one object each, what they keep, when they are read."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from test_nodes import CUTS, points, ranks
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T


def test_a_node_of_a_tensor_that_nobody_has_made_is_the_one_before_a_write():
    def run(x):
        y = torch.cat([x, 2 * x])
        node, edge = y.grad_fn, get_gradient_edge(y)
        y.mul_(3)
        assert y.grad_fn is not node and edge.node is node and not y.is_leaf
        return torch.autograd.grad(y.square().sum(), [edge, get_gradient_edge(y), x])

    want = run(points().requires_grad_())
    for found in ranks(run, CUTS[1]):
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


WAITS = """
import torch
import shardtensor as st
from shardtensor import testing as T

def run():
    x = st.distribute_tensor(torch.ones(7, 4), T.make_mesh((3,)), T.shard(0, (2, 0, 5)).placements)
    node = torch.cat([x.requires_grad_(), 2 * x]).grad_fn
    return node.next_functions[0][0].name()

print(st.simulate(3, run))
"""


def test_ranks_that_look_at_nodes_do_not_lock_each_other_out():
    # a lock that a waiting rank holds can't be interrupted: in a process that can be ended
    found = subprocess.run(
        [sys.executable, "-c", WAITS], capture_output=True, text=True, timeout=120, check=True
    )
    assert found.stdout.count("Backward") == 3, found.stdout + found.stderr


def freed(x):
    y = x.exp()
    z = y * 2
    node, edge = z.grad_fn, get_gradient_edge(z)
    node.name()
    local = z._local if isinstance(z, st.ShardTensor) else z
    held = weakref.ref(local), weakref.ref(z)
    del z, local
    gc.collect()
    assert [w() for w in held] == [None, None] and edge.node is node
    return ()


def test_a_node_does_not_keep_what_it_made():
    freed(points().requires_grad_())
    ranks(freed, CUTS[1])


def outlives(x):
    node = x.roll(2, 0).grad_fn
    below = (x.roll(2, 0) * 2).grad_fn.next_functions[0][0]
    gc.collect()
    names = [n.next_functions[0][0].name() for n in (node, below)]
    assert all(names)
    seen = []
    node.register_prehook(lambda g: seen.append(g[0]))
    return torch.autograd.grad(GradientEdge(node, 0), x, x.detach())


def test_nodes_keep_what_is_below():
    want = outlives(points().requires_grad_())
    for found in ranks(outlives, CUTS[1]):
        torch.testing.assert_close(found[0], want[0])


def names(x):
    """As torchviz draws a graph: by the id of each node."""
    y = x.exp()
    loss = (y.sin() * y + y).sum(1)
    seen, edges = {}, []

    def visit(node):
        if id(node) in seen:
            return
        seen[id(node)] = node
        for below, _ in node.next_functions:
            if below is not None:
                edges.append((node.name(), id(below)))
                visit(below)

    visit(loss.grad_fn)
    assert all(i in seen for _, i in edges)
    return sorted(n.name() for n in seen.values()), len(edges)


def test_a_node_is_one_object():
    # of one rank: no node is the library's
    want = names(points().requires_grad_())

    def run():
        x = st.distribute_tensor(points(), T.make_mesh((2,)), [Shard(0)], src_data_rank=None)
        return names(x.requires_grad_())

    for found in st.simulate(2, run):
        assert found == want


def test_gradients_that_go_past_a_tensor_are_not_those_of_its_node():
    def run(x):
        y = torch.fft.rfft2(x)
        before = torch.fft.rfft2(x).grad_fn
        before.register_prehook(lambda g: None)
        held = y.grad_fn
        b = y[..., :2] * 2
        for node in (held, y.grad_fn):
            with pytest.raises(st.UnsupportedOpError, match="register_prehook of"):
                node.register_prehook(lambda g: None)
        with pytest.raises(st.UnsupportedOpError, match="a GradientEdge of"):
            torch.autograd.grad(b.abs().sum(), get_gradient_edge(y), allow_unused=True)
        return ()

    ranks(run, CUTS[0])
