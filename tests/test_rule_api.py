"""`shardtensor.rule` for what users bring: functions, custom ops, Functions, modules."""

import sys
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard
from torch.overrides import handle_torch_function as _told
from torch.overrides import has_torch_function as _asks

import shardtensor as st
from shardtensor import comm
from shardtensor.ranks.testing import cuts, hold, make_mesh, same, shard, simulate
from shardtensor.spec import Dim
from shardtensor.tensor import wrap


@torch.library.custom_op("shardtensor_tests::mean3", mutates_args=())
def mean3(x: torch.Tensor) -> torch.Tensor:
    """Means of three neighbours along dim 0, by a kernel that reads memory as it lies."""
    return torch.from_numpy((x.numpy()[:-2] + x.numpy()[1:-1] + x.numpy()[2:]) / 3)


def _backward(ctx, g):
    return sum(torch.nn.functional.pad(g, (0, 0, i, 2 - i)) for i in range(3)) / 3


mean3.register_autograd(_backward)


def plain_mean3(x):
    """The same as a function that knows nothing of overrides."""
    return mean3(x)


@torch.overrides.wrap_torch_function(lambda x: (x,))
def asking_mean3(x):
    return mean3(x)


class Mean3(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x, *, twice=False):
        return plain_mean3(x) * self.scale * (2 if twice else 1)


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.detach().numpy() * 3)

    @staticmethod
    def backward(ctx, g):
        return g * 3


def windowed(x, kernel):
    """Rows i to i + 2 of the input for row i of the result."""
    dim, local = x.spec.dims[0], x.to_local()
    out = Dim(dim.size - 2)
    if dim.axes:
        ends = [min(end, dim.size - 2) for end in dim.offsets]
        # a rank without rows of the result runs the kernel all the same
        windows = [(a, b + 2) if a < b else (0, 2) for a, b in pairwise(ends)]
        local = comm.window(local, 0, dim.sizes, windows, comm.group(x.device_mesh, dim.axes))
        out = Dim(dim.size - 2, dim.axes, tuple(b - a for a, b in pairwise(ends)))
    return wrap(kernel(local), x.spec.with_dims([out, *x.spec.dims[1:]]))


@st.rule(mean3)
def mean3_rule(x):
    return windowed(x, mean3)


@st.rule(plain_mean3)
def plain_rule(x):
    return windowed(x, plain_mean3)


@st.rule(asking_mean3)
def asking_rule(x):
    return windowed(x, asking_mean3)


@st.rule(Function)
def function_rule(x):
    return wrap(Function.apply(x.to_local()), x.spec)


def asking_by_another_name(x):
    """A function without a rule that is overridden as those of torch.foreach are."""
    if _asks((x,)):
        return _told(asking_by_another_name, (x,), x)
    return x.roll(1, 0) - x


X = torch.randn(7, 3, dtype=torch.float64)


@pytest.mark.parametrize("cut", cuts(7))
@pytest.mark.parametrize("name", ["mean3", "plain_mean3", "asking_mean3"])
def test_functions(name, cut):
    fn = getattr(sys.modules[__name__], name)
    if fn is mean3:
        hold(lambda x: torch.ops.shardtensor_tests.mean3(x) * 2, [X], [shard(0, cut)], (len(cut),))
    hold(lambda x: fn(x) * 2, [X], [shard(0, cut)], (len(cut),))


@pytest.mark.parametrize("cut", cuts(7))
def test_a_function_runs_whatever_it_calls_its_check_for_overrides(cut):
    hold(asking_by_another_name, [X], [shard(0, cut)], (len(cut),))


def test_the_original_stays_within_reach():
    assert plain_mean3.__wrapped__(X).equal(plain_mean3(X))
    assert plain_mean3.__doc__.startswith("The same")


def test_autograd_function():
    hold(lambda x: Function.apply(x * 2), [X], [shard(0, (4, 0, 3))], (3,))


def test_module():
    hold(Mean3(), [X], [shard(0, (4, 3))], (2,), kwargs={"twice": True})
    called = []

    class Own(Mean3):
        pass

    @st.rule(Own)
    def own(module, x, *, twice=False):
        called.append(twice)
        return Own.forward.__wrapped__(module, x, twice=twice)

    hold(Own(), [X], [shard(0)], (2,), kwargs={"twice": True})
    assert called == [True, True]
    hold(Mean3(), [X], [shard(0)], (2,))
    assert len(called) == 2, "the base class has no rule"


