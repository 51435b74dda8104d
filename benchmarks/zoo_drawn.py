"""Models of the packages that the zoo does not hold, drawn at random: entered in its table.

Of timm and torchvision, whose models are made by name: those that are small and take an image of
the zoo's size, or one of their own of at most 256 x 256.
"""

from __future__ import annotations

import importlib
import random
from functools import partial

import torch
from torch import Tensor, nn
from zoo_models import IMAGE, MODELS, Picked, declare_torchvision_ops

# parameters
MOST = 12_000_000


def _first(model: nn.Module, x: Tensor) -> Tensor:
    """The output, or the first of those in a dict or tuple."""
    y = model(x)
    if isinstance(y, dict):
        return next(iter(y.values()))
    return y[0] if isinstance(y, tuple | list) else y


def _made(package: str, name: str) -> nn.Module:
    declare_torchvision_ops()
    if package == "timm":
        return importlib.import_module("timm").create_model(name, pretrained=False)
    settings = {"weights": None}
    if name.startswith(("deeplab", "fcn", "lraspp")):
        settings["weights_backbone"] = None
    return Picked(importlib.import_module("torchvision.models").get_model(name, **settings), _first)


def _takes(model: nn.Module, shape: tuple[int, ...]) -> bool:
    try:
        with torch.no_grad():
            return isinstance(model.eval()(torch.randn(shape)), Tensor)
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError):
        return False


def _names() -> list[tuple[str, str]]:
    declare_torchvision_ops()
    timm = importlib.import_module("timm").list_models()
    vision = importlib.import_module("torchvision.models").list_models()
    held = {n.partition(".")[2] for n in MODELS}
    # large, lists of boxes, two images, or wrong on one CPU
    unwanted = ("large", "huge", "giant", "_l_", "quantized", "test_", "rcnn", "retina", "ssd",
                "fcos", "raft", "xcit", "levit", "tiny_vit")  # fmt: skip
    return [
        (p, n) for p, names in (("timm", timm), ("tv", vision)) for n in names
        if n not in held and not any(w in n for w in unwanted)
    ]  # fmt: skip


def enter(count: int, seed: int) -> list[str]:
    """Draw so many, enter them; returns their names."""
    picked, families = list[str](), set[str]()
    draw = random.Random(seed)
    names = _names()
    draw.shuffle(names)
    for package, name in names:
        family = name.split("_")[0].rstrip("0123456789")
        if len(picked) == count:
            break
        if family in families:
            continue
        torch.manual_seed(0)
        try:
            model = _made(package, name)
        except (RuntimeError, ValueError, TypeError, NotImplementedError):
            continue
        if sum(p.numel() for p in model.parameters()) > MOST:
            continue
        side = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))[1]
        shapes = [IMAGE, (1, 3, side, side)] if side <= 256 else [IMAGE]
        shape = next((s for s in shapes if _takes(model, s)), None)
        if shape is None:
            continue
        families.add(family)
        key = f"drawn.{package}.{name}"
        MODELS[key] = (partial(_made, package, name), shape, 2)
        picked.append(key)
    return picked
