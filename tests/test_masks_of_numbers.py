"""Attention with masks of numbers and dropout, in blocks that a fused kernel takes, as on a GPU.

A stand-in on CPUs does what the source of CUDA's memory-efficient kernel says: it adds the mask to
the scores, takes powers of two of them, has one log-sum-exp a row, and gives zeros where nothing is
seen. One device's numbers are its own of one block.
"""

from functools import partial
from math import inf, log

import pytest
import torch
import torch.nn.functional as F
from drawn import drawn
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import _torch
from shardtensor import testing as T
from shardtensor.attention import blocks
from shardtensor.attention.strategy import strategy
from shardtensor.ranks.testing import make_mesh

D = torch.float64
LEAST = torch.finfo(D).min
CUTS = [(5, 3), (3, 0, 5), (2, 2, 2, 2)]


def scores(q, k, block, base):
    s = q.to(D) @ k.to(D).repeat_interleave(q.shape[1] // k.shape[1], 1).mT * block.scale
    if block.bias is not None:
        s = s + block.bias
    if block.causal:
        s = s.masked_fill(s.new_ones(s.shape[-2:]).tril() == 0, -inf)
    return s / log(base)


def kept(s, block):
    """What dropout does to the weights."""
    made = torch.Generator().manual_seed(block.seed)
    drawn = torch.rand(s.shape, generator=made, dtype=D)
    return (drawn >= block.drop) / (1 - block.drop)


def forward(base, calls, q, k, v, block):
    calls.append(block)
    s = scores(q, k, block, base)
    most = s.amax(-1)
    most = most.masked_fill(most == -inf, 0.0)
    p = (s - most.unsqueeze(-1)).mul(log(base)).exp()
    total = p.sum(-1)
    total = total.masked_fill(total == 0, 1.0)
    p = p * kept(s, block) / total.unsqueeze(-1)
    out = p @ v.to(D).repeat_interleave(q.shape[1] // v.shape[1], 1)
    return out.to(q.dtype), most * log(base) + total.log()


def backward(base, g, q, k, v, out, lse, block, mask_grad):
    times = q.shape[1] // k.shape[1]
    s = scores(q, k, block, base)
    p, keep = (s.mul(log(base)) - lse.unsqueeze(-1)).exp(), kept(s, block)
    wide = [x.repeat_interleave(times, 1) for x in (k, v)]
    ds = p * (g @ wide[1].mT * keep - (g * out).sum(-1, keepdim=True))
    dk, dv = (ds * block.scale).mT @ q, (p * keep).mT @ g
    dk, dv = (x.unflatten(1, (-1, times)).sum(2) for x in (dk, dv))
    return ds @ wide[0] * block.scale, dk, dv, ds if mask_grad else None


@pytest.fixture(params=[2.718281828459045, 2.0], ids=["powers of e", "powers of two"])
def kernel(request, monkeypatch):
    """The stand-in, and the blocks that it took; no digits are looked at."""
    base, calls = request.param, []
    found = _torch.AttentionKernel(partial(forward, base, calls), partial(backward, base))
    monkeypatch.setattr(_torch, "attention_kernel", lambda *args: found)
    monkeypatch.setattr(blocks, "_looked_at", lambda lse: False)
    return found, calls


def of_all_sizes(*shape):
    """Rows that hide all keys, by numbers or wholly, or some of them, or those of some blocks."""
    mask = drawn(*shape, 8, 8, seed=3)
    mask[..., 0, :] -= 1e9
    mask[..., 1, :] = -inf
    mask[..., 2, 3:] = -inf
    mask[..., 3, :4] = LEAST
    mask[..., 4, :] = -1e7
    mask[..., 4, 2] = -1e9
    mask[..., 5, :] += 1e8
    mask[..., 6, :] = LEAST
    mask[..., 6, 5] = -inf
    return mask


def attend(q, k, v, mask, **options):
    with strategy("ring"):
        return F.scaled_dot_product_attention(q, k, v, mask, **options)


def weighed(out):
    """A gradient. It has none for rows whose log-sum-exp has lost its digits: they are noise."""
    rows = torch.tensor([0, 1, 1, 1, 0, 0, 0, 1], dtype=D)
    return out.cos() * rows[:, None]


def trained(given, cut, places):
    mesh = make_mesh((len(cut),))
    xs = [
        st.distribute_tensor(
            x, mesh, [p], src_data_rank=None, **({"sizes": {2: cut}} if p == Shard(2) else {})
        ).requires_grad_(x.requires_grad)
        for x, p in zip(given, places, strict=True)
    ]
    out = attend(*xs, enable_gqa=True)
    out.backward(weighed(out.detach()))
    return [out.detach().full_tensor(), *(x.grad.full_tensor() for x in xs if x.requires_grad)]


def alone(kernel, given):
    """One device's numbers: one block of the kernel."""
    q, k, v, mask = (x.detach() for x in given)
    block = _torch.Block(q.shape[-1] ** -0.5, mask)
    out, lse = kernel.forward(q, k, v, block)
    grads = kernel.backward(weighed(out), q, k, v, out, lse, block, True)
    return [out, *grads[:3], grads[3].sum_to_size(mask.shape)][: 4 + given[3].requires_grad]


@pytest.mark.parametrize("learnt", [False, True], ids=["fixed", "learnt"])
@pytest.mark.parametrize("shape", [(), (2, 4)], ids=str)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_masks_of_numbers_of_all_sizes(cut, shape, learnt, kernel):
    given = [drawn(2, 4, 8, 4, seed=i).requires_grad_() for i in range(3)]
    given.append(of_all_sizes(*shape).requires_grad_(learnt))
    want = alone(kernel[0], given)
    places = [*[Shard(2)] * 3, Replicate()]
    for got in st.simulate(len(cut), trained, given, cut, places):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


def test_one_row_for_all_queries_and_one_number_for_all_keys(kernel):
    given = [drawn(2, 4, 8, 4, seed=i).requires_grad_() for i in range(3)]
    sizes = of_all_sizes()
    # of the last one all gradients are noise
    for mask, n in ((sizes[3:4], 4), (sizes[:, :1].contiguous(), 4), (sizes[6:7], 1)):
        want = alone(kernel[0], [*given, mask])
        places = [*[Shard(2)] * 3, Replicate()]
        for got in st.simulate(2, trained, [*given, mask], (5, 3), places):
            for g, w in zip(got[:n], want[:n], strict=True):
                torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("place", [[None, T.shard(2), T.shard(2)], [T.shard(2), None, None]])
def test_keys_alone_and_queries_alone(place, kernel):
    """Of keys alone ranks merge what they found; numbers that lose no digits are plain torch's."""
    given = [*(drawn(2, 4, 8, 4, seed=i) for i in range(3)), drawn(8, 8)]
    given[3][2, :5] = -inf
    T.hold(attend, given, [*place, None], (3,))


def test_ranks_that_have_other_keys_for_the_same_queries(kernel):
    given = [drawn(2, 4, 8, 4, seed=i).requires_grad_() for i in range(3)]
    mask = of_all_sizes()
    # powers of two round the difference of two such numbers, which ranks take exactly
    mask[0], mask[5] = -1e9, 1e8
    want = alone(kernel[0], [*given, mask])
    places = [Replicate(), Shard(2), Shard(2), Replicate()]
    for got in st.simulate(2, trained, [*given, mask], (2, 6), places):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


def test_shared_heads(kernel):
    given = [drawn(2, 4, 8, 4).requires_grad_()]
    given += [drawn(2, 2, 8, 4, seed=i).requires_grad_() for i in (1, 2)]
    given.append(of_all_sizes())
    want = alone(kernel[0], given)
    places = [*[Shard(2)] * 3, Replicate()]
    for got in st.simulate(3, trained, given, (3, 0, 5), places):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


def test_blocks_are_counted_only_where_several_are_merged(kernel):
    given = [drawn(1, 2, 8, 4, seed=i) for i in range(3)]

    def run(places):
        mesh = make_mesh((2,))
        xs = [st.distribute_tensor(x, mesh, [p], src_data_rank=None) for x, p in places]
        return attend(*xs)

    # a causal mask is no mask of numbers; heads that are sharded have all keys
    for mask, place, n in ((of_all_sizes(), Shard(2), 8), (of_all_sizes() > 0, Shard(2), 4)):
        kernel[1].clear()
        st.simulate(2, run, [*((x, place) for x in given), (mask, Replicate())])
        assert len(kernel[1]) == n


def test_halves_are_counted_as_exactly_as_they_are_rounded(kernel):
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        given = [drawn(2, 4, 8, 4, seed=i).to(dtype) for i in range(3)]
        mask = drawn(8, 8).to(dtype)
        mask[1] -= 3e4
        mask[2, :6] = torch.finfo(dtype).min
        mask[3] = -inf
        given[1] *= 4
        true = kernel[0].forward(*(x.to(D) for x in given), _torch.Block(0.5, mask.to(D)))[0]
        rounded = true.to(dtype).to(D)

        def run(given=given, mask=mask):
            mesh = make_mesh((4,))
            xs = [st.distribute_tensor(x, mesh, [Shard(2)], src_data_rank=None) for x in given]
            return attend(*xs, mask).full_tensor().to(D)

        for got in st.simulate(4, run):
            assert (got - true).abs().max() <= 4 * (rounded - true).abs().max()


# dropout -----------------------------------------------------------------------------------------


def dropped(x, cut, mask):
    torch.manual_seed(5)
    mesh = make_mesh((len(cut),))
    xs = [
        st.distribute_tensor(
            y, mesh, [Shard(2)], src_data_rank=None, sizes={2: cut}
        ).requires_grad_()
        for y in x.unbind(0)
    ]
    y = attend(*xs, mask, dropout_p=0.3)
    return xs, (y * torch.arange(y.shape[-1])).sum()


def slope(x, cut, mask, way):
    xs, y = dropped(x, cut, mask)
    learnt = [mask] if mask is not None and mask.requires_grad else []
    grads = torch.autograd.grad(y, [*xs, *learnt])[:3]
    found = sum((g.full_tensor() * w).sum() for g, w in zip(grads, way, strict=True))
    up, down = (dropped(x + e * way, cut, mask)[1].full_tensor() for e in (1e-5, -1e-5))
    return found.detach(), (up - down).detach() / 2e-5


MASKS = [None, "bool", "numbers", "learnt", "learnt, whose gradient the kernel has not"]


@pytest.mark.parametrize("masked", MASKS)
def test_backward_drops_what_forward_dropped(masked, kernel, monkeypatch):
    x, way = drawn(3, 2, 4, 8, 4), drawn(3, 2, 4, 8, 4, seed=9)
    mask = drawn(8, 8, seed=2)
    mask = None if masked is None else mask > -1 if masked == "bool" else mask
    if masked and "learnt" in masked:
        mask.requires_grad_()
    if masked == MASKS[-1]:
        none = lambda q, k, v, mask, causal, drop=0.0, grad=False: None if grad else kernel[0]  # noqa: E731
        monkeypatch.setattr(_torch, "attention_kernel", none)
    for found, want in st.simulate(3, slope, x, (3, 0, 5), mask, way):
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-8)
    fused = {b.seed for b in kernel[1] if b.drop}
    assert not fused if masked == MASKS[-1] else len(fused) > 1


def test_as_much_is_dropped_as_torch_drops(kernel):
    """Weights of values that are 1 add up to 1 on average, and are 0 in so many rows of one key."""
    q = torch.zeros(1, 64, 16, 4, dtype=D)
    v = torch.ones(1, 64, 16, 4, dtype=D)

    def run():
        mesh = make_mesh((4,))
        xs = [st.distribute_tensor(x, mesh, [Shard(2)], src_data_rank=None) for x in (q, q, v)]
        only = torch.eye(16, dtype=torch.bool)
        return [attend(*xs, m, dropout_p=0.25).full_tensor()[..., 0] for m in (None, only)]

    torch.manual_seed(0)
    every, one = st.simulate(4, run)[0]
    assert abs(every.mean() - 1) < 0.02 and every.std() > 0.05
    assert abs((one == 0).double().mean() - 0.25) < 0.05
