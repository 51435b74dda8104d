"""The drawings of the documentation: python docs/drawings/draw.py writes them beside this file."""

import sys
import tomllib
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent / "examples"))
COLORS = ["#3b6ea8", "#d98032", "#4f9a5f", "#a8516e"]
FAINT = ["#c9d8ea", "#f6dcc2", "#cde5d2", "#e8cdd7"]
plt.rcParams.update({"font.size": 10, "font.family": "DejaVu Sans", "savefig.bbox": "tight"})


def arrow(ax: Axes, a: tuple[float, float], b: tuple[float, float], color: str, **kw) -> None:
    style = dict(arrowstyle="-|>", mutation_scale=11, lw=1.4, color=color, shrinkA=0, shrinkB=0)
    ax.add_patch(FancyArrowPatch(a, b, **style | kw))


def sample() -> None:
    """A field on 2 x 2 ranks, each with the halo that a convolution fetches."""
    from navier_stokes import sample_vorticity, simulate

    start = 6 * sample_vorticity(1, (256, 256), generator=torch.Generator().manual_seed(3))
    field = simulate(start, [2.0], viscosity=2e-5)[0, -1, ::2, ::2][:96].float()
    h, w, gap, halo = 48, 64, 22, 7
    fig, (whole, parts) = plt.subplots(1, 2, figsize=(10, 3.7), width_ratios=[1, 1.28])
    limit = field.abs().quantile(0.995).item()
    show = dict(cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="bilinear")
    whole.imshow(field, **show)
    whole.set_title("one sample: x.shape = (1, 1, 96, 128)")
    for r in range(4):
        i, j = divmod(r, 2)
        rows = slice(max(0, i * h - halo), min(96, (i + 1) * h + halo))
        columns = slice(max(0, j * w - halo), min(128, (j + 1) * w + halo))
        top, left = i * (h + gap), j * (w + gap)
        y = top - (i * h - rows.start)
        x = left - (j * w - columns.start)
        part = field[rows, columns]
        box = (x, x + part.shape[1], y + part.shape[0], y)
        parts.imshow(part, extent=box, alpha=0.45, **show)
        own = field[i * h : (i + 1) * h, j * w : (j + 1) * w]
        parts.imshow(own, extent=(left, left + w, top + h, top), **show)
        parts.add_patch(Rectangle((left, top), w, h, fill=False, ec=COLORS[r], lw=2.5))
        corner = (left + w / 2, top - 3 if i == 0 else top + h + 3)
        parts.text(*corner, f"rank {r}: (1, 1, 48, 64)", ha="center", color=COLORS[r],
                   va="bottom" if i == 0 else "top")  # fmt: skip
    parts.text(w + gap / 2, h + gap / 2, "pale: halo", ha="center", va="center", fontsize=8.5)
    parts.set_xlim(-2, 2 * w + gap + 2)
    parts.set_ylim(2 * h + gap + 14, -14)
    for ax in (whole, parts):
        ax.axis("off")
    fig.savefig(HERE / "sample.png", dpi=130)


def window() -> None:
    """Who sends what for a convolution of 5 rows over uneven shards, and what comes back."""
    sizes, reach = [5, 4, 1, 4], 2
    starts = [sum(sizes[:r]) for r in range(4)]
    n = sum(sizes)
    owner = [r for r, s in enumerate(sizes) for _ in range(s)]
    fig, ax = plt.subplots(figsize=(9, 4.4))
    for i, r in enumerate(owner):
        ax.add_patch(Rectangle((i, 0), 1, 0.8, fc=COLORS[r], ec="white"))
        ax.text(i + 0.5, 0.4, str(i), ha="center", va="center", color="white")
    ax.text(-0.4, 0.4, "the dim:\nuneven shards", ha="right", va="center")
    for r, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        y = -1.2 * (r + 1)
        a, b = max(0, start - reach), min(n, start + size + reach)
        for i in range(a, b):
            own = owner[i] == r
            ax.add_patch(
                Rectangle((i, y), 1, 0.8, fc=COLORS[r] if own else FAINT[owner[i]], ec="white")
            )
            ax.text(i + 0.5, y + 0.4, str(i), ha="center", va="center",
                    color="white" if own else COLORS[owner[i]])  # fmt: skip
        ax.text(-0.4, y + 0.4, f"rank {r} asks for [{a}, {b})", ha="right", va="center",
                color=COLORS[r])  # fmt: skip
    ax.text(n / 2, -5.5, "pale: rows of another rank, in its colour. Rank 1's window reaches past\n"
            "rank 2, which has one row, to rank 3. Forward: rows go to who asks.\n"
            "Backward: the gradients of those rows go back to their owner, and are added.",
            ha="center", va="top")  # fmt: skip
    ax.set_xlim(-4.2, n + 0.2)
    ax.set_ylim(-7.2, 1)
    ax.axis("off")
    fig.savefig(HERE / "window.svg")


