"""What published models take at their resolution and at four times it: docs/what_it_takes.md.

    python benchmarks/what_it_takes.py [NAME ...] [--again] [--limit 200] [--rows FILE]
    python benchmarks/what_it_takes.py --docs docs/what_it_takes.md

Needs the extra `zoo`. Nothing is run: each model, built by its own package at a width and
depth near the published ones, is planned (`st.plan`) for a training step of one sample under bf16 autocast with AdamW,
on one H100 of 80 GB, and then, one spatial dim cut, on the fewest GPUs that hold it. Resumable:
a search goes on after its last row.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from apart import apart
from tables import add, commits, lines, short, sources
from torch import Tensor, nn
from zoo_models import Picked, declare_torchvision_ops, new

import shardtensor as st

Row = dict[str, Any]
ROWS = Path(__file__).with_name("takes_rows.jsonl")
PN, MONAI = "physicsnemo.models.", "monai.networks.nets."
Shape = tuple[int, ...]
# GPUs tried at most
MOST = 256


class Model:
    """A published model. build: of an input's shape; at: (label, shape) as published, then larger;
    dim: of the input, cut; why: in words, no number of GPUs tried holds it; precision: of autocast."""

    def __init__(
        self,
        name: str,
        build: Callable[[Shape], nn.Module],
        at: Sequence[tuple[str, Shape]],
        dim: int = 2,
        why: str = "",
        precision: str | None = "bf16",
    ) -> None:
        self.name, self.build, self.at, self.dim, self.why = name, build, at, dim, why
        self.precision = precision


def _joined(model: nn.Module, x: Tensor) -> Any:
    return list(model(x))


def _twice(model: nn.Module, x: Tensor) -> Tensor:
    return model(x, x)


def _weather() -> Iterator[Model]:
    def at(channels: int, rows: int = 720) -> list[tuple[str, Shape]]:
        fine = 4 * (rows - rows % 2) + rows % 2
        return [
            ("0.25 degrees", (1, channels, rows, 1440)),
            ("0.0625 degrees", (1, channels, fine, 5760)),
        ]

    yield Model("FourCastNet (AFNO, physicsnemo)", lambda s: new(PN + "afno.AFNO",
        inp_shape=[*s[2:]], in_channels=20, out_channels=20, patch_size=[8, 8], embed_dim=768,
        depth=12, num_blocks=16), at(20))  # fmt: skip
    yield Model("Pangu-Weather (physicsnemo)", lambda s: Picked(new(PN + "pangu.Pangu", s[2:],
        (2, 4, 4), 192, (6, 12, 12, 6), (2, 6, 12)), _joined), at(72, 721))  # fmt: skip
    yield Model("FengWu (physicsnemo)", lambda s: Picked(new(PN + "fengwu.Fengwu", s[2:], 37, 192,
        (4, 4), (6, 12, 12, 6), (2, 6, 12)), _joined), at(189, 721))  # fmt: skip


def _volumes() -> Iterator[Model]:
    def at(channels: int, side: int = 128) -> list[tuple[str, Shape]]:
        return [(f"{n}^3", (1, channels, n, n, n)) for n in (side, 512)]

    yield Model(
        "SwinUNETR (MONAI)", lambda s: new(MONAI + "SwinUNETR", 4, 3, feature_size=48), at(4)
    )
    yield Model("SegResNet (MONAI)", lambda s: new(MONAI + "SegResNet", 3, 32, 4, 3), at(4))
    yield Model("VNet (MONAI)", lambda s: new(MONAI + "VNet", 3, 1, 2, dropout_prob_down=0.0,
        dropout_prob_up=(0.0, 0.0)), at(1))  # fmt: skip
    yield Model("UNet, residual (MONAI)", lambda s: new(MONAI + "UNet", 3, 1, 2,
        (32, 64, 128, 256, 512), (2, 2, 2, 2), num_res_units=2), at(1))  # fmt: skip
    yield Model("UNETR (MONAI)", lambda s: new(MONAI + "UNETR", 4, 3, s[2:], feature_size=16,
        hidden_size=768, mlp_dim=3072, num_heads=12), at(4))  # fmt: skip
    # it transforms what autocast gives it
    yield Model("FNO3d, fp32 (neuraloperator)", lambda s: new("neuralop.models.FNO",
        n_modes=(16, 16, 16), hidden_channels=64, in_channels=4, out_channels=4, n_layers=4),
        at(4), precision=None)  # fmt: skip


def _points() -> Iterator[Model]:
    at = [("10^7 points", (1, 10**7, 3)), ("10^8 points", (1, 10**8, 3))]
    wide = {"functional_dim": 3, "out_dim": 4, "n_layers": 8, "n_hidden": 256, "n_head": 8,
            "slice_num": 64, "use_te": False}  # fmt: skip
    yield Model("Transolver (physicsnemo)", lambda s: Picked(new(PN + "transolver.Transolver", **wide,
        embedding_dim=3, unified_pos=False, structured_shape=None), _twice), at, 1)  # fmt: skip
    yield Model("FLARE (physicsnemo)", lambda s: Picked(new(PN + "flare.FLARE", **wide,
        embedding_dim=3), _twice), at, 1)  # fmt: skip


def _images() -> Iterator[Model]:
    def at(*sides: Sequence[int]) -> list[tuple[str, Shape]]:
        return [(f"{h} x {w}", (1, 3, h, w)) for h, w in sides]

    city, square = ((1024, 2048), (2048, 4096)), ((512, 512), (4096, 4096))
    # the batch norm of its pooled branch trains on no single sample
    pairs = [(f"two of {label}", (2, *shape[1:])) for label, shape in at(*city)]
    yield Model("SegFormer-B5 (transformers)", lambda s: Picked(_hf("SegformerForSemanticSegmentation",
        "Segformer", hidden_sizes=[64, 128, 320, 512], depths=[3, 6, 40, 3],
        decoder_hidden_size=768), lambda m, x: m(x).logits), at(*city))  # fmt: skip
    yield Model("DeepLabV3, ResNet-101 (torchvision)", lambda s: Picked(
        new("torchvision.models.segmentation.deeplabv3_resnet101", weights=None,
            weights_backbone=None), lambda m, x: m(x)["out"]), pairs)  # fmt: skip
    yield Model("UNet, ResNet-34 (segmentation_models_pytorch)", lambda s: new(
        "segmentation_models_pytorch.Unet", "resnet34", encoder_weights=None), at(*square))  # fmt: skip
    yield Model("ConvNeXt-L (torchvision)", lambda s: new("torchvision.models.convnext_large"),
        at((224, 224), (4096, 4096)))  # fmt: skip
    yield Model("ViT-L/16 (timm)", lambda s: new("timm.create_model", "vit_large_patch16_224",
        img_size=s[2]), at((224, 224), (4096, 4096)))  # fmt: skip
    yield Model("SwinV2-B (timm)", lambda s: new("timm.create_model", "swinv2_cr_base_224",
        img_size=s[2]), at((224, 224), (3584, 3584)), why="its windows grow with the image, here to "
        "112 x 112 tokens, and each block's MLP over the 157 million pairs of these is computed "
        "whole on every rank")  # fmt: skip
    yield Model("SwinV2-B, windows of 7 x 7 (timm)", lambda s: new("timm.create_model",
        "swinv2_cr_base_224", img_size=s[2], window_size=7), at((3584, 3584)))  # fmt: skip
    yield Model("VAE of Stable Diffusion (diffusers)", lambda s: Picked(new("diffusers.AutoencoderKL",
        block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4),
        lambda m, x: m(x).sample), at((512, 512), (2048, 2048)))  # fmt: skip
    yield Model("Swin2SR (transformers)", lambda s: Picked(_hf("Swin2SRForImageSuperResolution",
        "Swin2SR", image_size=64, embed_dim=180, depths=[6] * 6, num_heads=[6] * 6, window_size=8,
        upscale=2), lambda m, x: m(x).reconstruction), at((256, 256), (1024, 1024)))  # fmt: skip


def _hf(name: str, config: str, **settings: Any) -> nn.Module:
    return new(f"transformers.{name}", new(f"transformers.{config}Config", **settings))


MODELS = [*_weather(), *_points(), *_volumes(), *_images()]


HEAD = """# What it takes

