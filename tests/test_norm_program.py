"""Norms over cut dims: what their program runs, sends and rounds, against plain torch's."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernels import Counted
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import cache
from shardtensor import testing as T
from shardtensor._torch.dispatcher import not_tracing
from shardtensor._torch.world import silent_world
from shardtensor.comm import groups, wire
from shardtensor.ranks.testing import make_mesh
from shardtensor.rules.norm import moments, normalise, numbers, part_moments
from shardtensor.spec import Spec
from shardtensor.tensor import wrap

D = torch.float64
ROWS = 4


def counted(make, shape, ranks):
    """(kernels, bytes, messages, bytes sent) of forward and of backward, of one rank of so many."""
    torch.manual_seed(0)
    cache.clear()
    with silent_world(ranks // 2, ranks):
        try:
            x = torch.randn(shape)
            module = make(ranks)
            if ranks > 1:
                mesh, sizes = init_device_mesh("cpu", (ranks,)), {2: [ROWS] * ranks}
                x = st.ShardTensor.from_local(x, mesh, [Shard(2)], sizes)
            x.requires_grad_()
            for _ in range(2):
                with Counted() as ahead, st.trace() as there:
                    y = module(x)
                local = getattr(y, "_local", y)
                g = torch.randn_like(local)
                with Counted() as behind, st.trace() as back:
                    local.backward(g)
        finally:
            cache.clear()
            groups.forget()
    return [(c.kernels, c.bytes, len(t.sent), t.bytes) for c, t in ((ahead, there), (behind, back))]


def last(norm):
    return lambda ranks: norm((16, ROWS * ranks, 32), elementwise_affine=False)


NORMS = {
    "batch 1d": (lambda _: nn.BatchNorm1d(16), (2, 16, ROWS)),
    "batch 2d": (lambda _: nn.BatchNorm2d(16), (2, 16, ROWS, 32)),
    "batch 3d": (lambda _: nn.BatchNorm3d(16), (2, 16, ROWS, 8, 8)),
    "group": (lambda _: nn.GroupNorm(4, 16), (2, 16, ROWS, 32)),
    "instance": (lambda _: nn.InstanceNorm2d(16, affine=True), (2, 16, ROWS, 32)),
    "layer": (last(nn.LayerNorm), (2, 16, ROWS, 32)),
    "rms": (last(nn.RMSNorm), (2, 16, ROWS, 32)),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_handful_of_kernels_and_one_message_each_way(name):
    """Two of them, a copy and a fill in the transport, are not those of a real group."""
    make, shape = NORMS[name]
    (plain, plain_bytes, *_), (plain_back, plain_back_bytes, *_) = counted(make, shape, 1)
    for ranks in (2, 8, 64):
        ahead, behind = counted(make, shape, ranks)
        assert ahead[0] <= plain + 4 and behind[0] <= plain_back + 6
        assert ahead[2] == behind[2] == 1
        # small messages weigh in a small image
        more = 20 * (ahead[3] + behind[3]) + 4096
        assert ahead[1] + behind[1] <= plain_bytes + plain_back_bytes + more


WEIGHTED = {
    "layer": lambda ranks: nn.LayerNorm((ROWS * ranks, 32)),
    "layer without a bias": lambda ranks: nn.LayerNorm((ROWS * ranks, 32), bias=False),
    "rms": lambda ranks: nn.RMSNorm((ROWS * ranks, 32)),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_along_a_cut_dim_take_no_message_of_their_own(name):
    """Their gradients travel with the sums; a rank's part of a weight is a view."""
    make, shape = WEIGHTED[name], (2, 64, ROWS, 32)
    (plain, plain_bytes, *_), (plain_back, plain_back_bytes, *_) = counted(make, shape, 1)
    for ranks in (2, 8, 64):
        ahead, behind = counted(make, shape, ranks)
        assert ahead[0] <= plain + 4 and behind[0] <= plain_back + 6
        assert ahead[2] == behind[2] == 1
        if ranks == 2:
            assert ahead[1] + behind[1] <= 1.3 * (plain_bytes + plain_back_bytes)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("ranks", [8, 16, 64])
def test_weights_along_a_cut_dim_travel_once(norm, ranks):
    """Among more than 8 ranks they did twice: as sums with zeros."""
    module = norm((16, ROWS * ranks, 32))
    _, behind = counted(lambda _: module, (2, 16, ROWS, 32), ranks)
    assert behind[3] <= sum(p.nbytes for p in module.parameters()) and behind[2] == 1


