"""torch.autograd.detect_anomaly: a NaN on one rank is an error on all, after which they go on together."""

import pytest
import torch
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh

D = torch.float64


def one_rank_has_it(run):
    """The slope at zero, which the second of three ranks has, is no number."""
    x = torch.tensor([3.0, 2.0, 1.0, 0.0, 1.0, 2.0], dtype=D)
    x = st.distribute_tensor(x, make_mesh((3,)), [Shard(0)], src_data_rank=None).requires_grad_()
    # ranks come to the end of this one by one
    (x * 2).cumsum(0).sum().backward()
    y = (x.sqrt() * x).cumsum(0).sum()
    try:
        run(y, x)
    except RuntimeError as e:
        seen = str(e)
    else:
        seen = "none"
    (x * 2).cumsum(0).sum().backward()
    return seen


RUNS = {
    "backward": lambda y, x: y.backward(),
    "all of them": lambda y, x: torch.autograd.backward([y]),
    "grad": lambda y, x: torch.autograd.grad(y, x),
    "plain": lambda y, x: (y.full_tensor() * 2).backward(),
    "plain grad": lambda y, x: torch.autograd.grad(y.to_local() * 2, x),
}


@pytest.mark.filterwarnings("ignore:Error detected|Anomaly")
@pytest.mark.parametrize("run", RUNS)
def test_all_ranks_raise(run):
    with torch.autograd.detect_anomaly():
        found = st.simulate(3, one_rank_has_it, RUNS[run])
        assert torch.is_anomaly_check_nan_enabled()
    assert not torch.is_anomaly_enabled()
    want = "Function 'SqrtBackward0' returned nan values in its 0th output, on rank 1"
    assert found == [want] * 3


def on_two_meshes():
    """Which of some backwards raise that run on two meshes of one size; the first rank has a NaN."""
    mesh, found = make_mesh((2, 2)), []
    for i in range(4):
        xs = [
            st.distribute_tensor(
                torch.arange(2, dtype=D), mesh[name], [Shard(0)], src_data_rank=None
            )
            for name in mesh.mesh_dim_names
        ]
        x, y = [(x.requires_grad_() * 2).to_local() for x in xs]
        others = float(torch.distributed.get_rank() != 0)
        try:
            ((x + others).sqrt() * x + y).sum().backward()
        except RuntimeError:
            found.append(i)
    return found


@pytest.mark.filterwarnings("ignore:Error detected|Anomaly")
def test_ranks_of_two_meshes_of_one_size_are_told():
    with torch.autograd.detect_anomaly():
        assert st.simulate(4, on_two_meshes) == [[*range(4)]] * 4


class Größe(torch.autograd.Function):
    """In whose name some letters are two bytes."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.abs()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0] / ctx.saved_tensors[0].abs()


@pytest.mark.filterwarnings("ignore:Error detected|Anomaly")
def test_names_of_any_letters_are_told():
    def named():
        x = torch.tensor([1.0, 1.0, 0.0], dtype=D)
        x = st.distribute_tensor(x, make_mesh((3,)), [Shard(0)], src_data_rank=None)
        with pytest.raises(RuntimeError, match=r"'GrößeBackward' returned nan values.*on rank 2"):
            Größe.apply(x.requires_grad_()).cumsum(0).sum().backward()

    with torch.autograd.detect_anomaly():
        st.simulate(3, named)


def told():
    x = st.distribute_tensor(torch.zeros(2, dtype=D), make_mesh((1,)), [Shard(0)]).requires_grad_()
    with (
        pytest.warns(UserWarning, match=r"x\.sqrt\(\)"),
        pytest.raises(RuntimeError, match="nan values"),
    ):
        (x.sqrt() * x).sum().backward()


@pytest.mark.filterwarnings("ignore:Anomaly")
def test_the_line_of_forward_is_told():
    with torch.autograd.detect_anomaly():
        st.simulate(1, told)
