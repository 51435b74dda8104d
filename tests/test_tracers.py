"""What traces or packs its arguments is refused with advice, alike on all ranks; plain calls stay."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard
from torch.nn.attention.flex_attention import flex_attention

import shardtensor as st
from shardtensor.ranks.testing import make_mesh

CALLS = {
    "cond": lambda x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,)),
    "cond, plain predicate": lambda x: torch.cond(True, lambda y: y + 1, lambda y: y - 1, (x,)),
    "nested_tensor": lambda x: torch.nested.nested_tensor([x, x]),
    "as_nested_tensor": lambda x: torch.nested.as_nested_tensor([x, x]),
    "jit.trace": lambda x: torch.jit.trace(lambda y: y * 2, (x,)),
    "jit.trace of one": lambda x: torch.jit.trace(nn.Linear(4, 4), x),
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
    assert torch.jit.trace(lambda y: y * 2, (one,))(one).tolist() == [2, 2, 2]
