"""Heads that take turns around the ring, and large keys, which are sent as they came."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Shard

from shardtensor import testing as T
from shardtensor._torch.world import silent_world
from shardtensor.attention import around, strategy
from shardtensor.attention.call import Call
from shardtensor.ranks.measure import peak_bytes
from shardtensor.ranks.testing import make_mesh
from shardtensor.spec import Spec
from shardtensor.tensor import wrap

D = torch.float64


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """However small."""
    monkeypatch.setattr(around, "ROWS", 1)
    monkeypatch.setattr(around, "LARGE", 1)


def operands(heads=4, kv=4, tokens=12, keys=12, out=3, dtype=D):
    g = torch.Generator().manual_seed(0)
    shapes = (heads, tokens, 5), (kv, keys, 5), (kv, keys, out)
    return [torch.randn(2, *s, generator=g, dtype=D).to(dtype) for s in shapes]


def attention(q, k, v, mask=None, **kwargs):
    with strategy("ring"):
        return F.scaled_dot_product_attention(q, k, v, mask, **kwargs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cut", [(6, 6), (3, 3, 3, 3), (0, 7, 1, 4)])
def test_one_device_numbers(cut, causal):
    T.hold(attention, operands(), [T.shard(2, cut)] * 3, (len(cut),), kwargs={"is_causal": causal})


def test_shared_heads_and_other_keys():
    kwargs = {"enable_gqa": True}
    T.hold(attention, operands(6, 3, 12, 8), [T.shard(2)] * 3, (4,), kwargs=kwargs)
    T.hold(attention, operands(2, 1), [T.shard(2)] * 3, (3,), kwargs=kwargs)


@pytest.mark.parametrize("shape", [(12, 12), (4, 12, 12), (2, 1, 1, 12), (1, 4, 12, 1)])
def test_masks(shape):
    g = torch.Generator().manual_seed(1)
    some = torch.rand(shape, generator=g) > 0.3
    for mask in (some, torch.randn(shape, generator=g, dtype=D)):
        T.hold(attention, [*operands(), mask], [*[T.shard(2)] * 3, None], (4,))


def test_halves():
    x = operands(dtype=torch.bfloat16)
    T.hold(attention, x, [T.shard(2)] * 3, (4,), rtol=3e-2)


def step():
    """The peak of a step in blocks of one rank's queries, beside operands and gradients."""
    with silent_world(4, 8):
        spec = Spec.of(make_mesh((8,)), [Shard(2)], (1, 8, 8 * 1024, 32))
        leaves = [torch.randn(spec.local_shape, requires_grad=True) for _ in range(3)]
        x = [wrap(y, spec) for y in leaves]

        def run():
            torch.autograd.grad(attention(*x), leaves, torch.ones_like(x[0]))

        run()
        return peak_bytes(run) / leaves[0].nbytes


def test_what_is_in_flight(monkeypatch):
    # 8 turns: out, its copy of ones and three gradients, and an eighth of what is in flight
    assert step() < 8
    monkeypatch.setattr(around, "ROWS", 2**20)

    # 1 turn: it was 26.2
    assert step() < 19


def test_turns_of_a_gpu_have_more_rows(monkeypatch):
    """Its host would else be late with each."""
    monkeypatch.setattr(around, "ROWS", 16)
    spans = (0, 32, 64, 96), (32, 32, 32, 32)
    call = Call(*spans, *spans, 0, False, True, 1.0, 0.0, 0, (), 1, 1, "")
    monkeypatch.setattr(Call, "n", 4)
    found = {}
    for device in ("cpu", "meta"):
        q = torch.empty(1, 8, 32, 4, device=device)
        found[device] = len(around.in_turns(call, q, q, False))
    assert found == {"cpu": 8, "meta": 2}