def cotangents() -> None:
    """A weight meets shards: the value is used whole on each rank, gradients are added."""
    fig, ax = plt.subplots(figsize=(9, 3.9))

    def box(x: float, y: float, text: str, fc: str, ec: str, w: float = 1.9) -> None:
        ax.add_patch(Rectangle((x, y), w, 0.7, fc=fc, ec=ec, lw=1.4))
        ax.text(x + w / 2, y + 0.35, text, ha="center", va="center")

    for r in range(2):
        y = 1.6 * (1 - r)
        ax.text(-0.3, y + 0.35, f"rank {r}", ha="right", va="center", color=COLORS[r])
        box(0, y, "w  (whole)", "white", "#444444")
        box(3.0, y, "vary", "#eeeeee", "#888888", 1.2)
        box(5.3, y, f"x{'₀₁'[r]} · w", FAINT[r], COLORS[r])
        box(8.3, y, f"y{'₀₁'[r]}: a shard", FAINT[r], COLORS[r])
        for a, b in ((1.9, 3.0), (4.2, 5.3), (7.2, 8.3)):
            arrow(ax, (a, y + 0.5), (b, y + 0.5), COLORS[r])
            arrow(ax, (b, y + 0.15), (a, y + 0.15), COLORS[r], linestyle=(0, (3, 2)))
        ax.text(6.25, y - 0.27, f"dw{'₀₁'[r]}: of its rows", ha="center", fontsize=8.5)
    arrow(ax, (3.6, 1.6), (3.6, 0.7), "#444444", arrowstyle="<|-|>")
    ax.text(3.75, 1.15, "backward:\nall-reduce", va="center", fontsize=8.5)
    ax.text(0.95, -0.27, "w.grad = dw₀ + dw₁ on both", ha="center", fontsize=8.5)
    ax.text(0.95, 1.33, "w.grad = dw₀ + dw₁ on both", ha="center", fontsize=8.5)
    ax.text(4.6, 2.62, "solid: values, nothing is sent; dashed: gradients", ha="center")
    ax.set_xlim(-1.2, 10.4)
    ax.set_ylim(-0.5, 2.9)
    ax.axis("off")
    fig.savefig(HERE / "cotangents.svg")


# what a package is, in a few words
PACKAGES = {
    "accelerate": "an Accelerator\nfor shared samples",
    "cli": "plan, check, doctor\nin a shell",
    "compat": "names of\nother libraries",
    "lightning": "a strategy for\nits Trainer",
    "transformers": "its Trainer, with\nranks that share samples",
    "io": "samples: each rank reads\nwhat it holds",
    "paged": "in parts on one device,\nmemory in files",
    "plan": "before a run: what it takes,\nwhether it is right",
    "ops": "graphs, points, spheres,\nspectra, sparse grids",
    "train": "weights in sync, gradients\nsummed, FSDP2",
    "compile": "local programs for\ntorch.compile",
    "ranks": "simulated, rehearsed,\nheld to one device",
    "rules": "what an op does on shards: labels, sliding, rows",
    "checkpoint": "n ranks to m",
    "dispatch": "function to handler,\nthe fallback",
    "observe": "trace, guard,\nwho waits for whom",
    "attention": "kernels over keys\nof several ranks",
    "tensor": "ShardTensor: the global view",
    "comm": "collectives, each with its adjoint",
    "settings": "of contexts",
    "_torch": "private APIs\nof torch",
    "registry": "rules by key",
    "shares": "sizes for\nspeeds",
    "spec": "where each\nelement lives",
    "errors": "what is\nraised",
    "caller": "the user's\nline",
    "cache": "what pure\nfunctions gave",
    "containers": "batches\nof any make",
    "locks": "of files",
    "cuts": "sizes of shards",
    "later": "modules imported\nwhen used",
    "page": "of a result",
    "picture": "of a cut",
}
# the way of `F.conv2d(x, w)`, from package to package
CALL = [
    ("tensor", "1  __torch_function__"),
    ("registry", "2  its handler"),
    ("rules", "3  the rule: which rows are read"),
    ("comm", "4  fetch the halo"),
]


def architecture() -> None:
    """The packages by layers, as pyproject.toml has them, and the way of one call."""
    text = (HERE.parent.parent / "pyproject.toml").read_text()
    contracts = tomllib.loads(text)["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c["containers"] == ["shardtensor"])
    fig, ax = plt.subplots(figsize=(9, 0.7 * len(layers) + 0.5))
    on_the_way = dict(CALL)
    for row, layer in enumerate(reversed(layers)):
        names = layer.split(" | ")
        w = 9 / len(names)
        for i, name in enumerate(names):
            hot = bool(on_the_way.get(name))
            box = Rectangle((i * w + 0.05, row), w - 0.1, 0.86, ec=COLORS[hot], lw=1.2 + hot,
                            fc=FAINT[hot])  # fmt: skip
            ax.add_patch(box)
            middle = i * w + w / 2
            ax.text(middle, row + 0.68, name, ha="center", va="center", weight="bold")
            ax.text(middle, row + (0.4 if hot else 0.3), PACKAGES[name], ha="center", va="center",
                    fontsize=7.5, linespacing=0.95)  # fmt: skip
            if hot:
                ax.text(middle, row + 0.14, on_the_way[name], ha="center", va="center",
                        fontsize=7.5, color="#a04a00")  # fmt: skip
    ax.text(4.5, -0.25, "A package imports only those below it. Orange: the way of F.conv2d(x, w); "
            "5: the stock kernel on local tensors.", ha="center", va="top", fontsize=9)  # fmt: skip
    ax.set_xlim(-0.05, 9.05)
    ax.set_ylim(-0.6, len(layers))
    ax.axis("off")
    fig.savefig(HERE / "architecture.svg")


if __name__ == "__main__":
    torch.manual_seed(0)
    for draw in (sample, window, cotangents, architecture):
        draw()
