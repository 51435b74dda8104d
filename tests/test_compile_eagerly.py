"""What no graph holds: refused where the whole is wanted, else run eagerly, and written once."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh

F64 = torch.float64


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 3


def hooked(x):
    y = x * 2
    y.register_hook(lambda g: g * 2)
    return y


def differentiated(x):
    y = torch.tanh(x)
    return torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)[0]


REFUSED = {
    "Function": (lambda x: Doubled.apply(x), "autograd|would lose its backward"),
    "reentrant checkpoint": (
        lambda x: torch.utils.checkpoint.checkpoint(lambda y: y * 2, x, use_reentrant=True),
        "use_reentrant=False",
    ),
    "hook on a tensor": (hooked, "register_hook inside a compiled program"),
    "gradient": (differentiated, "grad inside a compiled program"),
    "a value": (lambda x: x * 2 if x.sum() > 0 else x, "needs the value of a tensor"),
}


def refused(name):
    x = torch.linspace(-1, 2, 16, dtype=F64).view(4, 4)
    s = st.distribute_tensor(x, make_mesh((2,)), [Shard(0)], src_data_rank=None).requires_grad_()
    st.compile(REFUSED[name][0], backend="eager", fullgraph=True)(s)


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_would_lose_is_refused(name):
    with pytest.raises(st.RankError, match=REFUSED[name][1]) as e:
        st.simulate(2, refused, name)
    assert isinstance(e.value.__cause__, st.UnsupportedOpError)


def by_branch(x):
    n = x.sum().item()
    if n > 100:
        return x
    return x * n


def by_mask(x):
    return x[x > 0]


def by_function(x):
    return Doubled.apply(x)


def inside_another(x):
    return torch.relu(by_branch(x))


# by name: a program, and how many lines below its first the graph breaks
BREAKS = {
    "branch": (by_branch, by_branch, 2), "mask": (by_mask, by_mask, 1), "hook": (hooked, hooked, 2),
    "gradient": (differentiated, differentiated, 2),
    "Function": (by_function, by_function, 1), "inner": (inside_another, by_branch, 2),
}  # fmt: skip


def warned(name, fullgraph):
    x = torch.linspace(-1, 2, 16, dtype=F64).view(4, 4)
    s = st.distribute_tensor(x, make_mesh((2,)), [Shard(0)], src_data_rank=None).requires_grad_()
    fn = st.compile(BREAKS[name][0], backend="eager", fullgraph=fullgraph)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fn(s)
        return [str(w.message) for w in caught]
    except st.UnsupportedOpError as e:
        return [str(e)]


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("name", BREAKS)
def test_the_line_that_breaks_a_graph_is_named(name, fullgraph):
    _, where, below = BREAKS[name]
    code = where.__code__
    line = f"({code.co_filename}:{code.co_firstlineno + below})"
    # of the process, so that one simulated rank may have those of another
    texts = [text for rank in st.simulate(2, warned, name, fullgraph) for text in rank]
    assert any(line in text for text in texts), texts


def gone_through(fn, x):
    """The result of two calls, and their gradients."""
    torch.manual_seed(0)
    x = x.requires_grad_()
    found = []
    for _ in range(2):
        y = fn(x)
        found += [y.detach(), *torch.autograd.grad((y * y.detach().cos()).sum(), [x])]
    return found


class Counted(nn.Module):
    """Its state has changed when the trace breaks off."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def forward(self, x):
        self.n += 1
        return Doubled.apply(x) * self.n


class Averaged(nn.Module):
    """A function of it closes over the buffer; a module has it as an input."""

    def __init__(self, way):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4, dtype=F64))
        self.norm = nn.BatchNorm1d(4, dtype=F64)
        self.way = way

    def forward(self, x):
        if self.way == "norm":
            return self.norm(x) * self.norm.running_mean
        if self.way == "out":
            return x * torch.add(self.mean, 1.0, out=self.mean)
        if self.way == "row":
            self.mean[1:] += 1
        else:
            self.mean.mul_(0.5).add_(1.0)
        return x * self.mean

    @property
    def function(self):
        return lambda x: self(x)


WRITES = ("norm", "out", "row", "in place")


