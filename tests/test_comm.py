"""Every collective against its definition and its adjoint, simulated and over gloo."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from shardtensor import comm, simulate
from shardtensor.comm import wire
from shardtensor.comm.exchanges import pieces
from shardtensor.ranks.testing import cuts, make_mesh, run_workers

D = torch.float64
RUNS = {"simulated": simulate, "gloo": run_workers}


def offsets(sizes):
    return [sum(sizes[:i]) for i in range(len(sizes) + 1)]


def rand(rank, *shape, dtype=D):
    g = torch.Generator().manual_seed(rank)
    return torch.randn(shape, generator=g, dtype=dtype)


# each case: (name, sizes) -> (the op on this rank, this rank's input, what it must give, or None)
def case(name, sizes, dtype=D):
    n, me = len(sizes), dist.get_rank()
    group = comm.group(make_mesh((n,)), (0,))
    o = offsets(sizes)
    whole = rand(99, 3, sum(sizes), 2, dtype=torch.float64).to(dtype)
    mine = whole[:, o[me] : o[me + 1]].clone()
    if name == "gather":
        return lambda x: comm.gather(x, 1, sizes, group), mine, whole
    if name == "split":
        return lambda x: comm.split(x, 1, sizes, group), whole.clone(), mine
    if name == "swap":
        new = [1, 2, *[0] * (n - 2)] if n > 1 else [3]
        p = offsets(new)
        want = whole[p[me] : p[me + 1]]
        return lambda x: comm.swap(x, 1, 0, sizes, new, group), mine, want
    if name == "reduce_scatter":
        addend = rand(me, 3, sum(sizes), 2, dtype=torch.float64).to(dtype)
        total = sum(rand(r, 3, sum(sizes), 2, dtype=torch.float64).to(dtype) for r in range(n))
        want = total[:, o[me] : o[me + 1]]
        return lambda x: comm.reduce_scatter(x, 1, sizes, group), addend, want
    if name == "ring":
        src = (me - 1) % n
        return lambda x: comm.ring(x, 1, sizes, group), mine, whole[:, o[src] : o[src + 1]]
    if name == "take":
        index = torch.tensor([0, sum(sizes) - 1, me % sum(sizes), 0])
        rows = whole[0, o[me] : o[me + 1]].clone()
        return lambda x: comm.take(x, index, sizes, group), rows, whole[0][index]
    if name == "put":
        index = torch.tensor([0, sum(sizes) - 1, me % sum(sizes), 0])
        total = torch.zeros(sum(sizes), 2, dtype=dtype)
        for r in range(n):
            at = torch.tensor([0, sum(sizes) - 1, r % sum(sizes), 0])
            total.index_add_(0, at, rand(r, 4, 2, dtype=torch.float64).to(dtype))
        rows = rand(me, 4, 2, dtype=torch.float64).to(dtype)
        return lambda x: comm.put(x, index, sizes, group), rows, total[o[me] : o[me + 1]]
    wrap = name == "periodic"
    reach = {"halo": 1, "far": 4, "periodic": 3, "full": sum(sizes), "none": -sum(sizes)}[name]
    windows = [(o[r] - reach, max(o[r] - reach, o[r + 1] + reach)) for r in range(n)]
    a, b = windows[me]
    rows = [whole[:, i % sum(sizes)] if wrap or 0 <= i < sum(sizes) else torch.full((3, 2), 7.0,
            dtype=torch.float64).to(dtype) for i in range(a, b)]  # fmt: skip
    want = torch.stack(rows, 1) if rows else whole[:, :0]
    return (
        lambda x: comm.window(x, 1, sizes, windows, group, wrap=wrap, fill=0.0 if wrap else 7.0),
        mine,
        want,
    )


NAMES = ["gather", "split", "swap", "reduce_scatter", "ring", "take", "put", "halo", "far",
         "periodic", "full", "none"]  # fmt: skip
# the value is replicated, so an inner product counts it once, not once a rank
REPLICATED_OUT, REPLICATED_IN = {"gather"}, {"split"}


def total(x, n_equal=1):
    value = x.clone()
    dist.all_reduce(value)
    return value.item() / n_equal


def adjoint(name, sizes):
    """<F x, y> = <x, F* y>, and F's value, and the same for F* (double backward)."""
    op, x, want = case(name, sizes)
    n = len(sizes)
    x.requires_grad_()
    out = op(x)
    assert out.shape == want.shape and torch.allclose(out, want, rtol=1e-13, atol=0)
    y = rand(50 if name in REPLICATED_OUT else dist.get_rank() + 50, *out.shape)
    y.requires_grad_()
    (back,) = torch.autograd.grad(out, x, y, create_graph=True)
    # F without its constant part (the fill rows of a window)
    fx = out - op(torch.zeros_like(x))
    left = total((fx * y).sum().detach(), n if name in REPLICATED_OUT else 1)
    right = total((x * back).sum().detach(), n if name in REPLICATED_IN else 1)
    assert abs(left - right) <= 1e-11 * max(1.0, abs(left)), (name, sizes, left, right)
    (again,) = torch.autograd.grad(back, y, x.detach())
    assert torch.allclose(again, fx, rtol=1e-12, atol=1e-12), (name, sizes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [*cuts(7), (2, 2, 2, 1), (6, 0, 2), (0, 5, 0, 0)])