@pytest.mark.parametrize("norm", [nn.LayerNorm((7, 5)), nn.RMSNorm((7, 5))], ids=str)
@pytest.mark.parametrize("most", [0, 2**20])
def test_weights_that_are_plain_replicated_or_cut(norm, most, monkeypatch):
    """Beside a batch that is cut, too; whether ranks send to all others or add up."""
    torch.manual_seed(0)
    monkeypatch.setattr(wire, "DIRECT", most)
    x, w = torch.randn(4, 7, 5, dtype=D), torch.rand(7, 5, dtype=D).requires_grad_()
    b = torch.randn(7, 5, dtype=D).requires_grad_() if isinstance(norm, nn.LayerNorm) else None

    def run(x, w, b):
        if b is None:
            return F.rms_norm(x, (7, 5), w)
        return F.layer_norm(x, (7, 5), w, b)

    batch = T.On([Shard(0), Shard(1)])
    ways = [((3,), T.shard(1, cut)) for cut in ((4, 0, 3), (3, 2, 2), (2, 2, 3))]
    for mesh, place in (*ways, ((2, 2), batch), ((1,), T.shard(1, (7,)))):
        for weight in (None, T.shard(0, (4, 0, 3))) if mesh == (3,) else (None,):
            T.hold(run, [x, w, b], [place, weight, None], mesh)


@pytest.mark.parametrize("name", NORMS)
def test_bytes_do_not_grow_with_the_ranks(name):
    make, shape = NORMS[name]
    few, many = counted(make, shape, 64), counted(make, shape, 512)
    for (kernels, _, _, sent), (kernels_, _, _, sent_) in zip(few, many, strict=True):
        assert kernels_ == kernels and sent_ <= 1.02 * sent


class Affine(nn.Module):
    """A norm, then what writes to its result in place."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm.to(D)
        torch.manual_seed(1)
        for v in self.norm.parameters():
            v.data.uniform_(0.5, 1.5)

    def forward(self, x):
        return F.leaky_relu_(self.norm(x), 0.2)


EACH = [
    nn.BatchNorm2d(6), nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    nn.GroupNorm(3, 6), nn.LayerNorm((6, 7, 5)), nn.RMSNorm((7, 5)),
]  # fmt: skip


@pytest.mark.parametrize("norm", EACH, ids=str)
@pytest.mark.parametrize("wide", [True, False])
def test_statistics_that_are_added_up(norm, wide, monkeypatch):
    """As on more than 16 ranks; written to in place afterwards."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 7, 5, dtype=D) + 3
    monkeypatch.setattr(moments, "GATHERED", 1)
    monkeypatch.setattr(normalise, "GATHERED", 1)
    module = Affine(norm)
    for cut in ((4, 0, 3), (7, 0), (2, 2, 3)):
        if wide:
            T.hold(module, [x], [T.shard(2, cut)], (len(cut),))
        else:
            T.hold(module.float(), [x.float()], [T.shard(2, cut)], (len(cut),))


def test_an_empty_part_adds_nothing_to_statistics_of_huge_numbers(monkeypatch):
    """The square of whose mean is no number: not even none times it, where parts are added up."""
    monkeypatch.setattr(moments, "GATHERED", 1)
    monkeypatch.setattr(normalise, "GATHERED", 1)
    x = 1.6e154 * (1 + 0.03 * torch.randn(2, 6, 7, 5, dtype=D, generator=torch.manual_seed(0)))
    for fn in (nn.GroupNorm(3, 6).to(D), lambda v: torch.var_mean(v, 2)):
        T.hold(fn, [x], [T.shard(2, (4, 0, 3))], (3,), grad=False)


