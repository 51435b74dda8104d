"""Whether a plan for GPUs casts what a GPU's autocast does: dtypes of all ops, and the peak.

    FOLDER/run python benchmarks/plan_casts.py      (pretended GPU: benchmarks/pretended/README.md)

A step of training under bf16 runs on the pretended GPU and on fake tensors of a CPU as `plan` has
it. Columns: (shape, dtype) of what ops give, that both have, of those of the GPU; bytes that what
they give holds at the peak, with weights, over the plan's.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_models import DiT
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardtensor._torch import probe
from shardtensor._torch.autocast import as_on_gpus
from shardtensor.plan.estimate import H100, Layout, Task, estimate
from shardtensor.train.options import Options

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from models import UNet, ViT

Made = Callable[[], nn.Module]


class Written(nn.Module):
    """Attention, norms and scores as they are written by hand."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = nn.RMSNorm(width)
        self.mix = nn.Parameter(torch.randn(4, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        q = F.normalize(torch.einsum("bhnc,hcd->bhnd", q, self.mix), dim=-1)
        scores = (q @ k.transpose(-2, -1)).softmax(-1)
        y = self.out((scores @ v).transpose(1, 2).flatten(2))
        return F.softplus(x + y) + scores.sum((1, -1), keepdim=True).squeeze(1).log1p()


class Points(nn.Module):
    """Neighbours by distance, whose messages are added up where they go."""

    def __init__(self) -> None:
        super().__init__()
        self.edge, self.out = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.exp(-torch.cdist(x, x)).pow(2)
        messages = F.elu(self.edge(x))
        near = weights / weights.norm(dim=-1, keepdim=True)
        y = torch.zeros_like(messages).scatter_add(1, torch.zeros_like(messages).long(), messages)
        return self.out(torch.cumsum(near @ messages, 1) + y)


class Resized(nn.Module):
    """Convolutions, group norm and what makes images larger."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.last = nn.Conv2d(20, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm(F.avg_pool2d(self.first(x), 2)))
        y = F.interpolate(y, scale_factor=2, mode="bilinear")
        return self.last(torch.cat([x, y], 1)).rsqrt().logsumexp(1)


class Fourier(nn.Module):
    """Transforms have no bf16: autocast is off around them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 4, 1)
        self.weight = nn.Parameter(torch.randn(16, 16, 8, 8, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x))
        with torch.autocast(x.device.type, enabled=False):
            modes = torch.fft.rfft2(x.float())
            y = torch.zeros_like(modes)
            y[..., :8, :8] = torch.einsum("bixy,ioxy->boxy", modes[..., :8, :8], self.weight)
            y = torch.fft.irfft2(y, x.shape[-2:])
        return self.last(x + y)


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(2, 8, 3, padding=1), nn.BatchNorm3d(8), nn.PReLU(), nn.AvgPool3d(2),
            nn.Upsample(scale_factor=2), nn.InstanceNorm3d(8), nn.ReplicationPad3d(1),
            nn.Conv3d(8, 2, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Scored(nn.Module):
    """Its loss is part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        lost = F.mse_loss(y, x) + F.smooth_l1_loss(y, x) + F.huber_loss(y, x)
        lost = lost + F.kl_div(y.log_softmax(-1), x.softmax(-1), reduction="sum")
        return lost + F.cosine_similarity(y, x, -1).mean() + F.cross_entropy(y, x.argmax(-1))


class Within(nn.Module):
    """Autocast is the model's own, and off where numbers are large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            y = self.first(x).softmax(-1)
            with torch.autocast("cuda", enabled=False):
                y = y.float() @ y.float().mT
            return self.last(y @ self.first(x))


MODELS: dict[str, tuple[Made, tuple[int, ...], str | None]] = {
    "U-Net": (lambda: UNet(4, 4, width=8), (2, 4, 64, 64), "bf16"),
    "ViT": (lambda: ViT((64, 64), 8, 4, 4, width=64), (2, 4, 64, 64), "bf16"),
    "DiT": (lambda: DiT(64, 2), (2, 4, 32, 32), "bf16"),
    "Fourier": (Fourier, (2, 4, 64, 64), "bf16"),
    "attention by hand": (Written, (2, 128, 64), "bf16"),
    "points": (Points, (2, 256, 8), "bf16"),
    "resized": (Resized, (2, 4, 64, 64), "bf16"),
    "volume": (Volume, (2, 2, 16, 16, 16), "bf16"),
    "losses": (Scored, (512, 16), "bf16"),
    "its own autocast": (Within, (512, 16), None),
}


class Results(TorchDispatchMode):
    """Counts shapes and dtypes of what ops give, but for views, and the bytes held at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[Any]()
        self.known: dict[int, Any] = {}
        self.held = self.peak = 0

    def hold(self, x: Tensor) -> None:
        memory = x.untyped_storage()
        at, nbytes = memory._cdata, memory.nbytes()
        if at not in self.known:
            self.known[at] = weakref.ref(memory, lambda _: self.release(at, nbytes))
            self.held += nbytes
            self.peak = max(self.peak, self.held)

    def release(self, at: int, nbytes: int) -> None:
        self.held -= nbytes
        del self.known[at]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for y in tree_leaves(out):
            if isinstance(y, Tensor):
                self.hold(y)
        if not func.is_view and "empty" not in func.name():
            self.found.update(
                (tuple(y.shape), y.dtype)
                for y in tree_leaves(out)
                if isinstance(y, Tensor) and y.dtype.is_floating_point and y.numel()
            )
        return out


@contextmanager
def cast(device: str, precision: str | None) -> Iterator[None]:
    with torch.autocast(device, torch.bfloat16, enabled=precision is not None):
        yield


def step(model: nn.Module, x: Tensor, device: str, precision: str | None) -> None:
    with cast(device, precision):
        y = model(x)
    y.float().square().mean().backward()


def planned(make: Made, shape: tuple[int, ...], precision: str | None) -> Counter[Any]:
    with probe.fake_mode(), as_on_gpus():
        model, x = make(), torch.randn(shape)
        with Results() as results:
            step(model, x, "cpu", precision)
    return results.found


def ran(make: Made, shape: tuple[int, ...], precision: str | None) -> tuple[Counter[Any], int]:
    """What ops give on a GPU, and the bytes that a step with AdamW holds at its peak."""
    model, x = make().cuda(), torch.randn(shape, device="cuda")
    with Results() as results:
        step(model, x, "cuda", precision)
    found = results.found
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    optimizer.zero_grad()
    states = (v for s in optimizer.state.values() for v in s.values())
    with Results() as results:
        for y in (*model.parameters(), *model.buffers(), x, *states):
            if y.is_cuda:
                results.hold(y)
        step(model, x, "cuda", precision)
        optimizer.step()
    return found, results.peak


def main() -> None:
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    print(f"{'model':20} results alike      peak over plan's")
    for name, (make, shape, precision) in MODELS.items():
        dims = tuple(range(2, len(shape))) or (0,)
        said = planned(make, shape, precision)
        layout = Layout(1, dims, (1,) * len(dims), Options(precision=precision))
        e = estimate(Task(make, [shape], dims=dims), layout, H100)
        found, peak = ran(make, shape, precision)
        alike = (found & said).total()
        print(f"{name:20} {alike:4} of {found.total():4} ({said.total():4})   {peak / e.peak:.3f}")
        if "-v" in sys.argv:
            print("   only run:", dict(found - said))
            print("   only planned:", dict(said - found), e.refused)


if __name__ == "__main__":
    main()
