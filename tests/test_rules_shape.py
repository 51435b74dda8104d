"""Views, indexing, joining: against plain torch; slices and views send nothing."""

import einops
import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64
x = torch.randn(2, 3, 8, 6, dtype=D)
CUTS = T.cuts(8)
LAYOUTS = [
    ([Shard(2), Shard(3)], None), ([Shard(2), Shard(2)], {2: (3, 0, 4, 1)}),
    ([Shard(3), Shard(2)], {3: (5, 1), 2: (3, 5)}), ([Shard(0), Shard(2)], None),
    ([Replicate(), Shard(2)], {2: (7, 1)}), ([Shard(1), Shard(3)], None),
]  # fmt: skip

VIEWS = {
    "flatten hw": lambda a: a.flatten(2),
    "flatten chw": lambda a: a.flatten(1),
    "flatten all": lambda a: a.view(-1),
    "tokens": lambda a: a.flatten(2).transpose(1, 2),
    "and back": lambda a: a.flatten(2).transpose(1, 2).transpose(1, 2).reshape(2, 3, 8, 6),
    "other": lambda a: a.reshape(2, 3, 4, 12),
    "odd": lambda a: a.reshape(6, 16, 3),
    "merge bc": lambda a: a.view(6, 8, 6),
    "patchify": lambda a: a.reshape(2, 3, 4, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 12, 12),
    "windows": lambda a: a.permute(0, 2, 3, 1).reshape(2, 2, 4, 3, 2, 3).transpose(2, 3)
    .reshape(-1, 4, 2, 3),
    "heads": lambda a: a.unflatten(3, (2, 3)).movedim(3, 1),
    "ones": lambda a: a.unsqueeze(0).unsqueeze(3).squeeze(0).squeeze(),
    "expand": lambda a: a[:, :, None].expand(-1, -1, 2, -1, -1) * 2,
    "expand as": lambda a: a[:1, :, :1].expand_as(a) + a,
    "transposes": lambda a: (a.mT, a.permute(3, 2, 1, 0), a.swapaxes(1, 2), a[0, 0].T, a[0, 0].t()),
    "pixel shuffle": lambda a: F.pixel_unshuffle(F.pixel_shuffle(a.reshape(2, 12, 4, 3), 2), 2),
    "einops": lambda a: einops.rearrange(a, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=3),
    "einops back": lambda a: einops.rearrange(
        einops.rearrange(a, "b c h w -> b (h w) c"), "b (h w) c -> b c h w", h=8),
    "einops reduce": lambda a: einops.reduce(a, "b c (h p) w -> b c h w", "mean", p=2),
    "einops repeat": lambda a: einops.repeat(a, "b c h w -> b c (h r) w", r=2),
    "channel shuffle": lambda a: F.channel_shuffle(a.reshape(2, 6, 4, 6), 2),
}  # fmt: skip
INDEX = {
    "slices": lambda a: a[:, :, 1:-1, 2:],
    "steps": lambda a: (a[:, :, ::2], a[:, :, 1::3, ::2], a[..., 5:2]),
    "ints": lambda a: (a[1], a[:, 0, 3], a[:, :, -1, 2:], a[..., 0]),
    "none": lambda a: a[:, None, ..., None, 1],
    "differences": lambda a: a[:, :, 1:] - a[:, :, :-1],
    "diff": lambda a: a.diff(dim=2),
    "lists": lambda a: (a[:, [2, 0]], a[:, torch.tensor([0, 0, 1]), 2:4], a[[0, 1], :, :, [1, 2]]),
    "split": lambda a: (*a.split(3, 2), *a.chunk(3, 3), *a.split([1, 7], 2), *a.tensor_split(3, 2)),
    "unbind": lambda a: (*a.unbind(1), *a.unbind(2)),
    "narrow": lambda a: (a.narrow(2, 3, 4), a.select(2, 5), a.select(0, -1)),
    "index_select": lambda a: (a.index_select(1, torch.tensor([2, 2])), a.index_select(
        2, torch.tensor([7, 0, 3]))),
    "iterate": lambda a: torch.stack(list(a)),
}  # fmt: skip
JOIN = {
    "cat channels": lambda a: torch.cat([a, a * 2, torch.ones(2, 1, 8, 6, dtype=D)], 1),
    "cat rows": lambda a: torch.cat([a, a.sin()], 2),
    "cat plain": lambda a: torch.cat([torch.ones(2, 3, 2, 6, dtype=D), a, a[:, :, :1] * 0.5], 2),
    "cat slices": lambda a: torch.cat([a[:, :, 4:], a[:, :, :4]], dim=-2),
    "stack": lambda a: (torch.stack([a, a * 2], 1), torch.stack([a, x], -1)),
    "hstack": lambda a: (torch.hstack([a, a]), torch.vstack([a, a])),
    "roll": lambda a: (a.roll(3, 2), a.roll((-2, 5), (2, 3)), a.roll(7), torch.roll(a, 8, 2)),
    "flip": lambda a: (a.flip(2), a.flip([2, 3]), a.flip(0)),
    "repeat": lambda a: (a.repeat(1, 2, 2, 1), a.repeat(2, 1, 1, 1, 3), a.tile(2, 1)),
    "interleave": lambda a: (a.repeat_interleave(2, 2), a.repeat_interleave(3, 1)),
}
EVERY = {**VIEWS, **INDEX, **JOIN}


