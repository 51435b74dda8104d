"""Triangles, diagonals, new tensors, copies of views and foreach ops against torch."""

import itertools

import torch
from drawn import drawn
from torch.distributed.tensor import Partial, Replicate, Shard

import shardtensor as st
from shardtensor.ranks.testing import full, make_mesh


def in_place_and_partial():
    mesh = make_mesh((2,))
    x = drawn(5, 5)
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
    s = st.distribute_tensor(drawn(5, 4), mesh, [Shard(0)], src_data_rank=None)
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


def private(name):
    return getattr(torch, f"_foreach_{name}")


def public(name):
    """What torch 2.15 has; in place it returns what it was given."""
    run = getattr(torch.foreach, name)
    return (lambda *lists: run(*lists[:3], value=lists[3])) if name.startswith("addc") else run


def foreach():
    mesh = make_mesh((2,))
    xs = [drawn(5, 4) + 3, drawn(3)]
    ss = [st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None) for x in xs]
    ys = [xs[0] / 2, xs[1] * 2]
    calls = {
        "add": [(1.0,), ([1.0, 2.0],), (ys,)], "sub": [(ys,)], "mul": [(torch.tensor(2.0),), (ys,)],
        "div": [(ys,)], "addcmul": [(ys, ys, 0.5), (ys, ys, [1.0, 2.0])], "pow": [(2,)],
        "addcdiv": [(ys, ys, torch.tensor([2.0, 1.0]))], "lerp": [(ys, 0.3), (ys, ys)],
        "exp": [()], "neg": [()], "sqrt": [()], "maximum": [(ys,), (1.0,)], "clamp_max": [(0.5,)],
    }  # fmt: skip
    found = [private, public] if hasattr(torch, "foreach") else [private]
    for get, (name, every) in itertools.product(found, calls.items()):
        for args in every:
            want = get(name)(xs, *args)
            for g, w in zip(get(name)(ss, *args), want, strict=True):
                assert isinstance(g, st.ShardTensor) and torch.allclose(full(g), w, equal_nan=True)
            mine = [s.clone() for s in ss]
            assert get(f"{name}_")(mine, *args) is (None if get is private else mine)
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