Published models, each built unmodified by its own package, at its usual resolution and at a larger
one, with the widths and depths that the script gives (near those published, not held to the papers): a training step of one sample (of two where it
says so, as batch norm cannot train on one) with AdamW under bf16 autocast (in fp32 where it
says so, as GPUs do not transform bf16), planned by `st.plan` for H100s of 80 GB, eight to a node. **Planned only: nothing here was
run**, and what kernels allocate inside themselves is not counted ([Before the run](plan.md) says
what a plan is worth). Made by `benchmarks/what_it_takes.py`.

- **one GPU**: the least peak without shardtensor, with checkpointing of blocks where the model has
  a list of them. Data parallelism and FSDP cut samples and weights, not the activations of one
  sample: where one GPU does not hold these, no number of GPUs does by these two alone. Tensor and
  pipeline parallelism were not planned.
- **GPUs**: the fewest (a power of two) that hold the step when one spatial dim is cut, how, and
  what a rank then holds and sends in a step. Buffers are whole on every rank: of Pangu-Weather at
  0.0625 degrees the masks of shifted windows, 16.9 GB (`st.shard_buffers` would cut them).

| model | input | one GPU, GB | GPUs | layout | peak, GB | sent a step, GB |
|---|---|---|---|---|---|---|"""


def planned(model: Model, shape: Shape, devices: int) -> Row:
    """The best configuration on so many GPUs: its layout, peak, bytes sent, or why there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = st.plan(partial(model.build, shape), [shape], devices, dims=(model.dim,),
                        precisions=(model.precision,))  # fmt: skip
    if not found:
        return {"result": f"dim {model.dim} has fewer than {devices} rows"}
    best = found[0]
    if best.refused:
        return {"result": f"refused: {best.refused}"[:400]}
    fits = best.fits(found.device)
    return {
        "result": "fits" if fits else "does not fit", "layout": str(best.layout), "peak": best.peak,
        "weights": best.memory["parameters"], "bytes": sum(s.bytes for s in best.sent),
        "gathers": list(best.gathered),
    }  # fmt: skip


