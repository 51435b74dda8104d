"""What traces or packs its arguments is refused with advice, alike on all ranks; plain calls stay."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.func import jvp
from torch.nn.attention.flex_attention import flex_attention

import shardtensor as st
from shardtensor.ranks.testing import make_mesh


class Sine(torch.autograd.Function):
    """One that torch.func takes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos()


CALLS = {
    "cond": lambda x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,)),
    "cond, plain predicate": lambda x: torch.cond(True, lambda y: y + 1, lambda y: y - 1, (x,)),
    "nested_tensor": lambda x: torch.nested.nested_tensor([x, x]),
    "as_nested_tensor": lambda x: torch.nested.as_nested_tensor([x, x]),
    "jit.trace": lambda x: torch.jit.trace(lambda y: y * 2, (x,)),
    "jit.trace of one": lambda x: torch.jit.trace(nn.Linear(4, 4), x),
    "linearize": lambda x: torch.func.linearize(torch.sin, x),
    "Function in grad": lambda x: torch.func.grad(lambda y: Sine.apply(y).sum())(x),
    "Function in vmap": lambda x: torch.vmap(Sine.apply, 1)(x),
    "export": lambda x: torch.export.export(nn.Linear(4, 4), (x,)),
}


def _on_rank(call, shard):
    x = torch.ones(8, 4)
    x = st.distribute_tensor(x, make_mesh((2,)), [Shard(0)], sizes={0: (8, 0)}) if shard else x
    with pytest.raises(st.UnsupportedOpError, match=r"of ShardTensors: \w+") as e:
        call(x)
    return str(e.value)


@pytest.mark.parametrize("name", CALLS)
def test_refused_with_advice(name):
    first, second = st.simulate(2, _on_rank, CALLS[name], True)
    assert first == second


def test_quantized_tensors_are_not_cut():
    calls = [
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        lambda x: torch.quantize_per_tensor_dynamic(x, torch.qint8, False),
        lambda x: torch.quantize_per_channel(x, torch.ones(4), torch.zeros(4), 1, torch.qint8),
    ]

    def run():
        x = st.distribute_tensor(torch.ones(8, 4), make_mesh((2,)), [Shard(0)])
        for call in calls:
            with pytest.raises(st.UnsupportedOpError, match="quantized tensors cannot be cut"):
                call(x)
            call(x.redistribute(placements=[Replicate()]))

    st.simulate(2, run)
    one = torch.ones(3)
    torch.testing.assert_close(torch.func.grad(lambda y: Sine.apply(y).sum())(one), one.cos())


def test_plain_calls_stay():
    x = torch.randn(1, 1, 8, 4, generator=torch.Generator().manual_seed(0))
    want = nn.functional.scaled_dot_product_attention(x, x, x)
    torch.testing.assert_close(flex_attention(x, x, x), want)
    compiled = torch.compile(flex_attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x, x), want)

    def chosen(x):
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))

    one = torch.ones(3)
    torch.testing.assert_close(chosen(one), one + 1)
    torch.testing.assert_close(torch.compile(chosen, backend="eager", fullgraph=True)(one), one + 1)
    tangent = torch.compile(
        lambda y: jvp(torch.sin, (y,), (y,))[1], backend="eager", fullgraph=True
    )
    torch.testing.assert_close(tangent(one), one.cos())
    assert torch.jit.trace(lambda y: y * 2, (one,))(one).tolist() == [2, 2, 2]


def test_a_plain_step_with_its_backward_is_compiled():
    """Dynamo runs what the library has around autograd's engine as it is."""
    weight = torch.ones(3, requires_grad=True)

    @torch.compile(backend="eager")
    def step(x):
        loss = (weight * x).square().sum()
        loss.backward()
        return loss

    assert step(torch.full((3,), 2.0)).item() == 12
    assert weight.grad.tolist() == [8, 8, 8]


@pytest.mark.filterwarnings("ignore:torch.compile")
def test_what_torch_compile_meets_of_the_library_runs_as_it_is():
    """Dynamo leaves verbs, what is below them and collectives alone."""

    @torch.compile(backend="eager")
    def turned(x, mesh):
        rows = st.distribute_tensor(x, mesh, [Shard(0)])
        return rows.redistribute(placements=[Shard(1)]).full_tensor()

    x = torch.arange(15.0, requires_grad=True).view(5, 3)
    for got in st.simulate(2, lambda: turned(x, make_mesh((2,)))):
        torch.testing.assert_close(got, x)