@pytest.mark.parametrize("norm", EACH, ids=str)
@pytest.mark.parametrize("most", [1, 16])
def test_numbers_of_other_devices(norm, most, monkeypatch):
    """Which stay in tensors there."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 7, 5, dtype=D) + 3
    monkeypatch.setattr(numbers, "READ", ())
    monkeypatch.setattr(normalise, "GATHERED", most)
    for cut in ((4, 0, 3), (5, 2)):
        T.hold(Affine(norm), [x], [T.shard(2, cut)], (len(cut),))


@pytest.mark.parametrize("norm", EACH, ids=str)
def test_second_derivatives(norm):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 7, 5, dtype=D) + 1
    module = Affine(copy.deepcopy(norm)).requires_grad_(False)
    weight = module.norm.weight.detach().clone().requires_grad_()

    def penalty(v, w):
        y = torch.func.functional_call(module, {"norm.weight": w}, (v,))
        gv, gw = torch.autograd.grad((y * y * y).sum(), (v, w), create_graph=True)
        return (gv * gv).sum() + (gw * gw).sum()

    leaf = x.clone().requires_grad_()
    for cut in ((4, 3), (0, 7)):
        T.hold(penalty, [leaf, weight], [T.shard(2, cut), None], (2,), rtol=1e-9)


def _errors(name, cut, mean):
    """Largest errors of output, gradient and weight's gradient in fp32, over plain torch's."""
    mesh = T.make_mesh((len(cut),))
    g = torch.Generator().manual_seed(3)
    data = (torch.randn(2, 6, 64, 16, generator=g, dtype=D) + mean).float().to(D)
    cotangent = torch.randn(data.shape, generator=g, dtype=D)
    make = {
        "batch": lambda: nn.BatchNorm2d(6),
        "group": lambda: nn.GroupNorm(3, 6),
        "instance": lambda: nn.InstanceNorm2d(6, affine=True),
        "layer": lambda: nn.LayerNorm((6, 64, 16)),
    }[name]

    def run(dtype, place):
        module, v = make().to(dtype), data.to(dtype, copy=True).requires_grad_()
        if place:
            local = v.detach()
            v = st.distribute_tensor(local, mesh, [Shard(2)], src_data_rank=None, sizes={2: cut})
            v.requires_grad_()
        y = module(v)
        (y * cotangent.to(dtype)).sum().backward()
        return [T.full(t).to(D) for t in (y, v.grad, module.weight.grad)]

    exact = run(D, False)
    errors = [
        [float((a - e).abs().max()) for a, e in zip(run(torch.float32, p), exact, strict=True)]
        for p in (True, False)
    ]
    return [a / b for a, b in zip(*errors, strict=True)]


@pytest.mark.parametrize("name", ["batch", "group", "instance", "layer"])
@pytest.mark.parametrize("added", [False, True])
def test_a_mean_of_ten_thousand_deviations(name, added, monkeypatch):
    """In fp32 the errors are those of plain torch, but for chance in the largest of them."""
    if added:
        monkeypatch.setattr(normalise, "GATHERED", 1)
    for cut in ((40, 24), (1, 60, 0, 3)):
        for found in st.simulate(len(cut), _errors, name, cut, 1e4):
            assert max(found) <= 1.5, found


def _resizable():
    mesh = T.make_mesh((2,))
    module = nn.BatchNorm2d(6)
    x = st.distribute_tensor(torch.randn(2, 6, 8, 4), mesh, [Shard(2)], src_data_rank=None)
    module(x.requires_grad_()).sum().backward()
    return [v.untyped_storage().resizable() for v in (x._local, *module.state_dict().values())]


def test_what_others_resize_stays_so():
    """FSDP2 frees the memory of parameters between their uses."""
    for found in st.simulate(2, _resizable):
        assert all(found)


def test_a_weight_along_the_cut_dim_on_fake_tensors():
    """Torch's fake kernels take statistics of a row each in one shape only."""
    with silent_world(1, 2):
        mesh = make_mesh((2,))
        # a mesh is asked for its ranks, which are numbers
        groups.group(mesh, (0,))
        with FakeTensorMode(allow_non_fake_inputs=True), not_tracing():
            norm = nn.LayerNorm(6)
            spec = Spec.of(mesh, [Shard(2)], (4, 5, 6))
            x = wrap(torch.randn(spec.local_shape), spec)
            norm(x).square().sum().backward()
            assert norm.weight.grad.shape == norm.bias.grad.shape == (6,)


PER_CHANNEL = [norm for norm in EACH if not hasattr(norm, "normalized_shape")]


@pytest.mark.parametrize("dtype", [torch.float32, D], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 130, 129), (1, 2, 64, 512), (3, 4, 7, 50, 9)])
@pytest.mark.parametrize("mean, passes", [(0.0, 1), (2.0, 1), (5.0, 2), (30.0, 2), (1e4, 2)])
def test_statistics_of_a_part_have_the_digits_of_its_elements(
    shape, mean, passes, dtype, monkeypatch
):
    """As sums of squares where these have them, else of squares of differences from the mean."""
    x = (torch.randn(shape, dtype=D, generator=torch.manual_seed(0)) + mean).to(dtype)
    run, sums = [], part_moments._summed
    monkeypatch.setattr(part_moments, "_summed", lambda *args: run.append(1) or sums(*args))
    found = part_moments.moments_of(x)
    assert len(run) == passes
    dims = (0, *range(2, x.ndim))
    wide = x.numpy().astype(np.longdouble)
    eps = torch.finfo(dtype).eps
    assert abs(found[0] - wide.mean(dims)).max() <= 4 * eps * max(1.0, mean)
    most = 8 * (1 + mean**2) if passes == 1 else 8
    assert abs(found[1] / wide.var(dims) - 1).max() <= most * eps


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30, 1e18, float("nan")])
def test_statistics_of_a_part_of_one_value(value):
    """The variance is none, or as torch's kernel has it; never below zero."""
    x = torch.full((2, 3, 64, 256), value)
    mean, var = part_moments.moments_of(x)
    want = torch.batch_norm_update_stats(x, None, None, 0.0)
    torch.testing.assert_close(torch.from_numpy(mean).float(), want[0], equal_nan=True)
    torch.testing.assert_close(torch.from_numpy(var).float(), want[1], equal_nan=True)


@pytest.mark.parametrize("norm", PER_CHANNEL, ids=str)
def test_norms_of_pieces(norm, monkeypatch):
    """Parts that are added up in pieces, beside one that is too small for it and an empty one."""
    torch.manual_seed(0)
    monkeypatch.setattr(part_moments, "WORTH", 2 * 6 * 3 * 32)
    x = torch.randn(2, 6, 9, 32, dtype=D) + 0.5
    for cut in ((4, 0, 5), (8, 1)):
        T.hold(Affine(norm), [x], [T.shard(2, cut)], (len(cut),))
