"""F.interpolate: sizes and scales, up and down, in every mode."""

from functools import partial

import torch
import torch.nn.functional as F

from .table import cases, normal

WAYS = [
    dict(scale_factor=2), dict(scale_factor=2, mode="bilinear"), dict(size=(18, 12), mode="bicubic"),
    dict(size=(27, 6), mode="bilinear"), dict(scale_factor=(3, 2), mode="nearest-exact"),
    dict(size=(13, 7)), dict(size=(13, 7), mode="nearest-exact"), dict(scale_factor=0.6),
    dict(size=(14, 11), mode="bilinear"), dict(size=(5, 4), mode="bilinear"),
    dict(size=(17, 12), mode="bilinear", align_corners=True), dict(size=(1, 3), mode="bilinear"),
    dict(scale_factor=1.7, mode="bilinear"), dict(scale_factor=(1.7, 0.5), mode="bicubic"),
    dict(scale_factor=1.7, mode="bilinear", recompute_scale_factor=True),
    dict(size=(12, 9), mode="bicubic", align_corners=True), dict(size=(3, 3), mode="area"),
    dict(size=(4, 5), mode="area"), dict(size=(4, 3), mode="bilinear", antialias=True),
    dict(size=(14, 4), mode="bicubic", antialias=True), dict(size=(9, 6), mode="bilinear"),
    dict(size=(3, 2), mode="bilinear"), dict(size=(3, 3), mode="bicubic", antialias=True),
    dict(scale_factor=(2, 1 / 3), mode="bicubic", antialias=True), dict(size=(18, 3), mode="bicubic"),
    dict(size=(3, 2), mode="bilinear", antialias=True), dict(size=(9, 2), mode="bicubic", antialias=True),
    dict(size=(3, 3), mode="nearest-exact"),
]  # fmt: skip

LINES = [dict(size=7), dict(size=23, mode="linear"), dict(scale_factor=2, mode="linear")]
VOLUMES = [
    dict(scale_factor=2),
    dict(size=(7, 3, 6), mode="trilinear"),
    dict(size=(10, 8, 12), mode="trilinear"),
    dict(size=(2, 2, 3), mode="area"),
]
SINGLE = [dict(size=(77, 5), mode="bilinear"), dict(scale_factor=1.3, mode="bicubic")]
MODES = ["nearest", "nearest-exact", "bilinear", "bicubic", "area"]


def each(ways):
    return {" ".join(map(str, w.values())): partial(F.interpolate, **w) for w in ways}


def by_whole_numbers(mode, antialias):
    """Down by 2, 3 and 4 as well as up."""
    return lambda x: [
        F.interpolate(x, (m, m), mode=mode, antialias=antialias) for m in (6, 4, 3, 24, 36, 48)
    ]


whole = {m: by_whole_numbers(m, False) for m in MODES}
whole |= {f"{m} antialiased": by_whole_numbers(m, True) for m in ("bilinear", "bicubic")}
cases("interpolate", each(WAYS), normal(2, 3, 9, 6), dims=[(2, 3, 0, 1)])
corners = [dict(size=(m, 3), antialias=True, align_corners=True) for m in (1, 5, 23)]
cases("interpolate corners antialiased", each([dict(w, mode="bilinear") for w in corners] + [
    dict(size=(5, 3), mode="bicubic", antialias=True, align_corners=True)]),
    normal(1, 2, 20, 3), dims=[2])  # fmt: skip
cases("interpolate lines", each(LINES), normal(2, 3, 11), dims=[2])
cases("interpolate volumes", each(VOLUMES), normal(1, 2, 5, 4, 6), dims=[(2, 4)])
cases("interpolate in fp32", each(SINGLE), normal(1, 2, 31, 4, dtype=torch.float32), dims=[2])
cases("interpolate by whole numbers", whole, normal(1, 2, 12, 12), dims=[(2, 3)])
