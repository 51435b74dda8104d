"""Four ranks as 2 x 2, weights kept in every way, with all that training adds: as one device."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import shardtensor as st
from shardtensor.ranks.testing import make_mesh, run_workers

D = torch.float64
PLAN = {
    "up": ColwiseParallel(),
    "down": RowwiseParallel(),
    "again": ColwiseParallel(),
    "out": RowwiseParallel(),
}


class Net(nn.Module):
    """Two blocks whose first weight is tied; frozen, unused and 0-dim parameters."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 11), nn.Linear(11, 6)
        self.again, self.out = nn.Linear(6, 11), nn.Linear(11, 6)
        self.again.weight = self.up.weight
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.frozen = nn.Parameter(torch.linspace(0.5, 1.5, 6), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(4, 3))

    def forward(self, x):
        x = self.conv(x).permute(0, 2, 3, 1)  # (B, H, W, C)
        x = x + self.down(F.gelu(self.up(self.norm(x)))) * self.scale
        x = x + self.out(F.gelu(self.again(x * self.frozen)))
        # a weight alone: its gradient is whole on every rank
        return x * self.scale + self.scale.exp()


AXES = {
    "data x domain": (("data", "domain"), [Shard(2)]),
    "h x w": (("h", "w"), [Shard(2), Shard(3)]),
    "domain x replicated": (("domain", "copies"), [Shard(2), Replicate()]),
    "data x tp": (("data", "tp"), [Replicate()]),
    "domain x tp": (("domain", "tp"), [Shard(3)]),
}
# how weights are kept: each op sums its own gradients, or parallelize, FSDP2, DDP does
KEPT = {
    "data x domain": ("parallelize", "data", "all", "ddp"),
    "h x w": ("ops", "parallelize", "all"),
    "domain x replicated": ("ops", "parallelize", "all"),
    "data x tp": ("parallelize", "data", "all"),
    "domain x tp": ("ops", "parallelize", "all"),
}
WAYS = [(axes, kept) for axes, ways in KEPT.items() for kept in ways]
FEATURES = ("averaged", "accumulated", "unsynchronised", "scaled")
# FSDP2 and DDP can keep gradients back
CASES = [
    (axes, kept, feature)
    for axes, kept in WAYS
    for feature in FEATURES
    if feature != "unsynchronised" or kept in ("data", "all", "ddp")
]


def made(dtype=D):
    torch.manual_seed(0)
    return Net().to(dtype), [torch.randn(4, 3, 7, 5, dtype=dtype) for _ in range(3)]


def full(x):
    return x.full_tensor() if isinstance(x, DTensor | st.ShardTensor) else x


class Serial:
    """One device: batches as they are, and how a step of one differs from that of many."""

    def __init__(self, dtype):
        self.net, batches = made(dtype)
        self.model, self.batches = self.net, [x.chunk(2) for x in batches]

    def poison(self):
        """One element of one gradient overflows."""
        self.net.up.weight.grad.view(-1)[0] = torch.inf

    def quiet(self, last):
        return nullcontext()

    def averaged(self):
        return AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.8))


