"""F.interpolate over sharded dims against plain torch."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.ranks.simulate import RankError

torch.manual_seed(0)
D = torch.float64
x = torch.randn(2, 3, 9, 6, dtype=D)


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


def test_one_column_each():
    """Torch antialiases the rows of a single column wrongly; shards of one must not."""
    for size in ((4, 6), (4, 5), (18, 12)):
        way = dict(size=size, mode="bilinear", antialias=True)
        T.hold(F.interpolate, [x], [T.shard(3)], (6,), kwargs=way)


def test_scale_is_torchs():
    """A scale that only nearly is the ratio of the sizes decides the coordinates."""
    y = torch.randn(1, 2, 12, 4, dtype=D)
    for scale in (2.05, 3.01, 0.5001, 0.34, 1.1):
        for mode in ("nearest", "nearest-exact", "bilinear", "bicubic"):
            for recompute in (False, True):
                way = dict(scale_factor=scale, mode=mode, recompute_scale_factor=recompute)
                T.hold(F.interpolate, [y], [T.shard(2)], (2,), kwargs=way)
    # The kernels for 1 and 3 dims read other rows than the one for 2; no gradients, because those
    # of torch 2.13 are not the adjoint of its values here (twice as many rows, or as many)
    for z in (y[0], y, y[..., None]):
        for scale in (2.05, 1.04):
            for mode in ("nearest", "nearest-exact"):
                way = dict(scale_factor=(scale, *[1] * (z.ndim - 3)), mode=mode)
                T.hold(F.interpolate, [z], [T.shard(2)], (2,), kwargs=way, grad=False)


def test_halves_and_integers():
    for dtype in (torch.bfloat16, torch.float16):
        for way in (dict(size=(13, 7), mode="bilinear"), dict(scale_factor=2, mode="bicubic")):
            T.hold(F.interpolate, [x.to(dtype)], [T.shard(2)], (3,), kwargs=way, rtol=1e-2)
    image = torch.randint(0, 256, (2, 3, 9, 6)).to(torch.uint8)
    for way in (dict(size=(13, 7)), dict(size=(18, 12), mode="bilinear")):
        T.hold(F.interpolate, [image], [T.shard(2)], (3,), kwargs=way, grad=False)
    with pytest.raises(RankError, match="convert to float"):
        way = dict(size=(13, 7), mode="bilinear")
        T.hold(F.interpolate, [image], [T.shard(2)], (3,), kwargs=way, grad=False)


def cast(y, way):
    with torch.autocast("cpu", torch.bfloat16):
        return F.interpolate(y.bfloat16(), **way)


def test_autocast():
    for way in (dict(scale_factor=2, mode="bilinear"), dict(size=(13, 6), mode="bicubic"),
                dict(size=(13, 6)), dict(size=(4, 3), mode="area")):  # fmt: skip
        for cut in ((4, 0, 5), (3, 3, 3)):
            T.hold(cast, [x.float(), way], [T.shard(2, cut), None], (3,), rtol=1e-2)
        T.hold(cast, [x.float(), way], [T.On([Shard(2), Shard(3)]), None], (2, 2), rtol=1e-2)


@pytest.mark.parametrize("bad", [
    dict(scale_factor=2, align_corners=True), dict(size=4, scale_factor=2), dict(), dict(size=(4,)),
    dict(size=4, recompute_scale_factor=True), dict(size=(0, 4)), dict(size=4, antialias=True),
    dict(scale_factor=(2, 2, 2)), dict(size=4, mode="linear"),
], ids=str)  # fmt: skip
def test_errors(bad):
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)) as plain:
        F.interpolate(x, **bad)

    def refused():
        s = st.distribute_tensor(x, T.make_mesh((2,)), [Shard(2)])
        with pytest.raises(plain.type), st.trace() as t:
            F.interpolate(s, **bad)
        return t.messages

    assert st.simulate(2, refused) == [0, 0]


def compiled(way):
    s = st.distribute_tensor(x.float(), T.make_mesh((2,)), [Shard(2)]).requires_grad_()
    got = st.compile(lambda a: F.interpolate(a, **way), backend="aot_eager", fullgraph=True)(s)
    got.square().sum().backward()
    grad, s.grad = s.grad.full_tensor(), None
    want = F.interpolate(s, **way)
    want.square().sum().backward()
    torch.testing.assert_close(got.full_tensor(), want.full_tensor())
    torch.testing.assert_close(grad, s.grad.full_tensor())


@pytest.mark.parametrize("way", [
    dict(scale_factor=2), dict(scale_factor=2, mode="bilinear"), dict(size=(5, 4), mode="area"),
    dict(size=(13, 7), mode="bicubic"), dict(size=(13, 7), mode="nearest-exact"),
], ids=str)  # fmt: skip
def test_compiled(way):
    st.simulate(2, compiled, way)


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
    # shards end where outputs do: no halo, but for the widest kernels
    for mode in ("nearest", "bilinear", "area"):
        assert st.simulate(2, sent, dict(scale_factor=0.5, mode=mode)) == [0, 0]
    assert st.simulate(2, sent, dict(scale_factor=0.5, mode="bicubic")) == [2 * row, 2 * row]
    assert st.simulate(2, sent, dict(size=(16, 8), mode="bilinear", align_corners=True)) == [0, 0]


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (0, 0)])
def test_areas_of_nothing(size):
    x = torch.randn(1, 2, 4, 6, dtype=D)
    for d in (1, 2, 3):
        T.hold(
            F.interpolate,
            [x],
            [T.shard(d)],
            (2,),
            kwargs={"size": size, "mode": "area"},
            grad=False,
        )
