"""segment_reduce, softmax's backward called by name, and what is made for the sums of messages."""

import pytest
import torch
from torch.distributed.tensor import Shard
from torch_geometric.utils import segment, softmax

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64
ROWS = 14
LENGTHS = {
    "some empty": [0, 3, 0, 5, 1, 0, 4, 1, 0],
    "one": [14],
    "each row": [1] * 14,
    "long": [1, 12, 1],
}
X = torch.randn(ROWS, 3, dtype=D)


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "min", "prod"])
@pytest.mark.parametrize("initial", [None, 0.25])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_segments(reduce, lengths, initial):
    n = torch.tensor(lengths)
    offsets = torch.cat([n.new_zeros(1), n.cumsum(0)])

    def by_lengths(x, n):
        with st.fallback("error"):
            return torch.segment_reduce(x, reduce, lengths=n, initial=initial)

    def by_offsets(x, n):
        with st.fallback("error"):
            return torch.segment_reduce(x, reduce, offsets=n, initial=initial)

    for cut in T.cuts(ROWS):
        T.hold(by_lengths, [X, n], [T.shard(0, cut), None], (len(cut),))
        T.hold(by_offsets, [X[:, 0], offsets], [T.shard(0, cut), T.shard(0)], (len(cut),))


def test_two_axes():
    n = torch.tensor(LENGTHS["some empty"])
    for on in ([Shard(0), Shard(0)], [Shard(0), Shard(1)], [Shard(1), Shard(0)]):
        T.hold(
            lambda x, n: torch.segment_reduce(x, "max", lengths=n), [X, n], [T.On(on), None], (2, 2)
        )


@pytest.mark.parametrize("reduce", ["max", "min"])
def test_an_extremum_that_is_what_it_began_with(reduce):
    x, n = torch.tensor([1.0, 0, 2, -1, 2], dtype=D), torch.tensor([1, 0, 3, 1])
    initial = 2.0 if reduce == "max" else -1.0

    def run(x, n):
        return torch.segment_reduce(x, reduce, lengths=n, initial=initial)

    for cut in ((2, 3), (3, 0, 2)):
        T.hold(run, [x, n], [T.shard(0, cut), None], (len(cut),))


