"""A plan for GPUs casts under autocast what GPUs do, and one for CPUs what CPUs do."""

from contextlib import contextmanager
from copy import deepcopy
from threading import Thread

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shardtensor._torch import probe
from shardtensor._torch.autocast import as_on_gpus
from shardtensor.plan.device import CPU, H100, Device
from shardtensor.plan.estimate import Layout, Task, estimate
from shardtensor.train.options import Options

HOST = Device(CPU, 2**34, 1e10, {64: 2e10, 32: 4e10, 16: 4e10}, 1.0, 2e-6)
# of x and w in fp32, h in bf16: what lists of both devices have, of one, and of none; without those
# that ask for a GPU
OPS = {
    "linear": lambda x, h, w: F.linear(x, w),
    "einsum": lambda x, h, w: torch.einsum("bcij,jk->bcik", x, w),
    "attention": lambda x, h, w: F.scaled_dot_product_attention(x, x, h),
    "layer_norm": lambda x, h, w: F.layer_norm(h, (8,)),
    "group_norm": lambda x, h, w: F.group_norm(h, 2),
    "rms_norm": lambda x, h, w: F.rms_norm(h, (8,)),
    "softmax": lambda x, h, w: h.softmax(-1),
    "softmax to a dtype": lambda x, h, w: h.softmax(-1, torch.bfloat16),
    "log_softmax": lambda x, h, w: F.log_softmax(h, 1),
    "sum": lambda x, h, w: h.sum(),
    "sum of a dim": lambda x, h, w: torch.sum(h, (1, 2), True),
    "mean": lambda x, h, w: h.mean(1),
    "prod": lambda x, h, w: h.prod(1),
    "cumsum": lambda x, h, w: h.cumsum(-1),
    "norm": lambda x, h, w: h.norm(),
    "norm of a dim": lambda x, h, w: h.norm(dim=1),
    "vector_norm": lambda x, h, w: torch.linalg.vector_norm(h, 2, (2, 3)),
    "normalize": lambda x, h, w: F.normalize(h, dim=1),
    "exp": lambda x, h, w: h.exp(),
    "pow": lambda x, h, w: h**2.5,
    "rsqrt": lambda x, h, w: h.rsqrt(),
    "softplus": lambda x, h, w: F.softplus(h),
    "logsumexp": lambda x, h, w: h.logsumexp(1),
    "gelu": lambda x, h, w: F.gelu(h),
    "avg_pool2d": lambda x, h, w: F.avg_pool2d(h, 2),
    "avg_pool3d": lambda x, h, w: F.avg_pool3d(h, 2),
    "pad": lambda x, h, w: F.pad(h, (1, 1, 1, 1), mode="reflect"),
    "nearest": lambda x, h, w: F.interpolate(h, scale_factor=2),
    "bilinear": lambda x, h, w: F.interpolate(h, scale_factor=2, mode="bilinear"),
    "cat": lambda x, h, w: torch.cat([x, h]),
    "stack": lambda x, h, w: torch.stack([h, h]),
    "addcmul": lambda x, h, w: torch.addcmul(x, h, h),
    "cdist": lambda x, h, w: torch.cdist(h, h),
    "mse_loss": lambda x, h, w: F.mse_loss(h, h),
    "binary_cross_entropy": lambda x, h, w: F.binary_cross_entropy(h, h),
    "rfft": lambda x, h, w: torch.fft.rfft(x),
    "rfft of bf16": lambda x, h, w: torch.fft.rfft(h),
    "inv": lambda x, h, w: torch.linalg.inv(w),
}  # fmt: skip


def result(op, device):
    """The dtype of what an op gives, or that it raises."""
    x = torch.empty(2, 2, 8, 8, device=device)
    try:
        return op(x, x.bfloat16(), torch.empty(8, 8, device=device)).dtype
    except (RuntimeError, NotImplementedError):
        return "raises"


@contextmanager
def autocast(device):
    torch.set_autocast_enabled(device, True)
    before = torch.get_autocast_dtype(device)
    torch.set_autocast_dtype(device, torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_dtype(device, before)
        torch.set_autocast_enabled(device, False)


@pytest.mark.filterwarnings("ignore")
def test_dtypes_are_those_of_a_gpu():
    with probe.fake_mode(), torch.no_grad():
        with autocast("cuda"):
            gpu = {name: result(op, "cuda") for name, op in OPS.items()}
        with autocast("cpu"):
            own = {name: result(op, "cpu") for name, op in OPS.items()}
            with as_on_gpus():
                said = {name: result(op, "cpu") for name, op in OPS.items()}
            after = {name: result(op, "cpu") for name, op in OPS.items()}
    assert said == gpu and own == after
    assert len([name for name in OPS if own[name] != gpu[name]]) > 15


class Scores(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        return self.last(self.first(x).softmax(-1))


class Own(Scores):
    """Says itself where it is cast, for GPUs."""

    seen: tuple = ()

    def forward(self, x):
        with torch.autocast("cuda", torch.bfloat16):
            y = self.first(x).softmax(-1)
            with torch.autocast("cuda", enabled=False):
                z = self.first(x)
            w = self.last(y)
        Own.seen = y.dtype, z.dtype, w.dtype
        return w + z[:, :16]


class Spectra(Scores):
    def forward(self, x):
        return self.last(torch.fft.rfft(self.first(x)).abs()[:, :16].repeat(1, 4))


def planned(make, device, precision="bf16", ranks=1):
    task = Task(make, [(4096, 16)], dims=(0,))
    return estimate(task, Layout(1, (0,), (ranks,), Options(precision=precision)), device)


@pytest.mark.parametrize("ranks", [1, 2])
def test_plans_of_both_devices_differ(ranks):
    # scores are kept in fp32, and once more as what the product reads
    gpu, host = planned(Scores, H100, ranks=ranks), planned(Scores, HOST, ranks=ranks)
    kept = 4096 // ranks * 64 * 4
    assert gpu.memory["activations"] > host.memory["activations"] + kept // 2
    # transforms have no bf16
    assert "BFloat16" in planned(Spectra, H100, ranks=ranks).refused
    assert not planned(Spectra, HOST, ranks=ranks).refused


def test_autocast_of_the_model_itself_counts():
    assert not planned(Own, H100, None).refused
    assert Own.seen == (torch.float32, torch.float32, torch.bfloat16)


class Aside(Scores):
    """While it is planned, another thread runs under a CPU's autocast, on fakes of its own, too."""

    def forward(self, x):
        aside = Thread(target=lambda: Aside.found.append(of_a_cpu()))
        aside.start()
        aside.join()
        return super().forward(x)


def of_a_cpu():
    """What autocast of a CPU makes of ops, a layer's values and gradients, and a copy of it."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Softmax(-1))
    x = torch.rand(4, 8, requires_grad=True)
    with autocast("cpu"):
        with probe.fake_mode():
            dtypes = {name: result(op, "cpu") for name, op in OPS.items()}
        y = layer(x)
        cuda = torch.autocast("cuda", torch.bfloat16).device
    y.square().sum().backward()
    grads = [p.grad for p in (*layer.parameters(), deepcopy(x))]
    return dtypes, cuda, [y.detach(), *grads]


@pytest.mark.filterwarnings("ignore")
def test_other_threads_are_cast_as_before():
    Aside.found = []
    assert not planned(Aside, H100).refused
    dtypes, cuda, values = of_a_cpu()
    for seen in Aside.found:
        assert seen[:2] == (dtypes, cuda)
        torch.testing.assert_close(seen[2], values, rtol=0, atol=0)
    assert Aside.found and cuda == "cuda"
