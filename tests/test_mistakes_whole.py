"""Mistakes of a caller that torch raises for: the same type of error on every rank, in torch's words."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T

D = torch.float64
ONES = torch.ones(3, dtype=D)
MISTAKES = {
    # these gave a result
    "step": lambda x: x[::-1],
    "step inside": lambda x: x[5:1:-2],
    "step assigned": lambda x: x.__setitem__(slice(None, None, -1), 0),
    "repeat": lambda x: x.repeat(2),
    "repeat nothing": lambda x: x.repeat(()),
    "split": lambda x: x.split([-1, 8]),
    "squeeze": lambda x: x.squeeze((0, 0)),
    # these raised something of their own
    "conv": lambda x: torch.conv2d(x, x),
    "conv of channels": lambda x: F.conv1d(x, torch.ones(2, 3, 2, dtype=D)),
    "conv transpose": lambda x: F.conv_transpose2d(x, x),
    "pool": lambda x: F.max_pool2d(x[0], 2),
    "pool with places": lambda x: F.max_pool3d(x[0], 2, return_indices=True),
    "pool of means": lambda x: F.avg_pool2d(x, 2),
    "adaptive pool": lambda x: F.adaptive_avg_pool1d(x[0], 1),
    "adaptive pool of planes": lambda x: F.adaptive_avg_pool2d(x[0], 1),
    "adaptive pool of maxima": lambda x: F.adaptive_max_pool3d(x, 2),
    "interpolate": lambda x: F.interpolate(x, 2),
    "chunk": lambda x: x.chunk(0),
    "split by nothing": lambda x: x.split(0),
    "roll": lambda x: x.roll((1, 2), (0,)),
    "roll dims": lambda x: x.roll(1, (0, 1)),
    "einsum": lambda x: torch.einsum("ij->ik", x),
    "tensordot": lambda x: torch.tensordot(x, x, ([0], [1, 0])),
    "index by text": lambda x: x["a"],
    "index by a float": lambda x: x[1.5],
    "ellipses": lambda x: x[..., ..., 0],
    "iterate": lambda x: iter(x[0, 0]),
    "grad of another shape": lambda x: setattr(x, "grad", ONES),
    "grad of another type": lambda x: setattr(x, "grad", 3),
    "gradient": lambda x: x.detach().requires_grad_().exp().backward(ONES),
}


@pytest.mark.parametrize("place", [[Shard(0)], [Shard(1)], [Replicate()]], ids=str)
@pytest.mark.parametrize("name", MISTAKES)
def test_as_torch_raises(name, place):
    fn, whole = MISTAKES[name], torch.arange(42.0, dtype=D).view(7, 6)
    with pytest.raises(Exception) as torchs:
        fn(whole.clone())

    def run():
        x = st.distribute_tensor(whole, T.make_mesh((3,)), place, src_data_rank=None)
        with pytest.raises(Exception) as ours:
            fn(x)
        return ours.type

    assert st.simulate(3, run) == [torchs.type] * 3


@pytest.mark.parametrize("error", [ValueError, KeyError])
def test_what_a_hook_raises_is_no_mistake_of_the_call(error):
    def run():
        x = st.distribute_tensor(torch.ones(7, 6), T.make_mesh((3,)), [Shard(0)]).requires_grad_()
        y = x.exp()

        def hook(grad):
            raise error("mine")

        y.register_hook(hook)
        with pytest.raises(error, match="mine"):
            torch.autograd.grad(y.sum(), x)

    st.simulate(3, run)


def test_pieces_of_no_rows():
    x = torch.empty(0, 6, dtype=D)
    T.hold(lambda x: x.split(0)[0], [x], [T.shard(0)], (2,))
    T.hold(lambda x: x.split(3)[0], [x], [T.shard(0)], (2,))


def test_a_bias_with_rows():
    """As torch takes it: of the rows of the whole, not of those of a shard."""
    x, weight = torch.arange(42.0, dtype=D).view(7, 6), torch.arange(12.0, dtype=D).view(2, 6)
    for bias in (torch.arange(14.0, dtype=D).view(7, 2), torch.arange(7.0, dtype=D).view(7, 1)):
        for cut in T.cuts(7):
            T.hold(F.linear, [x, weight, bias], [T.shard(0, cut), None, None], (len(cut),))

    def run():
        place = {"src_data_rank": None, "sizes": {0: (4, 3)}}
        shard = st.distribute_tensor(x, T.make_mesh((2,)), [Shard(0)], **place)
        with pytest.raises(RuntimeError):
            F.linear(shard, weight, torch.ones(4, 2, dtype=D))

    st.simulate(2, run)


def test_what_torch_takes():
    x = torch.arange(42.0, dtype=D).view(7, 6)
    fns = [lambda x: x[..., ...], lambda x: x[1, ..., ...], lambda x: torch.tile(x, (2,))]
    for fn in fns:
        for cut in T.cuts(7):
            T.hold(fn, [x], [T.shard(0, cut)], (len(cut),))
