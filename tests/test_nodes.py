"""`grad_fn` of a ShardTensor: hooks on it, edges into the graph, what looks at nodes."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, register_multi_grad_hook
from torch.distributed.tensor import Replicate, Shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import shardtensor as st
from shardtensor import testing as T

D = torch.float64
CUTS = [
    T.shard(0, (4, 3)),
    T.shard(0, (2, 0, 5)),
    T.On([Shard(0), Shard(1)]),
    T.On([Shard(0), Shard(0)]),
]


def meshes(on):
    return (2, 2) if len(on.placements) == 2 else (len(on.sizes[0]),)


def ranks(fn, on, *args):
    """fn of x and of args on each rank, whole."""
    shape = meshes(on)

    def run():
        x = st.distribute_tensor(
            points(), T.make_mesh(shape), on.placements, src_data_rank=None, sizes=on.sizes
        )
        return [T.full(y) for y in fn(x.requires_grad_(), *args)]

    return st.simulate(shape[0] * (shape[1] if len(shape) == 2 else 1), run)


def points():
    return torch.randn(7, 6, dtype=D, generator=torch.Generator().manual_seed(0))


def prehook(x):
    y = x.exp()
    seen = []
    y.grad_fn.register_prehook(lambda g: seen.append(g[0]))
    y.grad_fn.register_prehook(lambda g: (g[0] / g[0].norm(),))
    y.sin().sum().backward()
    return x.grad, *seen


def prehook_of_addends(x):
    y = x.sum(0)
    y.grad_fn.register_prehook(lambda g: (g[0] * 3 / g[0].norm(),))
    y.square().sum().backward()
    return (x.grad,)


def edge_in(x):
    y = x.exp()
    edges = [get_gradient_edge(y), get_gradient_edge(x)]
    return torch.autograd.grad(y.square().sum(), edges)


def edge_among(x):
    y = x.exp()
    return torch.autograd.grad(y.square().sum(), [x, get_gradient_edge(y)])


def edge_out(x):
    edge = get_gradient_edge(x.exp())
    # the node alone holds the graph
    return torch.autograd.grad(edge, x, torch.arange(42.0, dtype=D).view(7, 6))


def edge_of_plain_loss(x):
    loss = x.exp().sum()
    loss = loss.full_tensor() if isinstance(loss, st.ShardTensor) else loss
    return torch.autograd.grad(loss * 2, get_gradient_edge(x))


def edge_backward(x):
    torch.autograd.backward(get_gradient_edge(x.exp()), torch.ones(7, 6, dtype=D))
    return (x.grad,)


def edge_of_scalar(x):
    return torch.autograd.grad(get_gradient_edge(x.square().sum()), x)


def edge_before_a_write(x):
    y = x * 1
    before = get_gradient_edge(y)
    y.mul_(3)
    return torch.autograd.grad(y.square().sum(), [before, get_gradient_edge(y)])


def into_dict(x):
    y = x.exp()
    y.sum().backward(inputs={"x": x}, retain_graph=True)
    y.sin().sum().backward(inputs=get_gradient_edge(x))
    return (x.grad,)


def all_of_them(x):
    y = x.exp()
    seen = []
    register_multi_grad_hook([x, y], lambda grads: seen.extend(g * g.norm() for g in grads))
    y.sin().sum().backward()
    return tuple(seen)


@pytest.mark.parametrize("on", CUTS, ids=str)
@pytest.mark.parametrize(
    "fn",
    [prehook, prehook_of_addends, edge_in, edge_among, edge_out, edge_of_plain_loss, edge_backward,
     edge_of_scalar, edge_before_a_write, into_dict, all_of_them],
)  # fmt: skip
def test_as_on_one_device(fn, on):
    want = fn(points().requires_grad_())
    for found in ranks(fn, on):
        assert len(found) == len(want)
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def conv(x):
    w = torch.randn(5, 1, 3, dtype=D, generator=torch.Generator().manual_seed(1))
    return F.conv1d(x[:, None], w, padding=1)


def conv_along(x):
    w = torch.randn(5, 6, 3, dtype=D, generator=torch.Generator().manual_seed(1))
    return F.conv1d(x.mT[None], w, padding=1)


OPS = {
    "cat": lambda x: torch.cat([x, 2 * x]),
    "stack": lambda x: torch.stack([x, 2 * x]),
    "conv": conv,
    "conv_along": conv_along,
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "checkpoint": lambda x: checkpoint(lambda a: a.exp().sin(), x, use_reentrant=False),
    "reentrant": lambda x: checkpoint(lambda a: a.exp().sin(), x, use_reentrant=True),
    "row": lambda x: x[4],
    "spectrum": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=0), n=7, dim=0),
}


def hooks(x, op):
    y = op(x)
    node, seen = y.grad_fn, []
    assert y.grad_fn is node and y.grad_fn == node and repr(node).startswith("<")
    gone = node.register_prehook(lambda g: seen.append(g[0] * 7))
    node.register_prehook(lambda g: seen.append(g[0]))
    node.register_prehook(lambda g: (g[0] * g[0].norm(),))
    loss = (y.sin() * y).sum()
    # also once the tensor has been read
    node.register_prehook(lambda g: (g[0] + g[0].square().mean(),))
    gone.remove()
    loss.backward()
    return x.grad, *seen


def edges(x, op):
    edge = get_gradient_edge(op(x))
    size = torch.Size(edge.node._input_metadata[edge.output_nr].shape)
    y = op(x)
    given = torch.arange(float(size.numel()), dtype=D).view(size)
    return (
        *torch.autograd.grad(edge, x, given),
        *torch.autograd.grad((y.sin() * y).sum(), [get_gradient_edge(y), x]),
    )


# torch.autograd.grad of a reentrant checkpoint raises
@pytest.mark.parametrize(
    ("name", "fn"),
    [(name, fn) for name in OPS for fn in (hooks, edges) if (name, fn) != ("reentrant", edges)],
)
def test_results_of_ops(name, fn):
    want = fn(points().requires_grad_(), OPS[name])
    for on in CUTS[:2]:
        for found in ranks(fn, on, OPS[name]):
            assert len(found) == len(want)
            for a, b in zip(found, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "made",
    [lambda g: g[0], lambda g: list(g), lambda g: (1.0,), lambda g: g * 2],
    ids=["tensor", "list", "number", "numbers"],
)
def test_what_torch_does_not_take_of_a_hook(made):
    def run(x):
        y = x.exp()
        y.grad_fn.register_prehook(made)
        with pytest.raises(Exception) as e:
            y.sum().backward()
        assert not isinstance(e.value, AssertionError)
        return type(e.value), str(e.value).replace("ShardTensor", "Tensor")

    want = run(points().requires_grad_())

    def same(x):
        assert run(x) == want
        return ()

    ranks(same, CUTS[1])


def hook_after(x):
    x.exp().grad_fn.register_hook(lambda given, made: None)


def saved(x):
    return x.exp().grad_fn._saved_result


def below(x):
    x.exp().sin().grad_fn.next_functions[0][0].register_prehook(lambda g: None)


def below_a_leaf(x):
    x.view_as(x).grad_fn.next_functions[0][0].register_prehook(lambda g: None)


def of_several(x):
    x.split(3, 1)[0].grad_fn.register_prehook(lambda g: None)


def after_a_sum(x):
    x.sum().grad_fn.register_hook(lambda given, made: None)


def below_a_sum(x):
    x.exp().mean().grad_fn.next_functions[0][0].register_hook(lambda given, made: None)


def below_a_gather(x):
    whole = x.redistribute(placements=[Replicate()]) if isinstance(x, st.ShardTensor) else x * 1
    return whole.exp().grad_fn.next_functions[0][0].next_functions[0][0].register_hook(print)


def inner_edge(x):
    y = x.exp().sin()
    torch.autograd.grad(y.sum(), GradientEdge(y.grad_fn.next_functions[0][0], 0))


def old_module_hook(x):
    net = nn.Tanh()
    net.register_backward_hook(lambda module, given, made: None)
    net(x)


@pytest.mark.parametrize(
    "fn",
    [hook_after, saved, below, below_a_leaf, of_several, after_a_sum, below_a_sum,
     below_a_gather, inner_edge, old_module_hook],
)  # fmt: skip
def test_what_knows_local_tensors_only_is_refused(fn):
    fn(points().requires_grad_())

    def refused(x):
        with pytest.raises(st.UnsupportedOpError, match=r"an autograd node of local tensors.*hook"):
            fn(x)
        return ()

    ranks(refused, CUTS[1])


def test_of_whole_tensors_hooks_are_torchs():
    def run():
        x = st.distribute_tensor(points(), T.make_mesh((2,)), [Replicate()], src_data_rank=None)
        y = x.requires_grad_().exp()
        y.grad_fn.register_hook(lambda given, made: (given[0] / given[0].norm(),))
        y.sum().backward()
        return T.full(x.grad)

    want = points().exp() / points().exp().norm()
    for found in st.simulate(2, run):
        torch.testing.assert_close(found, want)


def walk(x):
    w = nn.Parameter(torch.ones(6, dtype=D))
    y = (x * w).sum(1)
    names, leaves, waiting, seen = set(), [], [y.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.add(node.name())
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting += [n for n, _ in node.next_functions]
    assert isinstance(y.grad_fn, torch.autograd.graph.Node) and y.grad_fn == y.grad_fn
    assert y.grad_fn in seen and any(v is w for v in leaves)
    return ()


def test_graphs_can_be_walked():
    walk(points().requires_grad_())
    ranks(walk, CUTS[0])


def test_a_version_that_is_moved_by_hand():
    def moved(x):
        y = x * 1
        z = y.square()
        torch.autograd.graph.increment_version(y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()
        return ()

    moved(points().requires_grad_())
    ranks(moved, CUTS[1])


def test_a_spectrum_that_nobody_has_read():
    def run(x):
        y = torch.fft.rfft2(x)
        assert y.grad_fn is not None
        y.abs().square().sum().backward()
        return (x.grad,)

    want = run(points().requires_grad_())
    for found in ranks(run, CUTS[0]):
        torch.testing.assert_close(found[0], want[0])
