"""`testing.hold` itself: what it takes for right, what not, and what a failure says."""

import threading

import pytest
import torch
from cases.table import Case
from torch import nn
from torch.distributed.tensor import Partial, Shard

import shardtensor as st
from shardtensor import testing as T

X = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))


def _layers():
    torch.manual_seed(0)
    return nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bias_in_front_of_a_norm_has_a_gradient_of_rounding(dtype):
    model = nn.Sequential(*_layers()).to(dtype)
    T.hold(model, [X.to(dtype)], [T.shard(2, (5, 4))], (2,))


class _Off(nn.Module):
    """Adds to the gradient of a bias in front of a norm where it is sharded."""

    def __init__(self, by):
        super().__init__()
        self.layers, self.by = nn.ModuleList(_layers()).double(), by

    def forward(self, x):
        conv, norm, gelu = self.layers
        out = gelu(norm(conv(x)))
        return out + self.by * conv.bias.sum() if isinstance(x, st.ShardTensor) else out


def test_rounding_hides_nothing_larger():
    # values alike, as the bias is zero; its gradient is not
    model = _Off(1e-9)
    nn.init.zeros_(model.layers[0].bias)
    with pytest.raises(st.RankError, match="gradient 2: relative error"):
        T.hold(model, [X.double()], [T.shard(2, (5, 4))], (2,))


def test_a_flipped_choice_is_no_rounding():
    def largest(x):
        i = x.argmax(0)
        return i + 1 if isinstance(x, st.ShardTensor) else i

    ties = torch.ones(6, dtype=torch.float64)
    with pytest.raises(st.RankError, match="values differ"):
        T.hold(largest, [ties], [T.shard(0)], (2,), grad=False)


def test_a_failure_names_op_cut_and_mesh():
    def twice(x, n):
        return x * n + (1 if isinstance(x, st.ShardTensor) else 0)

    with pytest.raises(st.RankError) as e:
        T.hold(twice, [X, 2], [T.shard(2, (5, 4)), None], (2,))
    assert "twice(float32[2, 3, 9, 8] on [S(2)] in {2: (5, 4)}, 2) on mesh (2,): output 0" in str(e)


def test_a_refusal_names_op_cut_and_mesh():

    def unsupported(x):
        if isinstance(x, st.ShardTensor):
            raise st.UnsupportedOpError("no")
        return x

    with pytest.raises(st.RankError) as e:
        T.hold(unsupported, [X], [T.shard(2)], (3,))
    assert e.value.__notes__ == ["unsupported(float32[2, 3, 9, 8] on [S(2)]) on mesh (3,)"]


def test_addends_are_a_layout_too():
    seen = []

    def doubled(x):
        seen.extend([x.spec] if isinstance(x, st.ShardTensor) else [])
        return x * 2

    x = X[0, 0].double()
    T.hold(doubled, [x], [T.On([Partial()])], (2,))
    T.hold(doubled, [x], [T.On([Shard(0), Partial()], {0: (2, 7)})], (2, 2))
    assert [len(s.partial) for s in seen] == [1] * 6 and seen[-1].dims[0].sizes == (2, 7)


def test_a_shard_that_is_wrong_on_one_rank():
    def off(x):
        y = x.detach() * 1
        if isinstance(y, st.ShardTensor) and y.spec.coordinate == (1,):
            y.to_local().add_(1)
        return y

    with pytest.raises(st.RankError, match=r"rank 1: .*output 0: relative error"):
        T.hold(off, [X], [T.shard(2, (4, 1, 4))], (3,))


def test_several_layouts_on_the_same_ranks():
    cuts = [(5, 4), (8, 1), (9, 0)]
    specs = T.hold_all(torch.sin, [X], [[T.shard(2, c)] for c in cuts], (2,))
    assert [s[0].dims[2].sizes for s in specs] == cuts

    def off(x):
        uneven = isinstance(x, st.ShardTensor) and x.spec.dims[2].sizes == (8, 1)
        return x * (2 if uneven else 1)

    with pytest.raises(st.RankError, match=r"\{2: \(8, 1\)\}\) on mesh \(2,\): output 0: relative"):
        T.hold_all(off, [X], [[T.shard(2, c)] for c in cuts], (2,))


def test_a_part_of_the_gradient_that_is_lost_on_one_rank():
    def off(x):
        y = x * 2
        if isinstance(x, st.ShardTensor) and x.spec.coordinate == (1,):
            y.to_local().register_hook(lambda g: g * 0.5)
        return y

    with pytest.raises(st.RankError, match=r"rank 1: .*gradient 0: relative error"):
        T.hold(off, [X.double()], [T.shard(2, (4, 1, 4))], (3,))


def test_a_case_names_the_layouts_that_fail():
    def off(x):
        uneven = isinstance(x, st.ShardTensor) and x.spec.dims[0].sizes == (7, 0, 2)
        return x * (2 if uneven else 1)

    with pytest.raises(AssertionError, match=r"op off: 1 of .* layouts") as e:
        Case("op", "off", off, (X[0, 0].double(),), ((0, 1),)).meet()
    assert "{0: (7, 0, 2)} of mesh (3,): rank 0" in str(e.value)


def test_a_case_that_fails_only_after_another_layout():
    seen = threading.local()

    def off(x):
        again = isinstance(x, st.ShardTensor) and hasattr(seen, "layout")
        seen.layout = x.shape
        return x * (2 if again else 1)

    with pytest.raises(AssertionError, match=r"on mesh \(2,\), one layout after the other"):
        Case("op", "off", off, (X[0, 0].double(),), ((0, 1),)).meet()
