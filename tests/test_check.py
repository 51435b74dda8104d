"""`check` names the module that is wrong or refused, and passes what is right."""

import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import run_workers


class Part(nn.Module):
    """A layer around one function."""

    def __init__(self, fn, width=0):
        super().__init__()
        self.fn = fn
        if width:
            self.weight = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x):
        return self.fn(self, x)


def model(fn, width=0):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU(), Part(fn, width),
        nn.Conv2d(4, 2, 3, padding=1),
    )  # fmt: skip


class ToLocal(Part):
    def forward(self, x):
        if isinstance(x, st.ShardTensor):
            local = x.to_local()
            local = local - local.mean(2, keepdim=True)
            return st.ShardTensor.from_local(local, x.device_mesh, x.placements, sizes=x.spec.sizes)
        return x - x.mean(2, keepdim=True)


class LocalBranch(Part):
    def forward(self, x):
        rows = x.to_local().shape[2] if isinstance(x, st.ShardTensor) else x.shape[2]
        return x.sum(2, keepdim=True) + x if rows > 5 else x


class Halves(torch.autograd.Function):
    """Mixes rows, and knows nothing of shards."""

    @staticmethod
    def forward(ctx, x):
        return x.flip(2) * 1

    @staticmethod
    def backward(ctx, g):
        return g


def detached(self, x):
    """Right forward; on shards the gradient is lost."""
    return (
        x
        + (x.detach() * 0 if isinstance(x, st.ShardTensor) else x * 0)
        - (x * 0 if not isinstance(x, st.ShardTensor) else 0)
    )


def lost_gradient(self, x):
    y = x * self.weight
    if isinstance(x, st.ShardTensor):
        return x.detach() * self.weight + (x - x.detach()) * 0.5 * self.weight.detach()
    return y


def in_module(fn):
    """A function in a module of its own, as a library has it."""
    library = types.ModuleType("a_library_to_check")
    library.fn = fn
    sys.modules[library.__name__] = library
    return library


def inputs():
    return torch.randn(2, 2, 9, 8, generator=torch.Generator().manual_seed(1))


def check(m, *args, **kwargs):
    return st.check(m, inputs(), [Shard(2)], *args, **kwargs)