def test_value_and_adjoint(name, sizes):
    simulate(len(sizes), adjoint, name, sizes)


def every_case(cases):
    for name, sizes in cases:
        adjoint(name, sizes)
    for dtype in DTYPES:
        for name in ("gather", "swap", "halo", "periodic", "ring", "take"):
            moved(name, (3, 0, 2)[: dist.get_world_size()], dtype)
        summed(dtype)


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
          torch.complex128, torch.int64, torch.int32, torch.uint8, torch.bool]  # fmt: skip


def moved(name, sizes, dtype):
    op, x, want = case(name, sizes, dtype)
    assert torch.equal(op(x), want), (name, dtype)


def summed(dtype):
    n, me = dist.get_world_size(), dist.get_rank()
    group = comm.group(make_mesh((n,)), (0,))
    parts = [torch.arange(4).sub(r).to(dtype) for r in range(n)]
    got = comm.reduce(parts[me], group)
    want = torch.stack(parts).sum(0) if dtype is not torch.bool else torch.stack(parts).any(0)
    assert torch.equal(got, want.to(dtype)), dtype


@pytest.mark.gloo
@pytest.mark.parametrize("n", [2, 3])
def test_over_gloo(n):
    sizes = {2: (4, 3), 3: (6, 0, 2)}[n]
    run_workers(n, every_case, [(name, sizes) for name in NAMES])


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype(dtype):
    for name in ("gather", "split", "swap", "halo", "periodic", "ring", "take"):
        simulate(3, moved, name, (3, 0, 2), dtype)
    simulate(3, summed, dtype)


def vary_and_reduce():
    n, me = dist.get_world_size(), dist.get_rank()
    group = comm.group(make_mesh((n,)), (0,))
    w = rand(0, 4).requires_grad_()
    b = rand(1, 2).requires_grad_()
    x = rand(me + 2, 4)
    v, c = comm.vary([w, b], group)
    y = comm.reduce((v * x).sum() + c.sum(), group)
    g, h = torch.autograd.grad(y, [w, b], create_graph=True)
    assert torch.allclose(g, sum(rand(r + 2, 4) for r in range(n)))
    assert torch.allclose(h, torch.full_like(h, n))
    # second derivative: y2 = (sum_r w x_r)^2, Hessian 2 s s^T
    y2 = comm.reduce((comm.vary([w], group)[0] * x).sum(), group) ** 2
    (g,) = torch.autograd.grad(y2, w, create_graph=True)
    (gg,) = torch.autograd.grad(g[0], w)
    s = sum(rand(r + 2, 4) for r in range(n))
    assert torch.allclose(gg, 2 * s[0] * s)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_vary_and_reduce(n):
    simulate(n, vary_and_reduce)


def zeros_without_memory():
    n, me = dist.get_world_size(), dist.get_rank()
    group, sizes = comm.group(make_mesh((n,)), (0,)), (1, 2)
    zeros = torch._efficientzerotensor((sizes[me], 3), dtype=torch.float64)
    sent = [
        comm.gather(zeros, 0, sizes, group),
        comm.window(zeros, 0, sizes, ((0, 2), (0, 3)), group),
        comm.swap(zeros, 0, 1, sizes, (2, 1), group),
        comm.ring(zeros, 0, sizes, group),
        comm.take(zeros, torch.tensor([2, 0]), sizes, group),
        comm.put(zeros[:1], torch.tensor([2]), sizes, group),
        comm.reduce(zeros[0], group),
        comm.reduce_scatter(torch._efficientzerotensor((3, 2)), 0, sizes, group),
    ]
    for x in sent:
        assert not x.count_nonzero()


@pytest.mark.gloo
def test_zeros_without_memory():
    run_workers(2, zeros_without_memory)


def nested_groups():
    mesh = init_device_mesh("cpu", (2, 2))
    ranks = [torch.tensor([float(dist.get_rank())])] * 3
    groups = [comm.group(mesh, axes) for axes in ((0,), (1,), (0, 1))]
    return [comm.reduce(r, g).item() for r, g in zip(ranks, groups, strict=True)]


@pytest.mark.parametrize("run", ["simulated", pytest.param("gloo", marks=pytest.mark.gloo)])
def test_groups_of_a_mesh(run):
    assert RUNS[run](4, nested_groups) == [[2, 1, 6], [4, 1, 6], [2, 5, 6], [4, 5, 6]]