def late(x):
    raise AssertionError("has a rule")


def test_functions_by_name():
    @st.rule(f"{__name__}.late", f"{__name__}.missing", "no_such_module.function")
    def rule(x):
        return wrap(x.to_local() * 3, x.spec)

    hold(lambda x: late(x) if isinstance(x, st.ShardTensor) else x * 3, [X], [shard(0)], (2,))


def test_a_function_that_cannot_be_replaced():
    def local(x):
        return x

    with pytest.raises(ValueError, match="wrap_torch_function"):
        st.rule(local)(lambda x: x)


def _without_rule():
    x = st.distribute_tensor(X, make_mesh((2,)), [Shard(0)])
    with pytest.raises(RuntimeError):
        x.data_ptr()  # a kernel would read this rank's rows as if they were all
    with st.fallback("error"), pytest.raises(st.UnsupportedOpError, match="flipped"):
        flipped(x)
    assert flipped(x).full_tensor().equal(X.flip(0))


@torch.library.custom_op("shardtensor_tests::flipped", mutates_args=())
def flipped(x: torch.Tensor) -> torch.Tensor:
    return x.flip(0)


@pytest.mark.filterwarnings("ignore::shardtensor.FallbackWarning")
def test_a_custom_op_without_a_rule_gathers_or_is_refused():
    st.simulate(2, _without_rule)


def test_a_rule_for_an_overload_of_an_aten_op_is_called():
    key, calls = torch.ops.aten.add.Tensor, []

    def doubled(self, other, *, alpha=1):
        calls.append(alpha)
        return st.tensor.wrap((self._local + alpha * other._local) * 2, self._spec)

    x = torch.arange(6.0, dtype=torch.float64)

    def run():
        s = st.distribute_tensor(x, make_mesh((2,)), [Shard(0)], src_data_rank=None)
        s.requires_grad_()
        for y in (s + s, torch.add(s, s), s.add(s), torch.ops.aten.add.Tensor(s, s)):
            same(y, x * 4, "sum")
        same(torch.add(s, s, alpha=2), x * 6, "sum with a factor")
        same(torch.autograd.grad((s + s).sum(), s)[0], torch.full_like(x, 4), "gradient")

    st.rule(key)(doubled)
    try:
        simulate(2, run)
    finally:
        del st.registry.rules[key]
        st.registry.handlers.clear()
    assert calls


def test_what_a_custom_op_returns_is_cut_where_its_operand_was():
    x = torch.arange(20.0, dtype=torch.float64).view(5, 4)

    @torch.library.custom_op("shapes_test::rows", mutates_args=())
    def rows(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x], 1)

    def run():
        mesh = make_mesh((2,))
        s = st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None, sizes={0: (1, 4)})
        y = rows(s)
        assert y.placements == (Shard(0),) and y.spec.sizes == {0: (1, 4)}
        same(y, torch.cat([x, x], 1), "rows")

    simulate(2, run)


def narrower(x):
    return x[1:]


def test_a_rule_that_gives_another_shape_than_its_spec_says():
    @st.rule(narrower)
    def _(x):
        return wrap(x.to_local()[1:], x.spec)

    def run():
        x = st.distribute_tensor(torch.zeros(5, 2), make_mesh((2,)), [Shard(0)])
        with pytest.raises(RuntimeError, match=r"the rule .*_ gave a local tensor of shape"):
            narrower(x)

    simulate(2, run)


class Scaled:
    """A stand-in for a tensor, as torch.fx has them."""

    def __init__(self, value):
        self.value = value

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        given = [a.value * 2 if isinstance(a, cls) else a for a in args]
        return func(*given, **(kwargs or {}))


def test_a_class_that_is_no_tensor_has_its_way():
    w = torch.linspace(0, 1, 12, dtype=torch.float64).reshape(3, 4)
    for fn in (lambda x: nn.functional.linear(x, Scaled(w)), lambda x: torch.mul(x, Scaled(w[0]))):
        hold(fn, [torch.ones(5, 4, dtype=torch.float64)], [shard(0, (2, 3))], (2,))


def test_the_name_of_a_tensor():
    hold(lambda x: x * (2 if x.name is None else 3), [torch.ones(4)], [shard(0)], (2,))