@pytest.mark.parametrize("reduce", ["max", "min", "prod"])
@pytest.mark.parametrize("initial", [None, 1.0, float("nan")])
def test_gradients_among_equal_rows_and_beside_nan(reduce, initial):
    """torch divides what is positive by the number of equal ones, and nothing else."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 3, (ROWS, 3), generator=generator).to(D)
    x[5, 1] = x[8, 1] = x[9, 1] = float("nan")
    g = torch.randn(9, 3, dtype=D, generator=generator)
    n = torch.tensor([0, 5, 0, 6, 1, 0, 2, 0, 0])

    def values_and_gradients(x):
        x = x.detach().requires_grad_()
        out = torch.segment_reduce(x, reduce, lengths=n, initial=initial)
        (grad,) = torch.autograd.grad(out, x, g)
        return out.nan_to_num(-9, -9, -9), grad.nan_to_num(-9)

    assert reduce == "prod" or initial == 1 or (values_and_gradients(x)[1] < 0).any()
    for cut in T.cuts(ROWS):
        T.hold(values_and_gradients, [x], [T.shard(0, cut)], (len(cut),), grad=False)


def test_no_second_derivative_of_an_extremum():
    def run():
        s = st.distribute_tensor(X, T.make_mesh((2,)), [Shard(0)]).requires_grad_()
        out = torch.segment_reduce(s, "max", lengths=torch.tensor([9, 5]))
        (grad,) = torch.autograd.grad(out.square().sum(), s, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()

    T.simulate(2, run)


@pytest.mark.parametrize("dtype", [torch.int16, torch.float64])
def test_lengths_of_other_dtypes(dtype):
    n = torch.tensor(LENGTHS["long"], dtype=dtype)
    with pytest.raises(NotImplementedError):
        torch.segment_reduce(X, "sum", lengths=n)

    def run():
        s = st.distribute_tensor(X, T.make_mesh((2,)), [Shard(0)])
        with pytest.raises(NotImplementedError):
            torch.segment_reduce(s, "sum", lengths=n)

    T.simulate(2, run)


def test_what_torch_refuses():
    for x, reduce, lengths in (
        (X, "sum", [3, 4]), (X, "sum", [20, -6]), (X, "other", [14]), (X.long(), "sum", [14])
    ):  # fmt: skip
        n = torch.tensor(lengths)
        with pytest.raises((RuntimeError, ValueError)):
            torch.segment_reduce(x, reduce, lengths=n)

        def run(x=x, reduce=reduce, n=n):
            s = st.distribute_tensor(x, T.make_mesh((2,)), [Shard(0)])
            torch.segment_reduce(s, reduce, lengths=n)

        with pytest.raises(st.RankError):
            T.simulate(2, run)


def test_of_pytorch_geometric():
    ptr = torch.tensor([0, 0, 3, 8, 8, 14])
    for cut in ((7, 7), (2, 0, 12)):
        place = [T.shard(0, cut), None]
        T.hold(lambda x, p: segment(x, p, "mean").nan_to_num(), [X, ptr], place, (len(cut),))
        T.hold(lambda x, p: softmax(x, ptr=p), [X, ptr], place, (len(cut),))


def test_softmax_backward_by_name():
    y = X.softmax(1)

    def fn(g, y, d):
        with st.fallback("error"):
            return torch._softmax_backward_data(g, y, d, D)

    for cut in T.cuts(ROWS):
        for d in (0, 1):
            T.hold(fn, [X, y, d], [T.shard(0, cut), T.shard(0, cut), None], (len(cut),))


def test_large_sums_of_messages_are_cut():
    """Nobody read rows of so many nodes before: what each of them gets is cut all the same."""
    n, width = 2**15, 8
    source = torch.randn(64, width, dtype=D)
    at = torch.randint(0, n, (64,))

    def run(x, index):
        index = index.view(-1, 1).expand_as(x)
        out = x.new_zeros(n, width).scatter_add_(0, index, x)
        if isinstance(out, st.ShardTensor):
            assert out.spec.dims[0].is_cut
        return out

    T.hold(run, [source, at], [T.shard(0), T.shard(0)], (3,))


def summed(method, dim):
    """Sums of messages in plain zeros, as torch_scatter makes them."""

    def run(x, m, index):
        messages = torch.cat([x, x], dim).index_select(dim, index) * m
        size = list(messages.shape)
        size[dim] = x.shape[dim]
        out = torch.zeros(size, dtype=D)
        at = index.view([-1 if d == dim else 1 for d in range(messages.ndim)])
        if method == "index_add_":
            out.index_add_(dim, index % x.shape[dim], messages)
        elif method == "scatter_reduce_":
            out.scatter_reduce_(dim, (at % x.shape[dim]).expand_as(messages), messages, "amax")
        else:
            getattr(out, method)(dim, (at % x.shape[dim]).expand_as(messages), messages)
        if isinstance(x, st.ShardTensor):
            assert isinstance(out, st.ShardTensor) and out.spec.dims == x.spec.dims
        return out

    return run


@pytest.mark.parametrize("method", ["scatter_add_", "scatter_reduce_", "index_add_"])
def test_plain_zeros_of_nodes_lie_as_the_nodes(method):
    nodes, index = torch.randn(9, 2, dtype=D), torch.randint(0, 18, (30,))
    for cut in ((5, 4), (2, 0, 7), (3, 1, 4, 1)):
        for place in (None, T.shard(0)):
            m = torch.randn(30, 1, dtype=D)
            T.hold(
                summed(method, 0), [nodes, m, index], [T.shard(0, cut), None, place], (len(cut),)
            )
    batch = torch.randn(2, 9, 2, dtype=D)
    m = torch.randn(2, 30, 1, dtype=D)
    T.hold(summed(method, 1), [batch, m, index], [T.shard(1, (2, 0, 7)), None, None], (3,))


def test_zeros_that_something_else_holds_stay_plain():
    kept = []

    def run(x, index):
        out = torch.zeros(4, 2, dtype=D)
        kept.append(out)
        messages = x.index_select(0, index)
        out.scatter_add_(0, (index % 4).view(-1, 1).expand_as(messages), messages.detach())
        assert type(out) is torch.Tensor
        return out + x.sum()

    T.hold(run, [torch.randn(4, 2, dtype=D), torch.randint(0, 4, (9,))], [T.shard(0), None], (2,))


@pytest.mark.parametrize("ends", [[5, 5, 14], [0, 14, 14], [4, 9, 14]])
@pytest.mark.parametrize("cut", [(14,), (6, 8), (14, 0), (1, 9, 0, 4)])
def test_groups_of_rows_times_matrices(ends, cut):
    """In single precision, as torch has no other on CPUs; nothing is gathered."""
    x, matrices, ends = torch.randn(14, 8), torch.randn(3, 8, 16), torch.tensor(ends).int()

    def product(x, matrices):
        return torch._grouped_mm(x, matrices, offs=ends)

    T.hold(product, [x, matrices], [T.shard(0, cut), None], (len(cut),))


def test_groups_of_rows_that_shards_cut_lie_row_by_row(monkeypatch):
    given, plain = [], torch._grouped_mm

    def product(x, *args, **kwargs):
        given.append(x.is_contiguous())
        return plain(x, *args, **kwargs)

    matrices, ends = torch.randn(1, 8, 16), torch.tensor([14]).int()

    def run():
        x = st.distribute_tensor(torch.randn(8, 14), T.make_mesh((2,)), [Shard(1)])
        return plain(x.T, matrices, offs=ends).shape

    monkeypatch.setattr(torch, "_grouped_mm", product)
    st.simulate(2, run)
    assert given == [True, True]