def test_pieces_of_a_window():
    assert pieces((2, 0, 3), -1, 6, False) == ((-1, 0, 1), (0, 0, 2), (2, 0, 3), (-1, 0, 1))
    assert pieces((2, 0, 3), -1, 3, True) == ((2, 2, 1), (0, 0, 2), (2, 0, 1))
    assert pieces((2, 0, 3), 4, 4, False) == ()


def traced_ops():
    """A window and its gradient as a graph of dispatcher ops."""
    from torch.fx.experimental.proxy_tensor import make_fx

    group = comm.group(make_mesh((2,)), (0,))

    def f(x):
        y = comm.window(x, 0, (3, 3), [(0, 4), (2, 6)], group)
        (g,) = torch.autograd.grad((y * y).sum(), x)
        return y, g

    x = rand(dist.get_rank(), 3, 2).requires_grad_()
    graph = make_fx(f, tracing_mode="fake")(x)
    names = [str(n.target) for n in graph.graph.nodes if "shardtensor" in str(n.target)]
    assert [n.split(".")[1] for n in names] == ["window", "window_add"], names
    for a, b in zip(graph(x), f(x), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


def test_traceable():
    simulate(2, traced_ops)


def checked_ops():
    """PyTorch's own checks: schema, fake kernel with real strides, autograd, AOT tracing."""
    from shardtensor.comm import ops, sums
    from shardtensor.comm import rows as rows_of

    group = comm.group(make_mesh((2,)), (0,))
    me = comm.rank(group)
    mine = rand(me, 3, (2, 1)[me], 4).requires_grad_()
    last = (
        mine.detach()
        .to(memory_format=torch.contiguous_format)[:, None]
        .contiguous(memory_format=torch.channels_last)
    )
    whole = rand(9, 3, 3, 4).requires_grad_()
    asked = rand(9, 3, 3 - me, 4).requires_grad_()
    index = torch.tensor([0, 2, 1])
    rows = whole[0].detach().requires_grad_()
    for op, args in [
        (ops.gather_op, (mine, 1, [2, 1], group)),
        (ops.split_op, (whole, 1, [2, 1], group)),
        (ops.window_op, (mine, 1, [2, 1], [-1, 1], [3, 4], False, 2.0, group)),
        (ops.window_op, (last.requires_grad_(), 2, [2, 1], [0, 1], [3, 3], True, 0.0, group)),
        (ops.window_add_op, (asked, 1, [2, 1], [0, 1], [3, 3], False, group)),
        (ops.swap_op, (mine, 1, 0, [2, 1], [1, 2], [], group)),
        (ops.ring_op, (mine, 1, [2, 1], 0, 1, group)),
        (rows_of.take_op, (mine[0].detach().requires_grad_(), index, [2, 1], group)),
        (rows_of.put_op, (rows, index, [2, 1], group)),
        (sums.vary_op, ([whole, rows], group)),
        (sums.reduce_op, ([whole, rows], "sum", group)),
    ]:
        torch.library.opcheck(op, args)


def test_torchs_own_checks():
    simulate(2, checked_ops)


def made_by_members():
    from torch.distributed import distributed_c10d

    mesh, world = init_device_mesh("cpu", (2, 2, 1)), dist.group.WORLD
    asked, split = [], distributed_c10d._get_split_source
    # as init_process_group(device_id=...) leaves it
    world.bound_device_id = torch.device("cpu:0")
    distributed_c10d._get_split_source = asked.append
    try:
        # the other ranks do not come
        n = comm.size(comm.group(mesh, (0, 2))) if mesh.get_coordinate()[1] == 0 else 2
        bound = world.bound_device_id
    finally:
        distributed_c10d._get_split_source, world.bound_device_id = split, None
    return n, asked, str(bound)


@pytest.mark.gloo
def test_a_group_on_several_axes_needs_its_members_only():
    assert run_workers(4, made_by_members) == [(2, [], "cpu:0")] * 4


PADDED = [(3, 2, 2, 2), (0, 4, 1, 3), (1, 0, 0, 5), (2, 2, 1, 0), (0, 0, 0, 3)]


@pytest.mark.parametrize("sizes", PADDED)
def test_gathers_of_padded_shards(sizes, monkeypatch):
    """Outermost dims are received where they stay, also where shards are of different sizes."""
    monkeypatch.setattr(wire, "DIRECT", 0)
    x = torch.randn(1, sum(sizes), 3, dtype=torch.float64)

    def run():
        group = comm.group(make_mesh((4,)), (0,))
        own = x.split(sizes, 1)[comm.rank(group)].clone().requires_grad_()
        found = comm.gather(own, 1, sizes, group)
        # no view of what came, which nobody could write to
        found.mul_(2)
        found.backward(x)
        return found.detach(), own.grad

    for r, (found, grad) in enumerate(simulate(4, run)):
        assert torch.equal(found, 2 * x)
        assert torch.equal(grad, 2 * x.split(sizes, 1)[r])
