"""torch_scatter's extrema, their places, and sorted indices on shards, against loops.

The package has no build to test: here are its signatures, and formulas of its composites.
"""

import inspect
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

import pytest
import torch
from torch.distributed.tensor import Partial, Shard

import shardtensor as st
from shardtensor import testing as T

D = torch.float64
ROWS = 13
G = torch.Generator().manual_seed(3)
INDEX = torch.randint(0, 6, (ROWS,), generator=G)
SORTED = INDEX.sort()[0]
ENDS = torch.tensor([0, 0, 3, 4, 4, 10, 13])
SAMPLES = torch.stack([ENDS, torch.tensor([1, 2, 3, 5, 5, 9, 11])])
REPEATS = torch.tensor([0, 2, 2, 3, 9, 10, 11, 11, 12, 14, 15, 20, 21, 22])
X = torch.randn(ROWS, 3, dtype=D, generator=G)
TIES = (X * 2).round()
BATCH = torch.randn(2, ROWS, 3, dtype=D, generator=G)


# stand-ins ----------------------------------------------------------------------------------------


def expanded(index, src, dim):
    index = index.view(*[1] * dim, -1) if index.ndim == 1 else index
    return index.reshape(*index.shape, *[1] * (src.ndim - index.ndim)).expand(src.shape)


def extremum(src, index, dim, size, largest):
    """The first that is better than all before; of NaNs and infinities that lose, none."""
    assert type(src) is torch.Tensor
    dim %= src.ndim
    rows = src.movedim(dim, -1)
    numbers = expanded(index, src, dim).movedim(dim, -1).reshape(-1, src.shape[dim])
    n = int(index.max()) + 1 if size is None else size
    flat, lost = rows.reshape(numbers.shape), src.shape[dim]
    at = torch.full((len(flat), n), lost)
    worst = torch.finfo(D).min if largest else torch.finfo(D).max
    for b, (values, ks) in enumerate(zip(flat.tolist(), numbers.tolist(), strict=True)):
        for r, (v, k) in enumerate(zip(values, ks, strict=True)):
            best = values[at[b, k]] if at[b, k] < lost else worst
            if v > best if largest else v < best:
                at[b, k] = r
    found = torch.where(at < lost, flat.gather(1, at.clamp(max=lost - 1)), 0)
    shape = *rows.shape[:-1], n
    return found.view(shape).movedim(-1, dim), at.view(shape).movedim(-1, dim)


def scatter_max(src, index, dim=-1, out=None, dim_size=None):
    return extremum(src, index, dim, dim_size, True)


def scatter_min(src, index, dim=-1, out=None, dim_size=None):
    return extremum(src, index, dim, dim_size, False)


def number(src, indptr):
    n = indptr.shape[-1] - 1
    rows = torch.arange(src.shape[indptr.ndim - 1]).expand(*indptr.shape[:-1], -1).contiguous()
    k = torch.searchsorted(indptr, rows, right=True) - 1
    return torch.where((k >= 0) & (k < n), k, n), n, indptr.ndim - 1


def segment_max_csr(src, indptr, out=None):
    k, n, d = number(src, indptr)
    return tuple(x.narrow(d, 0, n) for x in extremum(src, k, d, n + 1, True))


def segment_min_csr(src, indptr, out=None):
    k, n, d = number(src, indptr)
    return tuple(x.narrow(d, 0, n) for x in extremum(src, k, d, n + 1, False))


def gather_csr(src, indptr, out=None):
    assert type(src) is torch.Tensor
    if indptr.ndim == 1:
        return src.repeat_interleave(indptr.diff(), 0)
    pairs = zip(src, indptr, strict=True)
    return torch.stack([x.repeat_interleave(p.diff(), 0) for x, p in pairs])


def segment_max_coo(src, index, out=None, dim_size=None):
    return extremum(src, index, index.ndim - 1, dim_size, True)


def segment_min_coo(src, index, out=None, dim_size=None):
    return extremum(src, index, index.ndim - 1, dim_size, False)


def segment_sum_coo(src, index, out=None, dim_size=None):
    assert type(src) is torch.Tensor
    shape, d = list(src.shape), index.ndim - 1
    shape[d] = int(index.max()) + 1 if dim_size is None else dim_size
    return torch.zeros(shape, dtype=src.dtype).scatter_add(d, expanded(index, src, d), src)


def segment_mean_coo(src, index, out=None, dim_size=None):
    counts = segment_sum_coo(torch.ones_like(src), index, out, dim_size).clamp(min=1)
    return segment_sum_coo(src, index, out, dim_size) / counts


def gather_coo(src, index, out=None):
    assert type(src) is torch.Tensor
    if index.ndim == 1:
        return src[index]
    return torch.stack([x[i] for x, i in zip(src, index, strict=True)])


KERNELS = {
    "torch_scatter": (),
    "torch_scatter.scatter": (scatter_max, scatter_min),
    "torch_scatter.segment_csr": (segment_max_csr, segment_min_csr, gather_csr),
    "torch_scatter.segment_coo": (
        segment_max_coo, segment_min_coo, segment_sum_coo, segment_mean_coo, gather_coo,
    ),
}  # fmt: skip


class Package(Loader, MetaPathFinder):
    """Modules of these functions, which importing finds."""

    def find_spec(self, name, path, target=None):
        found = name in KERNELS
        return ModuleSpec(name, self, is_package="." not in name) if found else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        for fn in KERNELS[module.__name__]:
            setattr(module, fn.__name__, fn)