RIGHT = {
    "pointwise": lambda self, x: x.tanh(),
    "roll": lambda self, x: x.roll(3, 2),
    "mean over rows": lambda self, x: x - x.mean((2, 3), keepdim=True),
    "attention": lambda self, x: F.scaled_dot_product_attention(
        *[x.flatten(2).mT] * 3
    ).mT.unflatten(2, x.shape[2:]),
    "cumsum": lambda self, x: x.cumsum(2),
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("double", [True, False])
def test_right_models_are_right(name, double):
    report = check(model(RIGHT[name]), double=double)
    assert report.ok, str(report)
    # even and uneven on 2 and 3 ranks; one shard of three is empty
    assert len(report.findings) == 4 and "[6, 0, 3]" in str(report)
    assert all(0 <= f.error < (1e-8 if double else 1e-3) for f in report.findings)


def test_two_axes():
    report = st.check(model(RIGHT["roll"]), inputs(), [Shard(2), Shard(3)])
    assert report.ok and "2 x 2 ranks" in str(report)


def replaced(kind):
    m = model(lambda self, x: x)
    m[3] = kind(None)
    return m


def test_a_local_mean_is_named():
    report = check(replaced(ToLocal))
    found = report.findings[0]
    assert not report.ok and found.module == "3" and "output differs" in found.what
    assert "to_local() gives this rank's part only" in found.advice


def test_a_branch_on_local_sizes_is_named():
    report = check(replaced(LocalBranch))
    bad = next(f for f in report.findings if not f.ok)
    text = str(bad)
    assert bad.module in ("3", "the model") and "to_local()" in text


def test_a_refused_op_is_named_with_its_line():
    report = check(model(lambda self, x: x + x.data_ptr() * 0))
    found = report.findings[0]
    assert not report.ok and found.module == "3"
    assert "UnsupportedOpError" in found.what and "test_check.py" in found.what
    assert "st.rule" in found.what or "shardtensor.rule" in found.what


def test_a_wrong_rule_is_named():
    library = in_module(lambda x: x.flip(2))
    try:

        def backwards(x):
            return library.fn(x)

        @st.rule("a_library_to_check.fn")
        def _(x):
            return st.tensor.wrap(x.to_local().flip(2), x.spec)

        report = check(model(lambda self, x: backwards(x)))
        assert not report.ok and {f.module for f in report.findings} == {"3"}
    finally:
        del sys.modules[library.__name__]


def test_a_wrong_gradient_is_named():
    m = model(lost_gradient, 4)
    report = check(m)
    found = report.findings[0]
    assert not report.ok and found.module == "3", str(report)
    assert "output of 2" in found.what


def test_a_wrong_gradient_of_a_weight_is_named():
    def halved(self, x):
        w = self.weight
        if isinstance(x, st.ShardTensor):
            w = w.detach() + (w - w.detach()) * 0.5
        return x * w

    report = check(model(halved, 4))
    assert not report.ok and report.findings[0].module == "3"
    assert "gradient of 3.weight" in report.findings[0].what


def test_another_shape_is_named():
    def cut(self, x):
        return x[:, :, :8] if isinstance(x, st.ShardTensor) else x

    report = check(model(cut))
    assert report.findings[0].module == "3" and "shape" in report.findings[0].what


def test_a_function_of_the_users_that_mixes_rows():
    report = check(model(lambda self, x: Halves.apply(x)))
    # its ops are intercepted, so the value is right; its backward is wrong on one device, too
    assert report.ok, str(report)


def test_gathers_are_told():
    report = check(model(lambda self, x: x + torch.as_strided(x, (3,), (9,)).sum()))
    assert report.ok and "as_strided has no rule: it gathers" in str(report), str(report)


def test_one_rank_raises():
    def odd(self, x):
        if isinstance(x, st.ShardTensor) and x.device_mesh.get_local_rank() == 1:
            raise KeyError("only here")
        return x

    report = check(model(odd))
    assert not report.ok and "only here" in str(report)
    assert report.findings[0].module == "3" and "on rank 1 only" in report.findings[0].what


def test_dropout_is_compared_with_the_same_draw():
    m = model(lambda self, x: F.dropout(x, 0.5, training=True))
    report = check(m)
    assert report.ok, str(report)
    assert "draws random numbers" in str(report)


def test_nothing_is_left_behind():
    m = model(lambda self, x: x)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    check(m)
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    assert m[0].weight.dtype is torch.float32 and m[0].weight.grad is None
    assert not m[0]._forward_hooks and not m._forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_double():
    class Single(nn.Module):
        def forward(self, x):
            if x.dtype is torch.float64:
                raise TypeError("float32 only")
            return x * 2

    report = st.check(Single(), inputs(), [Shard(2)])
    assert report.ok and "own dtype" in str(report)


@pytest.mark.parametrize("placements, shapes", [([Shard(9)], None), ([Shard(2)], [(2, 2)])])
def test_mistakes(placements, shapes):
    with pytest.raises(ValueError):
        st.check(model(RIGHT["roll"]), inputs(), placements, shapes)


def on_ranks():
    right = check(model(RIGHT["roll"]), [(2,)])
    wrong = check(replaced(ToLocal), [(2,)])
    return right.ok, wrong.ok, wrong.findings[0].module


@pytest.mark.gloo
def test_on_real_ranks():
    assert run_workers(2, on_ranks) == [(True, False, "3")] * 2


MODELS = """
import torch

class Right(torch.nn.Conv2d):
    def __init__(self, width=4):
        super().__init__(2, width, 3, padding=1)

class Wrong(Right):
    def forward(self, x):
        y = super().forward(x)
        return y if type(x) is torch.Tensor else y * 2
"""


@pytest.mark.parametrize("name, status", [("Right", 0), ("Wrong", 1), ("None", 2)])
def test_command(tmp_path, name, status, command):
    (tmp_path / "mine.py").write_text(MODELS)
    given = ["--input", "1x2x8x8", "--arg", "width=3", "--json", "--mesh", "2"]
    code, out, err = command("check", f"{tmp_path}/mine.py:{name}", *given)
    assert code == status, err
    if status == 2:
        assert "has no class or function" in err and err.count("\n") == 1
        return
    found = json.loads(out)
    assert found["ok"] is (status == 0) and len(found["findings"]) == 2
    assert found["findings"][0]["module"] == ("" if status == 0 else "the model")
