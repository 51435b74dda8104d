"""NATTEN's names: a model that calls them runs on shards by our neighbourhood attention."""

import sys

import pytest
import torch
from forked import Program
from test_neighborhood import OPTIONS, S1, S2, each, mask_of, reference, tokens

import shardtensor as st
from shardtensor import testing as T
from shardtensor.attention import neighborhood

D = torch.float64


FAKE = """
import torch
calls = []

def na2d(query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None,
         additional_keys=None, additional_values=None, backend=None, return_lse=False):
    assert type(query) is torch.Tensor and query.shape == key.shape
    for n, k, d in zip(query.shape[1:3], each(kernel_size, 2), each(dilation, 2)):
        assert k * d <= n, "NATTEN refuses this"
    calls.append((tuple(query.shape), backend))
    return reference(query, key, value, kernel_size, stride, dilation, is_causal, scale)

def na1d(query, key, value, kernel_size, dilation=1, is_causal=False, rpb=None, scale=None):
    calls.append((tuple(query.shape), rpb))  # an order of arguments of old
    return reference(query, key, value, kernel_size, 1, dilation, is_causal, scale)
"""
MODEL = """
from torch import nn
from natten.functional import na2d

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24).double(), nn.Linear(8, 8).double()

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).movedim(-3, 0)
        return self.proj(na2d(q, k, v, kernel_size=(3, 4), backend="fast").flatten(-2))
"""


@pytest.fixture
def natten(tmp_path, monkeypatch):
    """A package of that name whose functions are the definition, and a module that uses it."""
    package = tmp_path / "natten"
    package.mkdir()
    (package / "__init__.py").write_text("from .functional import na2d\n")
    (package / "functional.py").write_text(FAKE)
    (tmp_path / "model_with_natten.py").write_text(MODEL)
    for name in [n for n in sys.modules if n.split(".")[0] == "natten"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    import natten.functional

    natten.functional.reference, natten.functional.each = reference, each
    yield natten
    for name in ("natten", "natten.functional", "model_with_natten"):
        sys.modules.pop(name, None)


def test_nothing_imports_natten(tmp_path):
    script = tmp_path / "imports.py"
    script.write_text("import sys, shardtensor; print('natten' in sys.modules)")
    assert Program(script).ended() == (0, "False\n")


def test_a_model_that_calls_natten(natten):
    from model_with_natten import Block

    assert natten.na2d is natten.functional.na2d
    x = torch.randn(1, 9, 8, 8, dtype=D)
    for cut in T.cuts(9):
        T.hold(Block(), [x], [T.shard(1, cut)], (len(cut),))
    # ours computed: NATTEN has no kernels for this device
    assert {shape for shape, _ in natten.functional.calls} == {(1, 9, 8, 2, 4)}


@pytest.mark.parametrize("options", [
    dict(kernel_size=(5, 3)), dict(kernel_size=(2, 3), dilation=(3, 2)), dict(kernel_size=4, is_causal=True),
    dict(kernel_size=(4, 3), stride=(2, 3)), dict(kernel_size=3, stride=(1, 2), is_causal=(True, False)),
    dict(kernel_size=3, stride=2, is_causal=True), dict(kernel_size=3, stride=3, dilation=2),
], ids=str)  # fmt: skip
def test_natten_computes_on_its_devices(natten, options, monkeypatch):
    monkeypatch.setattr(neighborhood, "NATTEN_DEVICES", ("cpu",))
    x = tokens(13, 6)
    fn = natten.functional.na2d
    for cut in T.cuts(13):
        T.hold(fn, x, [T.shard(1, cut)] * 3, (len(cut),), kwargs=dict(options, backend="a"))
    T.hold(fn, x, [T.On([S1, S2])] * 3, (2, 2), kwargs=options)
    shapes = {shape for shape, _ in natten.functional.calls}
    assert any(shape[1] < 13 for shape in shapes) or options.get("stride", 1) == 2
    assert {b for _, b in natten.functional.calls} == {"a", None}


def test_versions_of_natten(natten):
    x = tokens(9)
    for args in ((2,), (2, True), (2, True, None, 0.3)):
        places = [T.shard(1)] * 3 + [None] * (len(args) + 1)
        T.hold(natten.functional.na1d, [*x, 3, *args], places, (2,))
    with pytest.raises(st.RankError, match="rpb"):
        T.hold(
            natten.functional.na1d,
            [*x, 3, 1, False, torch.ones(2)],
            [*[T.shard(1)] * 3, *[None] * 4],
            (2,),
        )
    y = tokens(9, 6)
    with pytest.raises(st.RankError, match="return_lse"):
        T.hold(natten.na2d, y, [T.shard(1)] * 3, (2,), kwargs=dict(kernel_size=3, return_lse=True))


def test_windows_are_those_of_natten():
    """Of the package itself, where it is installed."""
    real = pytest.importorskip("natten")
    for options in OPTIONS:
        n, weights = 13, torch.eye(13, 16)[None, :, None]
        nothing = torch.zeros(1, n, 1, 16)
        got = real.na1d(nothing, nothing, weights, **options)[0, :, 0, :n] > 0
        assert torch.equal(got, mask_of((n,), *((x,) for x in options.values()))), options
    model = real.NeighborhoodAttention2D(32, 2, kernel_size=(5, 3), dilation=(1, 2))
    x = torch.randn(1, 9, 8, 32)
    with torch.no_grad():
        for cut in T.cuts(9):
            T.hold(model.forward, [x], [T.shard(1, cut)], (len(cut),), grad=False, rtol=1e-5)