@pytest.mark.parametrize("name", EVERY)
def test_rows_over_ranks(name):
    for cut in CUTS:
        T.hold(EVERY[name], [x], [T.shard(2, cut)], (len(cut),))
    for d in (0, 1, 3):
        T.hold(EVERY[name], [x], [T.shard(d)], (2,))


@pytest.mark.parametrize("name", EVERY)
def test_two_axes(name):
    for placements, sizes in LAYOUTS:
        T.hold(EVERY[name], [x], [T.On(placements, sizes)], (2, 2))


@pytest.mark.parametrize("cut", T.cuts(7))
def test_class_token(cut):
    tokens, cls = torch.randn(2, 7, 4, dtype=D), torch.randn(1, 1, 4, dtype=D)
    pos = torch.randn(1, 8, 4, dtype=D)

    def model(t, c, p):
        y = torch.cat([c.expand(2, -1, -1), t], 1) + p
        return y, y[:, 0], y[:, 1:]

    specs = T.hold(model, [tokens, cls, pos], [T.shard(1, cut), None, None], (len(cut),))
    if len(cut) > 1:
        assert specs[0].sizes == {1: (cut[0] + 1, *cut[1:])} and not specs[1].varying


def test_zero_sized():
    empty = torch.randn(2, 0, 4, dtype=D)
    T.hold(lambda a: a.reshape(2, 0, 2, 2).flatten(1), [empty], [T.shard(2)], (2,))
    T.hold(lambda a: (a.flatten(), a.view(1, 1)[0]), [x[0, 0, 0, 0]], [T.replicated()], (2,))
    T.hold(lambda a: a[:, :, 3:3].sum(), [x], [T.shard(2)], (3,))


def assign(a, b):
    c = a * 1.0
    c[:, :, 1:5] = b[:, :, 1:5]
    c[:, 0] = 3.0
    c[:, :, -1:] += b[:, :, :1]
    c[:, :, -1] = c[:, :, -1] * 3
    c[:, 1, 2] = b[0, 0, 0]
    c[..., 2] = torch.arange(8, dtype=D)
    c[0, ..., ::2] *= 2
    c[c > 1.5] = 0.25
    v = c.view(2, 3, 48)
    v[:, :, 3:9] = 7.0
    c[:, [0, 2]] = -1.0
    w = c.transpose(2, 3)[:, :, 1:3]
    w.mul_(2)
    return c


@pytest.mark.parametrize("cut", CUTS)
def test_assignment(cut):
    y = torch.randn_like(x)
    T.hold(assign, [x, y], [T.shard(2, cut), None], (len(cut),))
    T.hold(assign, [x, y], [T.shard(2, cut), T.shard(3)], (len(cut),))


def test_assignment_on_two_axes():
    y = torch.randn_like(x)
    for placements, sizes in (LAYOUTS[1], LAYOUTS[4]):
        T.hold(assign, [x, y], [T.On(placements, sizes), None], (2, 2))


def silent():
    mesh = T.make_mesh((2,))
    s = st.distribute_tensor(x, mesh, [Shard(2)], src_data_rank=None, sizes={2: (5, 3)})
    with st.trace() as t, st.fallback("error"):
        s[:, :, 1:-2].flatten(2).transpose(1, 2).unflatten(1, (-1, 6))
        s.split(3, 2), s[:, :, ::3], s.permute(2, 0, 1, 3).view(8, 6, 6)
        s.repeat_interleave(2, 2), torch.cat([s, s], 1), s.reshape(2, 3, 8, 2, 3)
    assert t.messages == 0
    with st.trace() as t:
        s.reshape(2, 3, 2, 4, 6)
    assert t.bytes in (0, 2 * 3 * 1 * 6 * 8)
    with st.trace() as t:
        s.roll(1, 2)
    return t.bytes


def test_what_is_sent():
    # one row of 2 x 3 x 6 numbers of 8 bytes to the right neighbour
    assert st.simulate(2, silent) == [288, 288]


def test_a_write_to_a_view_of_other_ranks_makes_its_base_unreadable():
    def write():
        mesh = T.make_mesh((2,))
        for view in (lambda s: s.flatten(1), lambda s: s.view(-1)):
            s = st.distribute_tensor(x, mesh, [Shard(2)])
            v = view(s)
            v.add_(1)
            T.same(v, view(x) + 1, "the view")
            with pytest.raises(st.UnsupportedOpError, match="a view of it"):
                s.sum()
        s = st.distribute_tensor(x, mesh, [Shard(2)])
        s.flatten(2).add_(1)
        s.unbind(2)[0].add_(1)
        T.same(s, torch.cat([x[:, :, :1] + 2, x[:, :, 1:] + 1], 2), "through a local view")

    st.simulate(2, write)


def into_plain(a):
    out = torch.zeros(2, 3, 8, 6, dtype=D)
    out[:, :, 2:6] = a[:, :, 1:5]
    out[a.detach() > 1] = 0.5
    return out * a


def test_assignment_to_a_plain_tensor_shards_it():
    T.hold(into_plain, [x], [T.shard(2, (5, 3))], (2,))
