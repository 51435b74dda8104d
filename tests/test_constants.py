"""Small tensors of numbers that the host knows: made once, but not while a graph is captured."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import cache
from shardtensor import testing as T
from shardtensor.comm import constants
from shardtensor.comm.constants import constant

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


@pytest.fixture(autouse=True)
def nothing_is_kept():
    cache.clear()
    yield
    cache.clear()


def test_it_is_made_once():
    like = torch.zeros(3)
    found = constant((1, 2, 5), torch.float64, like)
    assert found.tolist() == [1.0, 2.0, 5.0] and found.dtype is torch.float64
    assert constant((1, 2, 5), torch.float64, torch.ones(1)) is found
    assert constant((1, 2, 5), torch.float32, like) is not found
    assert constant(0.0, torch.float32, like).ndim == 0
    # equal, but another number
    assert constant(-0.0, torch.float32, like).signbit()
    # of no mesh: a world after this one finds it
    cache.clear()
    assert constant((1, 2, 5), torch.float64, like) is found


class Text(float):
    def __repr__(self):
        raise AssertionError("a text for each call")


def test_no_text_is_made_where_no_zero_has_a_sign():
    x = torch.ones(1)
    assert constant((1.0, -2.5), torch.float32, x) is constant((Text(1), Text(-2.5)), x.dtype, x)
    for zero in (0.0, -0.0):
        assert constant(zero, x.dtype, x).signbit() == torch.tensor(zero).signbit()
        assert torch.equal(
            constant((1.0, zero), x.dtype, x).signbit(), torch.tensor((1.0, zero)).signbit()
        )


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_capture_makes_is_not_kept(device, monkeypatch):
    """Its memory is the graph's, and eager code would read there what no replay has written yet."""
    like = torch.zeros(1, device=device)
    kept = constant((7.0, 8.0), torch.float32, like)
    monkeypatch.setattr(cache, "capturing", lambda device: True)
    # of the host, nothing is copied meanwhile
    monkeypatch.setattr(constants.torch, "tensor", None)
    inside = [constant(v, torch.float32, like) for v in ((1.0, 2.0), 3.0, (), (4.0,))]
    assert constant((7.0, 8.0), torch.float32, like) is kept
    monkeypatch.undo()
    outside = [constant(v, torch.float32, like) for v in ((1.0, 2.0), 3.0, (), (4.0,))]
    for a, b in zip(inside, outside, strict=True):
        assert a is not b and a.shape == b.shape
        assert device == "cuda" or torch.equal(a, b)


def test_inference_leaves_nothing_that_training_cannot_save():
    with torch.inference_mode():
        made = constant((2.0, 3.0), torch.float32, torch.zeros(1))
    x = torch.ones(2, requires_grad=True)
    (x * made).sum().backward()
    assert x.grad.tolist() == [2.0, 3.0]


def test_a_fake_one_is_not_kept():
    with FakeTensorMode() as mode:
        fake = constant((2, 3), torch.int64, mode.from_tensor(torch.zeros(1)))
        assert type(fake) is not torch.Tensor and fake.shape == (2,)
    found = constant((2, 3), torch.int64, torch.zeros(1))
    assert type(found) is torch.Tensor and found.tolist() == [2, 3]


def test_what_a_capture_makes_of_a_tensor_is_not_kept(monkeypatch):
    x, made = torch.zeros(1), []
    monkeypatch.setattr(cache, "capturing", lambda device: True)
    for n in (1, 2):
        assert cache.of_tensor(x, "key", lambda: made.append(1) or len(made)) == n
    monkeypatch.undo()
    assert [cache.of_tensor(x, "key", lambda: made.append(1) or len(made)) for _ in "ab"] == [3, 3]


def test_what_a_transform_makes_is_not_kept():
    """It is the transform's, whatever level another one has."""
    pooled = partial(F.avg_pool2d, kernel_size=3, stride=2, padding=1, count_include_pad=False)
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = torch.func.jvp(pooled, (x,), (x,))

    def run():
        y = st.distribute_tensor(x, T.make_mesh((2,)), [Shard(2)], src_data_rank=None)
        found = [torch.func.jvp(pooled, (y,), (y,)) for _ in "ab"]
        values = [pooled(y).full_tensor(), *(z.full_tensor() for pair in found for z in pair)]
        kept = list(constants._numbers.values())
        assert kept and not any(map(torch._C._functorch.is_functorch_wrapped_tensor, kept))
        return values

    for got in st.simulate(2, run):
        for g, w in zip(got, [want[0], *want, *want], strict=True):
            torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)
