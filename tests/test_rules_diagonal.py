"""Triangles, diagonals, new tensors, copies of views and foreach ops against torch."""

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard

import shardtensor as st
from shardtensor.ranks.testing import On, cuts, full, hold, make_mesh, shard

OFFSETS = (-9, -2, 0, 1, 3)


def random(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


MATRIX = {
    "tril": torch.tril,
    "triu": torch.triu,
    "diagonal": lambda x, k: x.diagonal(k, -2, -1),
    "turned": lambda x, k: x.diagonal(k, -1, -2),
    "linalg": lambda x, k: torch.linalg.diagonal(x, offset=k),
    "copy": lambda x, k: torch.diagonal_copy(x, k, 1, 2),
}


@pytest.mark.parametrize("name", MATRIX)
@pytest.mark.parametrize("offset", OFFSETS)
def test_matrices(name, offset):
    fn = MATRIX[name]
    for dim in (1, 2):
        shape = [2, 5, 5]
        shape[dim] = 7
        for sizes in cuts(7):
            hold(fn, [random(*shape), offset], [shard(dim, sizes), None], (len(sizes),))
    x = random(2, 7, 5)
    for dims in ((1, 2), (2, 1), (1, 1), (0, 2)):
        hold(fn, [x, offset], [On([Shard(d) for d in dims]), None], (2, 2))
    hold(fn, [x, offset], [On([Replicate(), Shard(1)]), None], (2, 2))
    hold(fn, [x.bool(), offset], [On([Shard(1), Shard(2)]), None], (2, 2), grad=False)


@pytest.mark.parametrize("offset", OFFSETS)
def test_embedded(offset):
    for sizes in cuts(6):
        n = len(sizes)
        for dims in ((-2, -1), (0, 2), (2, 0), (1, 0)):
            args = [random(3, 6), offset, *dims]
            specs = hold(torch.diag_embed, args, [shard(1, sizes), *[None] * 3], (n,))
            assert specs[0].varying == (0,)
        hold(torch.diag, [random(6), offset], [shard(0, sizes), None], (n,))
        hold(torch.diag, [random(6, 4), offset], [shard(0, sizes), None], (n,))
        hold(torch.diagflat, [random(6, 2), offset], [shard(0, sizes), None], (n,))
        hold(torch.trace, [random(6, 4)], [shard(0, sizes)], (n,))
        hold(torch.trace, [random(6, 6, dtype=torch.int64)], [shard(1, sizes)], (n,), grad=False)
    hold(torch.diag_embed, [random(3, 6)], [On([Shard(0), Shard(1)])], (2, 2))
    hold(torch.diag_embed, [random(3, 6)], [On([Shard(1), Shard(1)])], (2, 2))


@pytest.mark.parametrize("dims", [(0, 0), (1, 1), (0, 1)])
def test_block_diag(dims):
    places = [On([Shard(dims[0])]), None, On([Shard(dims[1])]), None]
    args = [random(4, 3), random(2, 5), random(2, 2), random(3)]
    hold(lambda *t: torch.block_diag(*t), args, places, (2,))


def in_place_and_partial():
    mesh = make_mesh((2,))
    x = random(5, 5)
    s = st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)
    assert torch.equal(full(s.clone().tril_(1)), x.tril(1))
    assert torch.equal(full(s.clone().triu_(-1)), x.triu(-1))
    s.diagonal().zero_()
    assert torch.equal(full(s), x - x.diag().diag())
    p = st.ShardTensor.from_local(x, mesh, [Partial()])
    for fn in (torch.tril, torch.diagonal, torch.diag_embed, torch.trace):
        assert torch.allclose(full(fn(p)), 2 * fn(x))
    whole = s.redistribute(placements=[Replicate()])
    assert torch.equal(full(whole.triu()), full(s).triu())


def test_in_place_and_partial():
    st.simulate(2, in_place_and_partial)


