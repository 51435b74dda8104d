"""Compiled programs of models that call other libraries' Python code."""

import numpy as np
import pytest
import torch
from einops import rearrange
from einops.layers.torch import Rearrange
from numpy.typing import NDArray
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.compile.contents import describe
from shardtensor.testing import make_mesh, same


class Patches(nn.Module):
    """Whose recipes einops keeps, and makes in the call that is traced."""

    def __init__(self):
        super().__init__()
        self.cut = Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2)

    def forward(self, x):
        y = self.cut(x)
        return rearrange(y, "b (h w) (p q c) -> b c (h p) (w q)", h=4, p=2, q=2).tanh()


def test_einops():
    x = torch.randn(1, 3, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run():
        sharded = st.distribute_tensor(x, make_mesh((2,)), [Shard(2)]).requires_grad_()
        compiled = st.compile(Patches(), backend="eager")
        for _ in range(2):
            y = compiled(sharded)
        y.sum().backward()
        same(y.detach(), x.tanh(), "y")
        same(sharded.grad, 1 - x.tanh() ** 2, "gradient")

    st.simulate(2, run)


ARRAY = np.ndarray


class Asks(nn.Module):
    """Whose code names a class of arrays."""

    kind, named = np.ndarray, NDArray[np.float64]

    def forward(self, x):
        plain = isinstance(x, ARRAY) or self.kind is not ARRAY
        return x if plain or self.named is None else x * 2


def test_a_class_of_arrays_is_no_array():
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run():
        compiled = st.compile(Asks(), backend="eager")
        same(compiled(st.distribute_tensor(x, make_mesh((2,)), [Shard(0)])), x * 2, "y")

    st.simulate(2, run)


HIDDEN = np.ma.masked
PART = np.ma.array([1.0, 2.0, 3.0], mask=[False, True, False])


class Masked(nn.Module):
    """Whose code reads masked numbers; numpy's constant for one may not be written to."""

    def forward(self, x):
        return x if HIDDEN is None else x * float(PART.sum())


def test_masked_numbers():
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run():
        compiled = st.compile(Masked(), backend="eager")
        sharded = st.distribute_tensor(x, make_mesh((2,)), [Shard(0)])
        same(compiled(sharded), x * 4, "y")

    st.simulate(2, run)
    other = np.ma.array(PART.data, mask=[True, False, False])
    assert describe(PART) != describe(other) and describe(PART) == describe(PART.copy())
    assert describe(np.float64(2)) != describe(np.float64(3))


AS_TENSORS = {
    "as_tensor": lambda x: torch.as_tensor(x) * x,
    "of another dtype": lambda x: torch.as_tensor(x, dtype=torch.float32) * 2,
    "a copy": lambda x: torch.tensor(x) * x,
    "by its name": lambda x: torch.as_tensor(data=x) * x,
    "a copy by its name": lambda x: torch.tensor(data=x) * x,
    "asarray": lambda x: torch.asarray(x) * x,
}


@pytest.mark.parametrize("name", AS_TENSORS)
def test_what_is_a_tensor_already(name):
    """torch.as_tensor and torch.tensor ask modes alone, and meet ShardTensors in a program, too."""
    fn = AS_TENSORS[name]
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run():
        own = st.distribute_tensor(x, make_mesh((2,)), [Shard(0)], src_data_rank=None)
        y = st.compile(fn, backend="aot_eager")(own.requires_grad_())
        y.sum().backward()
        return y.full_tensor().detach(), own.grad.full_tensor()

    plain = x.clone().requires_grad_()
    want = fn(plain)
    want.sum().backward()
    for y, grad in st.simulate(2, run):
        torch.testing.assert_close(y, want.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(grad, plain.grad, rtol=1e-9, atol=1e-9)
