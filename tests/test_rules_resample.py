"""F.interpolate over sharded dims against plain torch."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64
x = torch.randn(2, 3, 9, 6, dtype=D)
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
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_two_spatial_dims(way):
    for cut in T.cuts(9):
        T.hold(F.interpolate, [x], [T.shard(2, cut)], (len(cut),), kwargs=way, rtol=1e-11)
    for d in (0, 1, 3):
        T.hold(F.interpolate, [x], [T.shard(d)], (2,), kwargs=way, rtol=1e-11)
    for on in ([Shard(2), Shard(3)], [Shard(3), Shard(2)], [Shard(2), Shard(2)]):
        T.hold(F.interpolate, [x], [T.On(on)], (2, 2), kwargs=way, rtol=1e-11)


def test_other_dims():
    y, z = torch.randn(2, 3, 11, dtype=D), torch.randn(1, 2, 5, 4, 6, dtype=D)
    for way in (dict(size=7), dict(size=23, mode="linear"), dict(scale_factor=2, mode="linear")):
        T.hold(F.interpolate, [y], [T.shard(2, (4, 0, 7))], (3,), kwargs=way)
    for way in (dict(scale_factor=2), dict(size=(7, 3, 6), mode="trilinear"),
                dict(size=(10, 8, 12), mode="trilinear"), dict(size=(2, 2, 3), mode="area")):  # fmt: skip
        for d in (2, 4):
            T.hold(F.interpolate, [z], [T.shard(d)], (2,), kwargs=way)


def test_nearest_takes_torchs_rows():
    for n in (5, 7, 13, 100, 501):
        for m in (3, 8, 99, 128, 333, 1001):
            y = torch.arange(float(n))[None, None]
            for mode in ("nearest", "nearest-exact"):
                T.hold(
                    F.interpolate,
                    [y],
                    [T.shard(2)],
                    (3,),
                    kwargs=dict(size=m, mode=mode),
                    grad=False,
                )


def test_fp32():
    y = torch.randn(1, 2, 301, 4)
    for way in (dict(size=(777, 5), mode="bilinear"), dict(scale_factor=1.3, mode="bicubic")):
        T.hold(F.interpolate, [y], [T.shard(2)], (3,), kwargs=way)


def sent(way):
    s = st.distribute_tensor(torch.randn(1, 3, 16, 8), T.make_mesh((2,)), [Shard(2)])
    with st.trace() as t:
        F.interpolate(s, **way)
    return t.bytes


def test_what_is_sent():
    row = 3 * 8 * 4
    assert st.simulate(2, sent, dict(scale_factor=2)) == [0, 0]
    assert st.simulate(2, sent, dict(scale_factor=2, mode="bilinear")) == [row, row]
    assert max(st.simulate(2, sent, dict(size=(25, 9), mode="bilinear"))) <= 2 * row