def created():
    mesh = make_mesh((2,))
    s = st.distribute_tensor(random(5, 4), mesh, [Shard(0)], src_data_rank=None)
    for new in (s.new_zeros(5, 4), s.new_ones((5, 4)), s.new_empty([5, 4]),
                s.new_zeros(size=(5, 4)), s.new_full((5, 4), 2.0),
                s.new_empty_strided((5, 4), (4, 1))):  # fmt: skip
        assert new._spec == s._spec and new.dtype == s.dtype
    new = s.new_full((4, 5), 3, dtype=torch.int32)
    assert new.shape == (4, 5) and new.dtype == torch.int32 and not new._spec.varying
    assert full(s.new_ones(())).item() == 1 and s.new_zeros(3).shape == (3,)
    made = s.new_tensor([1.5, 2.0], requires_grad=True)
    assert made.requires_grad and full(made).tolist() == [1.5, 2.0]
    assert torch.equal(full(s.new_tensor(s)), full(s))
    filled = torch.fill(s, torch.tensor(2.0))
    assert filled._spec == s._spec and torch.equal(full(filled), torch.full((5, 4), 2.0).double())


def test_created():
    st.simulate(2, created)


COPIES = [
    lambda x: torch.view_copy(x, (4, 6)),
    lambda x: torch.expand_copy(x, (2, 4, 2, 3)),
    lambda x: torch.permute_copy(x, (2, 0, 1)),
    lambda x: torch.transpose_copy(x, 0, 2),
    lambda x: torch.squeeze_copy(torch.unsqueeze_copy(x, 1), 1),
    lambda x: torch.unfold_copy(x, 0, 3, 1),
    lambda x: torch.alias_copy(x),
    lambda x: torch.select_copy(x, 0, 2),
    lambda x: torch.slice_copy(x, 0, 1, 3),
    lambda x: torch.unbind_copy(x, 1),
    lambda x: torch.split_copy(x, 2),
    lambda x: torch.split_with_sizes_copy(x, (1, 3)),
    lambda x: torch.t_copy(x[:, 0]),
    lambda x: torch.diagonal_copy(x),
    lambda x: x.fill_(2.0) if not x.requires_grad else torch.fill(x, 2.0),
]


@pytest.mark.parametrize("fn", COPIES)
def test_copies_of_views(fn):
    for place in (shard(0), shard(0, (0, 4)), shard(2)):
        hold(fn, [random(4, 2, 3)], [place], (2,))


def foreach():
    mesh = make_mesh((2,))
    xs = [random(5, 4) + 3, random(3)]
    ss = [st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None) for x in xs]
    ys = [xs[0] / 2, xs[1] * 2]
    calls = {
        "add": [(1.0,), ([1.0, 2.0],), (ys,)], "sub": [(ys,)], "mul": [(torch.tensor(2.0),), (ys,)],
        "div": [(ys,)], "addcmul": [(ys, ys, 0.5), (ys, ys, [1.0, 2.0])], "pow": [(2,)],
        "addcdiv": [(ys, ys, torch.tensor([2.0, 1.0]))], "lerp": [(ys, 0.3), (ys, ys)],
        "exp": [()], "neg": [()], "sqrt": [()], "maximum": [(ys,), (1.0,)], "clamp_max": [(0.5,)],
    }  # fmt: skip
    for name, every in calls.items():
        for args in every:
            want = getattr(torch, f"_foreach_{name}")(xs, *args)
            for g, w in zip(getattr(torch, f"_foreach_{name}")(ss, *args), want, strict=True):
                assert isinstance(g, st.ShardTensor) and torch.allclose(full(g), w, equal_nan=True)
            mine = [s.clone() for s in ss]
            assert getattr(torch, f"_foreach_{name}_")(mine, *args) is None
            for g, w in zip(mine, want, strict=True):
                assert torch.allclose(full(g), w, equal_nan=True)
    for g, x in zip(torch._foreach_norm(ss), xs, strict=True):
        assert torch.allclose(full(g), x.norm())
    assert torch.allclose(full(torch._foreach_max(ss)[0]), xs[0].max())
    torch._foreach_copy_(ss, ys)
    torch._foreach_zero_([ss[0]])
    assert not full(ss[0]).any() and torch.equal(full(ss[1]), ys[1])
    for g, w in zip(torch._foreach_pow(2.0, ss), torch._foreach_pow(2.0, ss), strict=True):
        assert torch.equal(full(g), full(w))


def test_foreach():
    st.simulate(2, foreach)