def fewest(
    model: Model, label: str, shape: Shape, limit: float, last: Row | None = None
) -> Iterator[Row]:
    """A row for one GPU, then for more until it fits. last: the row after which to go on."""
    devices = following(last)
    while 0 < devices <= MOST:
        row = {"model": model.name, "at": label, "shape": shape, "devices": devices,
               "version": sources()}  # fmt: skip
        row |= apart(partial(planned, model, shape, devices), limit)
        row["result"] = short(row["result"], 400)
        yield row
        devices = following(row)


def following(last: Row | None) -> int:
    """The number of GPUs to try after a row; 0 after one that ends the search."""
    if last is None:
        return 1
    if last["result"] != "does not fit":
        return 0
    # no fewer can hold it
    least = last["peak"] * last["devices"] / 80e9
    return int(max(2 * last["devices"], 2 ** math.ceil(math.log2(0.8 * least))))


def page(rows: Sequence[Row]) -> str:
    """A line for each model and resolution."""
    told, whys = [HEAD], {m.name: m.why for m in MODELS}
    for (name, label), one in _grouped(rows).items():
        first, last = one[0], one[-1]
        alone = f"{first['peak'] / 1e9:,.1f}" if "peak" in first else "-"
        alone += "" if first["result"] == "fits" or "peak" not in first else ": does not fit"
        cells = [name, label, alone]
        if last["result"] == "fits":
            layout = last["layout"].replace(", bf16", "")
            sent = f"{last['bytes'] / 1e9:,.2f}" if last["devices"] > 1 else "0"
            cells += [str(last["devices"]), layout, f"{last['peak'] / 1e9:,.1f}", sent]
        else:
            why = short(last["result"], 160)
            why += f": {whys[name]}" if whys[name] and why == "does not fit" else ""
            cells += [f"not on {last['devices']}: {why}", "", "", ""]
        told.append("| " + " | ".join(cells) + " |")
    gathers = {r["model"]: r["gathers"] for r in rows if r.get("gathers")}
    told += ["", *(f"{k} gathers: {', '.join(v)}.\n" for k, v in gathers.items())]
    last = [one[-1] for one in _grouped(rows).values()]
    told += [f"Rows by the commit whose sources ran: {commits(last)}."]
    return "\n".join(told).rstrip() + "\n"


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for m in MODELS:
        for label, _ in m.at:
            one = [r for r in rows if (r["model"], r["at"]) == (m.name, label)]
            if one:
                found[m.name, label] = one
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--limit", type=float, default=200.0, help="seconds for one plan")
    parser.add_argument("--again", action="store_true", help="what has rows, too")
    parser.add_argument("--docs", type=Path, help="write the table of --rows to this file")
    options = parser.parse_args()
    rows = lines(options.rows)
    if options.docs:
        options.docs.write_text(page(rows))
        return
    declare_torchvision_ops()
    asked = [m for m in MODELS if m.name.startswith(tuple(options.names) or "")]
    if options.again and rows:
        options.rows.unlink()
        rows = [r for r in rows if r["model"] not in {m.name for m in asked}]
        for row in rows:
            add(options.rows, row)
    done = {(r["model"], r["at"]): r for r in rows}
    for model in asked:
        for label, shape in model.at:
            for row in fewest(model, label, shape, options.limit, done.get((model.name, label))):
                add(options.rows, row)
                told = f"{row['result'][:200]} {row.get('peak', 0) / 1e9:.1f} GB"
                print(f"{model.name:44} {label:16} {row['devices']:4} {told}", flush=True)


if __name__ == "__main__":
    main()