@pytest.mark.parametrize("way", WRITES)
@pytest.mark.parametrize("closed_over", [False, True])
def test_writes_to_tensors_happen_once(way, closed_over):
    x = torch.linspace(-1, 2, 24, dtype=F64).view(6, 4)

    def calls(model, place, compiled):
        fn = model.function if closed_over else model
        fn = compiled(fn) if compiled else fn
        found = [fn(place(x[:n])) for n in (6, 6, 4, 4)]
        found = [y.full_tensor() if isinstance(y, st.ShardTensor) else y for y in found]
        return [*found, model.mean, model.norm.running_mean]

    want = calls(Averaged(way), lambda t: t, None)

    def run():
        mesh = make_mesh((2,))
        return calls(
            Averaged(way), lambda t: st.distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None),
            lambda f: st.compile(f, backend="eager"),
        )  # fmt: skip

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for got in st.simulate(2, run):
            for g, w in zip(got, want, strict=True):
                torch.testing.assert_close(g, w, rtol=1e-12, atol=0)


EAGER = {k: REFUSED[k][0] for k in ("Function", "hook on a tensor", "gradient", "a value")}
EAGER["counter"] = Counted()


@pytest.mark.parametrize("name", EAGER)
def test_what_no_graph_holds_runs_eagerly(name):
    x = torch.linspace(-1, 2, 16, dtype=F64).view(4, 4)
    want = gone_through(copy.deepcopy(EAGER[name]), x.clone())

    def run():
        s = st.distribute_tensor(x, make_mesh((2,)), [Shard(0)], src_data_rank=None)
        compiled = st.compile(copy.deepcopy(EAGER[name]), backend="eager")
        return [t.full_tensor() for t in gone_through(compiled, s)], compiled.traces

    with pytest.warns(UserWarning, match="runs eagerly where no graph holds it"):
        ranks = st.simulate(2, run)
    for got, traces in ranks:
        assert traces == 0
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-12, atol=0)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = 0

    def forward(self, x):
        self.n += 1
        return x * self.n


def test_state_that_every_call_changes_is_refused_where_the_whole_is_wanted():
    """The first call may fill a cache."""

    def run():
        s = st.distribute_tensor(torch.ones(4), make_mesh((2,)), [Shard(0)], src_data_rank=None)
        net = Counting()
        call = st.compile(net, backend="eager", fullgraph=True)
        call(s)
        for _ in range(2):
            with pytest.raises(st.UnsupportedOpError, match="n: 1 -> 2"):
                call(s)
        assert net.n == 1

    st.simulate(2, run)


class Careful(nn.Module):
    """Raises after it has written to a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        if x.shape[0] > 4:
            raise KeyError("too many")
        return x * self.seen


def calls_with_errors(call, net, place):
    found = []
    for n in (4, 5, 4, 5, 5, 4):
        try:
            found.append(call(place(torch.ones(n, 2))))
        except KeyError:
            found.append(net.seen.clone())
    return found


def test_what_is_written_before_an_error_is_written():
    plain = Careful()
    want = calls_with_errors(plain, plain, lambda x: x)

    def run():
        net = Careful()
        found = calls_with_errors(
            st.compile(net, backend="eager"),
            net,
            lambda x: st.distribute_tensor(x, make_mesh((2,)), [Shard(0)], src_data_rank=None),
        )
        for f, w in zip(found, want, strict=True):
            assert torch.equal(f.full_tensor() if isinstance(f, st.ShardTensor) else f, w)

    st.simulate(2, run)


class Sparse(nn.Module):
    """A buffer of compressed rows, which has no strides."""

    def __init__(self):
        super().__init__()
        self.register_buffer("a", torch.eye(4).to_sparse_csr())

    def forward(self, x):
        return x @ self.a.to_dense() * 2


def test_a_buffer_without_strides():
    def run():
        x = torch.arange(8.0).view(2, 4)
        s = st.distribute_tensor(x, make_mesh((2,)), [Shard(0)], src_data_rank=None)
        call = st.compile(Sparse(), backend="eager")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert all(torch.equal(call(s).full_tensor(), x * 2) for _ in range(3))

    st.simulate(2, run)


BY_TYPE: dict[type, int] = {}


def by_type(x):
    for y in (x, torch.ones(4).sin()):
        if type(y) not in BY_TYPE:
            BY_TYPE[type(y)] = 2
    return x * BY_TYPE[type(x)]


def test_a_table_by_type_that_a_trace_fills():
    def run():
        s = st.distribute_tensor(torch.ones(4), make_mesh((2,)), [Shard(0)], src_data_rank=None)
        call = st.compile(by_type, backend="eager", fullgraph=True)
        for _ in range(3):
            assert call(s).full_tensor().tolist() == [2.0] * 4
        assert call.traces == 1

    st.simulate(2, run)