@pytest.fixture(scope="module")
def package():
    """The names of the package, with the rules that its import brings."""
    finder = Package()
    sys.meta_path.append(finder)
    here = dict(globals())
    try:
        modules = [__import__(m, fromlist=["_"]) for m in KERNELS]
        yield {k: v for m in modules for k, v in vars(m).items() if inspect.isfunction(v)}
    finally:
        sys.meta_path.remove(finder)
        for m in KERNELS:
            sys.modules.pop(m, None)
        # rules replace the names of this module, too
        globals().update({f.__name__: here[f.__name__] for fs in KERNELS.values() for f in fs})


# composites ---------------------------------------------------------------------------------------


def summed(src, index, dim, size):
    shape = list(src.shape)
    shape[dim] = size
    return torch.zeros(shape, dtype=src.dtype).scatter_add_(dim, index, src)


def softmax(package, src):
    index = expanded(INDEX, src, 0)
    e = (src - package["scatter_max"](src, index, 0)[0].gather(0, index)).exp_()
    return e.div(summed(e, index, 0, 6).gather(0, index))


def logsumexp(package, src):
    index = expanded(INDEX, src, 0)
    top = package["scatter_max"](src, index, dim=0, dim_size=8)[0]
    sums = summed((src - top.gather(0, index)).exp_(), index, 0, 8)
    return sums.add(1e-12).log_().add(top)


def std(package, src):
    index = expanded(INDEX, src, 0)
    count = summed(torch.ones(ROWS, dtype=D), INDEX, 0, 6).clamp(1).view(-1, 1)
    mean = summed(src, index, 0, 6).div(count)
    off = src - mean.gather(0, index)
    return summed(off * off, index, 0, 6).div(count.sub(1).clamp_(1) + 1e-6).sqrt()


# cases --------------------------------------------------------------------------------------------

FLAT = [
    (T.shard(0), (2,)),
    (T.shard(0, (6, 0, 7)), (3,)),
    (T.shard(0, (0, 12, 0, 1)), (4,)),
    (T.On([Shard(0), Shard(1)]), (2, 2)),
    (T.On([Partial()]), (2,)),
]
DEEP = [(T.shard(1, (6, 0, 7)), (3,)), (T.shard(0), (2,)), (T.On([Shard(1), Shard(2)]), (2, 2))]
CALLS = {
    "max": lambda p, x: p["scatter_max"](x, INDEX, 0),
    "min, ties": lambda p, x: p["scatter_min"](x.round(), INDEX, dim=0, dim_size=9),
    "infinite, NaN": lambda p, x: p["scatter_max"](
        x.masked_fill(x < 0, -torch.inf).masked_fill(x > 1, torch.nan), INDEX, 0
    ),
    "csr max": lambda p, x: p["segment_max_csr"](x.round(), ENDS),
    "csr min, rows in no run": lambda p, x: p["segment_min_csr"](x, SAMPLES[1]),
    "csr gather": lambda p, x: p["gather_csr"](x, REPEATS),
    "coo max": lambda p, x: p["segment_max_coo"](x, SORTED),
    "coo sum": lambda p, x: p["segment_sum_coo"](x, SORTED, dim_size=8),
    "coo mean": lambda p, x: p["segment_mean_coo"](x, SORTED),
    "coo gather": lambda p, x: p["gather_coo"](x, torch.tensor([0, 0, 1, 4, 4, 12])),
    "softmax": softmax,
    "logsumexp": logsumexp,
    "std": std,
}
OF_SAMPLES = {
    "max": lambda p, x: p["scatter_max"](x, INDEX, -2),
    "last dim": lambda p, x: p["scatter_min"](x.transpose(1, 2), INDEX),
    "csr": lambda p, x: p["segment_max_csr"](x, SAMPLES),
    "csr gather": lambda p, x: p["gather_csr"](x[:, :6], SAMPLES.new_tensor(
        [[0, 2, 2, 3, 9, 10, 11], [0, 1, 2, 3, 4, 5, 11]]
    )),
    "coo": lambda p, x: p["segment_mean_coo"](x, torch.stack([SORTED, SORTED + 1]), dim_size=7),
    "coo gather": lambda p, x: p["gather_coo"](x, torch.tensor([[0, 0, 1], [4, 4, 12]])),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_values_places_and_gradients(package, call):
    for place, mesh in FLAT:
        T.hold(lambda x: CALLS[call](package, x), [X], [place], mesh)


@pytest.mark.parametrize("call", OF_SAMPLES)
def test_samples(package, call):
    for place, mesh in DEEP:
        T.hold(lambda x: OF_SAMPLES[call](package, x), [BATCH], [place], mesh)


def test_sharded_indices_and_numbers(package):
    def run(x, index, ends):
        return [
            package["scatter_max"](x, index, 0, dim_size=7),
            package["segment_max_csr"](x, ends),
            package["scatter_min"]((x * 3).long(), index, 0, dim_size=7),
        ]

    T.hold(run, [TIES, INDEX, ENDS], [T.shard(0)] * 3, (2,))


def test_the_gradient_of_the_gradient(package):
    def run(x):
        y = package["scatter_max"](x, INDEX, 0)[0]
        (g,) = torch.autograd.grad((y * y).sin().sum(), x, create_graph=True)
        return g.square()

    T.hold(run, [X], [T.shard(0, (6, 0, 7))], (3,))


def test_out_is_the_package_s(package):
    def rank():
        x = st.distribute_tensor(X, T.make_mesh((2,)), [Shard(0)], src_data_rank=None)
        with pytest.raises(AssertionError):
            package["scatter_max"](x, INDEX, 0, torch.zeros(6, 3, dtype=D))

    st.simulate(2, rank)
