"""Errors that depend on values: raised on every rank, whichever holds them, in step with the others."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from raising import raised
from test_watch import launched
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh
from shardtensor.rules.agreed import agreed_sums

X = torch.linspace(0.1, 0.9, 24, dtype=torch.float64).reshape(6, 4)
LABELS = torch.tensor([0, 1, 2, 3, 0, 9])
W = torch.linspace(0.5, 1, 4, dtype=torch.float64)
TWO = ("mean", "sum")
# what is wrong lies in the last row
CASES = {
    **{f"nll_loss {r}": lambda x, t, r=r: F.nll_loss(x, t, reduction=r) for r in TWO},
    **{f"cross_entropy {r}": lambda x, t, r=r: F.cross_entropy(x, t, W, reduction=r) for r in TWO},
    **{f"bce {r}": lambda x, t, r=r: F.binary_cross_entropy(x + (x > 0.8), x, reduction=r) for r in TWO},
    **{f"bce of NaN, weighted {r}": lambda x, t, r=r: F.binary_cross_entropy(x.where(x < 0.8, torch.nan), x.detach(), W, reduction=r) for r in TWO},
    "smoothed": lambda x, t: F.cross_entropy(x, t, label_smoothing=0.2),
    "of pixels": lambda x, t: F.cross_entropy(x[..., None, None], t[:, None, None]),
    "negative": lambda x, t: F.cross_entropy(x, -t),
    "multi_margin": lambda x, t: F.multi_margin_loss(x, t),
    "multilabel_margin": lambda x, t: F.multilabel_margin_loss(x, t[:, None].expand(6, 4).contiguous(), reduction="sum"),
    "max_norm": lambda x, t: F.embedding(t, x.detach()[0].expand(4, 4).clone(), max_norm=1.0),
    "bernoulli": lambda x, t: torch.bernoulli(x + (x > 0.8)),
    "bernoulli_": lambda x, t: x.detach().clone().bernoulli_(x + (x > 0.8)),
    "normal": lambda x, t: torch.normal(x, 0.8 - x),
    "sorter": lambda x, t: torch.searchsorted(x.mT[:1], x.mT[:1], sorter=t[None]),
    "one_hot": lambda x, t: F.one_hot(t, 4), "div": lambda x, t: 5 // (t - 9),
    "repeats": lambda x, t: x.repeat_interleave(5 - t, 0), "columns": lambda x, t: x[:, t],
    "written": lambda x, t: x.detach().clone().index_put_((torch.arange(6), t), x.detach()[:, 0]),
    "lu_factor": lambda x, t: torch.linalg.lu_factor(x[:, :1, None] * (t < 9)[:, None, None]), "inv": lambda x, t: torch.linalg.inv(x[:, :1, None] * (t < 9)[:, None, None]),
    "of all": lambda x, t: W.clone().index_put_((t,), x.detach()[:, 0]), "bag": lambda x, t: F.embedding_bag(t[:, None], x.detach()),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_rank_raises_and_goes_on(name):
    want = raised(CASES[name], X.clone().requires_grad_(), LABELS)
    assert isinstance(want, RuntimeError | IndexError)

    def run():
        mesh = make_mesh((3,))
        x, t = (
            st.distribute_tensor(v, mesh, [Shard(0)], src_data_rank=None, sizes={0: (3, 0, 3)})
            for v in (X, LABELS)
        )
        error = raised(CASES[name], x.requires_grad_(), t)
        assert isinstance(error, RuntimeError | IndexError), repr(error)
        assert not isinstance(error, st.DivergenceError), repr(error)
        # nobody waits in what the others left
        assert x.detach().sum().item() == pytest.approx(X.sum().item())

    st.simulate(3, run)


# they send nothing
TABLE = torch.linspace(0, 1, 8, dtype=torch.float64).reshape(4, 2)
APART = {
    "embedding": lambda x, t: F.embedding(t, TABLE), "rows": lambda x, t: TABLE[t], "take": lambda x, t: TABLE.take(t),
    "index_select": lambda x, t: TABLE.index_select(0, t), "gather": lambda x, t: x.gather(1, t[:, None]),
    "gather by a plain index": lambda x, t: x.gather(1, LABELS[:, None]),
    "cross_entropy": lambda x, t: F.cross_entropy(x, t, reduction="none"),
    "nll_loss": lambda x, t: F.nll_loss(x, -t, reduction="none"),
    "bce": lambda x, t: F.binary_cross_entropy(x + (x > 0.8), x, reduction="none"),
    "multi_margin": lambda x, t: F.multi_margin_loss(x, t, reduction="none"),
    "unpool": lambda x, t: F.max_unpool1d(x[:, None], (t[:, None] + torch.arange(4))[:, None], 2),
}  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_a_rank_that_caught_what_others_know_nothing_of_meets_them_no_more(name):
    want = type(raised(APART[name], X, LABELS))

    def run():
        mesh = make_mesh((3,))
        x, t = (
            st.distribute_tensor(v, mesh, [Shard(0)], src_data_rank=None, sizes={0: (3, 0, 3)})
            for v in (X, LABELS)
        )
        error = raised(APART[name], x, t)
        assert type(error) in (want, type(None)), repr(error)
        # what the others get in the next step would be what this one has in another
        after = raised(lambda: x.sum().item())
        return error is not None, str(after)

    found = st.simulate(3, run)
    assert any(raises for raises, _ in found) and not all(raises for raises, _ in found)
    for raises, after in found:
        assert ("this rank raised" if raises else "wait for each other") in after


class Rows(torch.nn.Embedding):
    """Those that a buffer of it names, if no others are asked for."""

    def __init__(self):
        super().__init__(4, 2)
        self.register_buffer("index", torch.tensor([0, 1, 2, 3]))

    def forward(self, index=None):
        return super().forward(self.index if index is None else index)


def of_rows(net, t):
    """It sums what it closes over, and gives no shard."""
    return lambda: net.forward(t).sum()


@pytest.mark.parametrize("way", ["argument", "buffer", "closed over"])
def test_a_compiled_program_sets_its_rank_apart(way):
    def run():
        net, mesh = Rows(), make_mesh((2,))
        how = {"backend": "aot_eager"}
        call, found = st.compile(net, **how), []
        for last in (3, 9):
            t = torch.tensor([0, 1, 2, last])
            t = st.distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None)
            net.index = t if way == "buffer" else net.index
            call = st.compile(of_rows(net, t), **how) if way == "closed over" else call
            found.append(raised(call, *[t] * (way == "argument")))
        return [e is None for e in found], str(raised(lambda: t.sum().item()))

    (one, after), (other, later) = st.simulate(2, run)
    # what gives shards sends nothing itself
    assert one == [True, way != "closed over"] and other == [True, False]
    assert "wait for each other" in after and "this rank raised IndexError" in later
    # a module by its class: all that it consists of would be pages
    assert ("(<lambda> of " if way == "closed over" else "(Rows of ") in later


def test_an_index_that_all_ranks_have_is_an_error_of_all():
    def run():
        x = st.distribute_tensor(X, make_mesh((2,)), [Shard(0)], src_data_rank=None)
        for fn in (lambda: x[:, LABELS], lambda: x.detach().clone().index_fill_(1, LABELS, 0.0)):
            assert isinstance(raised(fn), IndexError)
        return x.sum().item()

    assert st.simulate(2, run) == pytest.approx([X.sum().item()] * 2)


@pytest.mark.parametrize("sizes", [(2, 0, 2), (0, 0, 4)])
@pytest.mark.parametrize(
    "way", [lambda x, at: x.index_select(0, at), lambda x, at: F.embedding(at, x)]
)
def test_rows_that_are_empty_on_a_rank_raise_there_what_others_raise(way, sizes):
    """Torch raises errors of two types, of which a program may catch one."""
    index = torch.tensor([0, 9])
    assert isinstance(raised(way, X, index), IndexError)

    def run():
        x = st.distribute_tensor(
            X, make_mesh((3,)), [Shard(1)], src_data_rank=None, sizes={1: sizes}
        )
        error = raised(way, x, index)
        assert isinstance(error, IndexError), repr(error)
        return x.sum().item()

    assert st.simulate(3, run) == pytest.approx([X.sum().item()] * 3)


@pytest.mark.parametrize(
    ("compiled", "kinds"), [(False, {IndexError}), (True, {IndexError, RuntimeError})]
)
def test_an_index_of_some_ranks_sets_those_with_empty_rows_apart_too(compiled, kinds):
    def run():
        mesh, error = make_mesh((2, 2)), None
        x = st.distribute_tensor(
            X, mesh, [Replicate(), Shard(1)], src_data_rank=None, sizes={1: (0, 4)}
        )
        call = lambda t: F.embedding(t, x)  # noqa: E731
        call = st.compile(call, backend="aot_eager") if compiled else call
        for last in (3, 9):
            assert error is None
            t = torch.tensor([0, last])
            t = st.distribute_tensor(t, mesh, [Shard(0), Replicate()], src_data_rank=None)
            error = raised(call, t)
        return error, str(raised(lambda: t.sum().item()))

    found = st.simulate(4, run)
    assert [e is None for e, _ in found] == [True, True, False, False]
    assert {type(e) for e, _ in found[2:]} == kinds
    for error, after in found:
        assert ("wait for each other" if error is None else "this rank raised") in after


@pytest.mark.parametrize("cut", [(3, 3), (3, 0, 3), (3, 3, 0)])
@pytest.mark.parametrize("row", [6, 9, -1])
def test_a_row_that_a_cut_table_lacks_is_an_error_of_all(cut, row):
    def run():
        mesh = make_mesh((len(cut),))
        x = st.distribute_tensor(X, mesh, [Shard(0)], src_data_rank=None, sizes={0: cut})
        error = raised(lambda: F.embedding(torch.tensor([0, row]), x))
        assert isinstance(error, IndexError), repr(error)
        return x.sum().item()

    assert st.simulate(len(cut), run) == pytest.approx([X.sum().item()] * len(cut))


def test_an_assertion_is_one_of_all():
    def run():
        x = st.distribute_tensor(X, make_mesh((2,)), [Shard(0)], src_data_rank=None)
        torch._assert((x > 0).all(), "below")
        torch._assert(True, "plain")
        return type(raised(torch._assert, (x < 0.8).all(), "above"))

    assert st.simulate(2, run) == [AssertionError] * 2


def test_a_failure_travels_with_the_loss():
    def run():
        mesh = make_mesh((2,))
        x, t = (
            st.distribute_tensor(v, mesh, [Shard(0)], src_data_rank=None) for v in (X, LABELS % 4)
        )
        found = []
        for loss in (
            lambda: F.cross_entropy(x, t), lambda: F.nll_loss(x, t, W, reduction="sum"),
            lambda: F.binary_cross_entropy(x, x), lambda: F.multi_margin_loss(x, t),
        ):  # fmt: skip
            with st.trace() as sent:
                loss()
            found.append(len(sent.sent))
        return found

    for found in st.simulate(2, run):
        assert found == [1, 1, 1, 1]


def test_memory_that_a_gpu_lacks_is_no_class_out_of_range():
    """Trainers look for the type."""

    def run():
        raise torch.OutOfMemoryError("CUDA out of memory")

    class OnGPU:
        dims, mesh = (), SimpleNamespace(device_type="cuda")

    error = raised(agreed_sums, run, 1, OnGPU(), torch.float32, IndexError)
    assert isinstance(error, torch.OutOfMemoryError), repr(error)


SCRIPT = """
import torch, shardtensor as st
from torch.distributed.tensor import Shard
mesh, device = st.init()
index = st.distribute_tensor(torch.tensor([0, 1, 2, 9]), mesh, [Shard(0)], src_data_rank=None)
rows = torch.nn.functional.embedding(index, torch.ones(4, 2))
print(rows.sum().item())
"""


@pytest.mark.gloo
def test_of_what_sends_nothing_the_others_are_told(tmp_path):
    """An embedding sends nothing: only the rank that holds the index raises, and ends the others."""
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    (_, first), (_, second) = launched(script, 2, False, [])
    assert "IndexError: index out of range in self" in second
    assert "rank 1 raised IndexError: index out of range in self" in first


CAUGHT = """
import os, sys, torch, shardtensor as st
from torch.distributed.tensor import Shard
mesh, device = st.init()
for k, last in enumerate((3, 9, 0, 1)):
    index = st.distribute_tensor(torch.tensor([0, 1, k, last]), mesh, [Shard(0)], src_data_rank=None)
    try:
        rows = torch.nn.functional.embedding(index, torch.arange(4.0)[:, None])
        os.write(1, f"{k} {rows.sum().item()} ".encode())
    except IndexError:
        continue
"""


@pytest.mark.gloo
def test_a_rank_that_goes_on_ends_all(tmp_path):
    """Its next sum would have been taken for the one of the step that it left."""
    script = tmp_path / "job.py"
    script.write_text(CAUGHT)
    for rank, (code, text) in enumerate(launched(script, 2, False, [])):
        assert code and text.startswith("0 4.0 ") and "1 5" not in text and "2 " not in text[:14], (
            text
        )
        assert "this rank raised IndexError: index out of range in self (embedding of" in text
        assert rank or "rank 1 raised DivergenceError" in text
