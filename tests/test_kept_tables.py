"""Sparse matrices and other tables that are used again: when what was found of them still holds."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh
from shardtensor.rules import routes

D = torch.float64
N = 6


def ring(shift, layout):
    """Row i has column i + shift, once round."""
    index = torch.stack([torch.arange(N), (torch.arange(N) + shift) % N])
    s = torch.sparse_coo_tensor(index, torch.arange(1.0, N + 1, dtype=D), (N, N)).coalesce()
    return s if layout == "coo" else s.to_sparse_csr()


def columns(s):
    return s._indices()[1] if s.layout is torch.sparse_coo else s.col_indices()


def written(s):
    columns(s).copy_(columns(ring(2, "coo")))
    return s


def loaded(s):
    module = nn.Module()
    module.register_buffer("columns", columns(s))
    module.load_state_dict({"columns": columns(ring(2, "coo"))})
    return s


def hidden(s):
    """Written to where torch counts nothing, but seen by an object that was not yet asked about."""
    columns(s).data.copy_(columns(ring(2, "coo")))
    return s.detach()


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Tables are taken to lie where comparing them waits; the comparisons."""
    compared = []
    equal = torch.equal
    monkeypatch.setattr(routes, "waits", lambda x: True)
    monkeypatch.setattr(torch, "equal", lambda a, b: compared.append(a) or equal(a, b))
    return compared


def products(s, change=None):
    """On each rank: S x, again, and after a change of S; with the comparisons of each."""
    x = torch.arange(2.0 * N, dtype=D).view(N, 2)
    mesh = make_mesh((2,))
    shard = st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)
    got = [(s @ shard).full_tensor(), (s @ shard).full_tensor()]
    if change is not None:
        s = change(s)
        got.append((s @ shard).full_tensor())
    return got, s.to_dense() @ x


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_what_nobody_wrote_to_is_not_compared(layout, on_a_gpu):
    s = ring(1, layout)
    want = s.to_dense() @ torch.arange(2.0 * N, dtype=D).view(N, 2)
    (got, _), _ = st.simulate(2, products, s)
    assert not on_a_gpu
    assert all(torch.equal(y, want) for y in got)


@pytest.mark.parametrize("change", [written, loaded, hidden])
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_a_write_is_seen(layout, change, on_a_gpu):
    def rank():
        return products(ring(1, layout), change)

    for got, want in st.simulate(2, rank):
        assert torch.equal(got[-1], want) and not torch.equal(got[0], want)


def test_another_object_of_the_same_memory_is_compared_once(on_a_gpu):
    def rank():
        s = ring(1, "csr")
        products(s)
        return s, products(s.detach())

    found = st.simulate(2, rank)
    # the two index tensors of a CSR matrix, on each rank
    assert len(on_a_gpu) == 4
    assert all(torch.equal(y, want) for _, (got, want) in found for y in got)


def test_what_inference_made_is_compared(on_a_gpu):
    """Torch counts no writes to it."""

    def rank():
        with torch.inference_mode():
            return products(ring(1, "csr"), written)

    for got, want in st.simulate(2, rank):
        assert torch.equal(got[-1], want) and not torch.equal(got[0], want)
