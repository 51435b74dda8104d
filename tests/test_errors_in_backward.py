"""Errors that torch raises in backward by values: on every rank, whichever holds them, in step."""

import pytest
import torch
from raising import raised
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh

torch.manual_seed(0)
C = torch.complex128
A = torch.randn(6, 3, 2, dtype=C)
LAST = torch.arange(6) == 5
# the loss of a matrix depends on the phases of its vectors
VECTORS = {
    "eig": lambda a: torch.linalg.eig(a.mT @ a)[1],
    "eigh": lambda a: torch.linalg.eigh(a.mH @ a)[1],
    "svd, left": lambda a: torch.linalg.svd(a)[0][..., :2],
    "svd, right": lambda a: torch.linalg.svd(a, full_matrices=False)[2],
}
# or not
GAUGED = {
    "eig": lambda a: torch.linalg.eig(a.mT @ a)[1].abs(),
    "eigh": lambda a: torch.linalg.eigh(a.mH @ a)[1].abs(),
    "svd": lambda a: (lambda u, s, vh: u * s.unsqueeze(-2) @ vh)(*torch.linalg.svd(a, False)),
}


def phased(vectors, where):
    return (vectors * (1 + 2j) * where[:, None, None]).sum().real


def spread(x, sizes):
    mesh = make_mesh((len(sizes),))
    x = st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None, sizes={0: sizes})
    return x.requires_grad_()


@pytest.mark.parametrize("sizes", [(4, 2), (3, 0, 3)])
@pytest.mark.parametrize("name", VECTORS)
def test_a_loss_of_phases_raises_everywhere(name, sizes):
    x = A.clone().requires_grad_()
    assert isinstance(raised(phased(VECTORS[name](x), LAST).backward), RuntimeError)

    def run():
        x = spread(A, sizes)
        y = phased(VECTORS[name](x), spread(LAST.double(), sizes).detach())
        error = raised(y.backward)
        # they meet again
        return type(error), x.grad is None, abs(x.detach().sum().item() - A.sum().item()) < 1e-9

    assert st.simulate(len(sizes), run) == [(RuntimeError, True, True)] * len(sizes)


@pytest.mark.parametrize("name", GAUGED)
def test_a_loss_without_them_has_its_gradient(name):
    x = A.clone().requires_grad_()
    w = torch.linspace(1, 2, 6, dtype=torch.float64)[:, None, None]
    (want,) = torch.autograd.grad((GAUGED[name](x) * w).abs().square().sum(), x)

    def run():
        x = spread(A, (3, 0, 3))
        y = (GAUGED[name](x) * w).abs().square().sum()
        with st.trace() as t:
            y.backward()
        return x.grad.full_tensor(), [s.collective for s in t.sent]

    for got, sent in st.simulate(3, run):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-9) and sent == ["all_gather"]


def test_values_and_real_vectors_send_nothing_in_backward():
    def run():
        x = spread(A, (3, 3))
        found = [torch.linalg.svdvals(x), torch.linalg.eigvals(x.mT @ x).abs()]
        found.append(torch.linalg.eigh(x.real.mT @ x.real)[1])
        found = [y.square().sum() for y in found]
        with st.trace() as t:
            for y in found:
                y.backward()
        return len(t.sent)

    assert st.simulate(2, run) == [0, 0]