class Sharded(Serial):
    """This rank of four."""

    def __init__(self, dtype, axes, kept):
        self.net, batches = made(dtype)
        names, places = AXES[axes]
        mesh = make_mesh((2, 2), names=names)
        data = "data" if "data" in names else None
        if "tp" in names:
            st.tensor_parallel(self.net, mesh["tp"], PLAN)
        if kept not in ("ops", "ddp"):
            fsdp = None if kept == "parallelize" else kept
            st.parallelize(self.net, mesh, data=data, fsdp=fsdp)
        self.model = self.net
        if kept == "ddp":
            group = mesh.get_group("data")
            self.model = DistributedDataParallel(
                self.net, process_group=group, find_unused_parameters=True
            )
        on = mesh if len(places) == 2 else mesh["tp" if "domain" not in names else "domain"]
        self.batches = [
            [self.part(x, mesh, data, on, places) for x in batch.chunk(2)] for batch in batches
        ]

    def poison(self):
        grad = self.net.up.weight.grad
        if not isinstance(grad, DTensor):
            super().poison()
        elif not any(grad.device_mesh.get_coordinate()):
            grad.to_local().view(-1)[0] = torch.inf

    def part(self, x, mesh, data, on, places):
        if data is not None:
            x = x.chunk(2)[mesh.get_local_rank(data)]
        return st.distribute_tensor(x, on, places, src_data_rank=None)

    def quiet(self, last):
        """Gradients are kept back until the last part of a batch, where torch offers it."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def averaged(self):
        return super().averaged() if not isinstance(self.net, FSDPModule) else Moving(self.net)


class Moving:
    """AveragedModel copies the model, which FSDP2 refuses; this averages its parameters alone."""

    def __init__(self, net):
        self.net, self.kept, self.average = net, None, get_ema_multi_avg_fn(0.8)

    def update_parameters(self, net):
        now = [p.detach() for p in net.parameters()]
        if self.kept is None:
            self.kept = [p.clone() for p in now]
        else:
            self.average(self.kept, now, None)

    def named_parameters(self):
        return [(k, v) for (k, _), v in zip(self.net.named_parameters(), self.kept, strict=True)]


def train(run, feature, cast=None):
    """Three steps of AdamW, gradients clipped.

    Returns the weights after them, their moving average, the norms of gradients, and the scale of
    the loss with the dtype of the output.
    """
    optimizer = torch.optim.AdamW(
        [p for p in run.model.parameters() if p.requires_grad], lr=0.05, eps=1e-3
    )
    scaled = feature == "scaled" or cast is torch.float16
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2, enabled=scaled)
    average = run.averaged() if feature == "averaged" else None
    pieces = 2 if feature in ("accumulated", "unsynchronised") else 1
    norms = []
    for i, parts in enumerate(run.batches):
        for j, x in enumerate(parts[:pieces]):
            last = j == pieces - 1
            with run.quiet(last or feature != "unsynchronised"):
                with torch.autocast("cpu", cast, enabled=cast is not None):
                    y = run.model(x)
                loss = y.to(torch.promote_types(y.dtype, torch.float32)).square().mean()
                scaler.scale(loss * (j + 1)).backward()
        if feature == "scaled" and i == 1:
            # no rank may take this step
            run.poison()
        scaler.unscale_(optimizer)
        norms.append(float(full(nn.utils.clip_grad_norm_(run.model.parameters(), 0.5))))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if average is not None:
            average.update_parameters(run.net)
    weights = {k: full(v).detach().clone() for k, v in run.net.state_dict().items()}
    moving = average.named_parameters() if average is not None else ()
    moved = {k.removeprefix("module."): full(v).detach().clone() for k, v in moving}
    return weights, moved, norms, (scaler.get_scale(), y.dtype)


def on_rank(axes, kept, feature, dtype=D, cast=None):
    return train(Sharded(dtype, axes, kept), feature, cast)


@pytest.mark.gloo
@pytest.mark.parametrize("axes, kept, feature", CASES)
def test_trains_as_one_device(axes, kept, feature):
    want, average, norms, how = train(Serial(D), feature)
    for got, moved, seen, done in run_workers(4, on_rank, axes, kept, feature):
        assert seen == pytest.approx(norms, rel=1e-9) and done == how
        for k, w in want.items():
            assert torch.allclose(got[k], w, rtol=1e-9, atol=1e-11), k
        assert torch.equal(got["up.weight"], got["again.weight"])
        assert moved.keys() == average.keys()
        for k, w in average.items():
            assert torch.allclose(moved[k], w, rtol=1e-9, atol=1e-11), k


def test_the_reference():
    """What the comparison rests on: all that trains has moved, a poisoned step was left out."""
    start = made()[0].state_dict()
    for feature in FEATURES:
        weights, average, norms, (scale, _) = train(Serial(D), feature)
        still = {k for k, w in weights.items() if torch.equal(w, start[k])}
        assert still == {"frozen", "unused"}
        assert (feature == "averaged") == bool(average)
        assert [n < float("inf") for n in norms] == [True, feature != "scaled", True]
        assert scale == (128.0 if feature == "scaled" else 1.0)


@pytest.mark.gloo
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axes, kept", WAYS)
def test_autocast(axes, kept, cast):
    """As far from one device under autocast as rounding in another order is; fp16 is scaled."""
    S = torch.float32
    start = made(S)[0].state_dict()
    want, _, norms, how = train(Serial(S), "plain", cast)
    assert how[1] is cast
    near = 4 * torch.finfo(cast).eps
    for got, _, seen, done in run_workers(4, on_rank, axes, kept, "plain", S, cast):
        assert seen == pytest.approx(norms, rel=near) and done == how
        for k, w in want.items():
            moved = (w - start[k]).norm()
            assert (got[k] - w).norm() <= 0.05 * moved, (k, (got[k] - w).norm() / moved)
