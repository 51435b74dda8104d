"""docs/page_*.png, of the pages in a browser: python docs/drawings/pages.py"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh, run_workers

DOCS = Path(__file__).parent.parent
sys.path += [str(DOCS.parent / "examples"), str(DOCS.parent / "tests")]


def unet() -> nn.Module:
    """Some gigabytes of activations at 8192 x 8192."""
    from models import UNet

    return UNet(4, 4, width=64, depth=3)


def step(path: str) -> None:
    """A training step on three uneven shards."""
    torch.manual_seed(0)
    mesh = make_mesh((3,))
    model = st.parallelize(unet(), mesh)
    x = torch.randn(1, 4, 128, 64)
    x = st.distribute_tensor(x, mesh, [Shard(2)], sizes={2: [64, 40, 24]})
    model(x).square().mean().backward()
    with st.trace() as t:
        model(x).square().mean().backward()
    timeline = t.gather()
    if dist.get_rank() == 0:
        timeline.html(path)


class Centred(nn.Module):
    """Subtracts the mean, but of the rows of its own rank."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(x, st.ShardTensor):
            local = x.to_local() - x.to_local().mean(2, keepdim=True)
            return st.ShardTensor.from_local(local, x.device_mesh, x.placements, sizes=x.spec.sizes)
        return x - x.mean(2, keepdim=True)


def check(path: Path) -> None:
    """A U-Net, one block of which is wrong."""
    from models import UNet

    torch.manual_seed(0)
    model = UNet(1, 1, width=4, depth=2)
    model.encode[0] = nn.Sequential(model.encode[0], Centred())
    st.check(model, torch.randn(1, 1, 32, 16), [Shard(2)], at=(1, 1, 4096, 4096)).html(path)


def draw(folder: Path) -> None:
    """Each page's file, then its picture."""
    from browser import Browser

    unet.__name__ = "UNet"
    st.plan(unet, [(1, 4, 8192, 8192)], 4).html(folder / "plan.html")
    check(folder / "check.html")
    run_workers(3, step, str(folder / "trace.html"))
    heads = "[...document.querySelectorAll('h2')]"
    with Browser(1100) as b:
        for name, first, last in (
            ("plan", None, "Messages by op"),
            ("plan", "More devices, larger inputs", None),
            ("trace", None, "Messages"),
            ("check", None, "Errors by module"),
        ):
            file = folder / f"{name}.html"
            # paths as in the repository
            file.write_text(file.read_text().replace(f"{DOCS.parent}/", ""))
            b.open(file)
            b.js("new Promise(done => setTimeout(done, 500))")
            top = 0 if first is None else b.js(_top(heads, first))
            end = b.js(
                "document.documentElement.scrollHeight" if last is None else _top(heads, last)
            )
            kind = "_sizes" if first else ""
            b.picture(DOCS / f"page_{name}{kind}.png", (top, end))


def _top(heads: str, title: str) -> str:
    return (
        f"{heads}.find(h => h.textContent === '{title}').getBoundingClientRect().top + scrollY - 12"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        draw(Path(made))
