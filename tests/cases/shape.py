"""Views, indexing, joining; what is assigned to a part."""

import einops
import torch
import torch.nn.functional as F
from layouts import partial, plain

from .table import D, case, cases, normal

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
    "windows": lambda a: (
        a.permute(0, 2, 3, 1).reshape(2, 2, 4, 3, 2, 3).transpose(2, 3).reshape(-1, 4, 2, 3)
    ),
    "heads": lambda a: a.unflatten(3, (2, 3)).movedim(3, 1),
    "ones": lambda a: a.unsqueeze(0).unsqueeze(3).squeeze(0).squeeze(),
    "expand": lambda a: a[:, :, None].expand(-1, -1, 2, -1, -1) * 2,
    "expand as": lambda a: a[:1, :, :1].expand_as(a) + a,
    "transposes": lambda a: (a.mT, a.permute(3, 2, 1, 0), a.swapaxes(1, 2), a[0, 0].T, a[0, 0].t()),
    "pixel shuffle": lambda a: F.pixel_unshuffle(F.pixel_shuffle(a.reshape(2, 12, 4, 3), 2), 2),
    "einops": lambda a: einops.rearrange(a, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=3),
    "einops back": lambda a: einops.rearrange(
        einops.rearrange(a, "b c h w -> b (h w) c"), "b (h w) c -> b c h w", h=8
    ),
    "einops reduce": lambda a: einops.reduce(a, "b c (h p) w -> b c h w", "mean", p=2),
    "einops repeat": lambda a: einops.repeat(a, "b c h w -> b c (h r) w", r=2),
    "channel shuffle": lambda a: F.channel_shuffle(a.reshape(2, 6, 4, 6), 2),
}
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
    "index_select": lambda a: (
        a.index_select(1, torch.tensor([2, 2])),
        a.index_select(2, torch.tensor([7, 0, 3])),
    ),
    "iterate": lambda a: torch.stack(list(a)),
}
JOIN = {
    "cat channels": lambda a: torch.cat([a, a * 2, torch.ones(2, 1, 8, 6, dtype=D)], 1),
    "cat rows": lambda a: torch.cat([a, a.sin()], 2),
    "cat plain": lambda a: torch.cat([torch.ones(2, 3, 2, 6, dtype=D), a, a[:, :, :1] * 0.5], 2),
    "cat slices": lambda a: torch.cat([a[:, :, 4:], a[:, :, :4]], dim=-2),
    "stack": lambda a: (torch.stack([a, a * 2], 1), torch.stack([a, x], -1)),
    "hstack": lambda a: (torch.hstack([a, a]), torch.vstack([a, a])),
    "roll": lambda a: (a.roll(3, 2), a.roll((-2, 5), (2, 3)), a.roll(7), torch.roll(a, 8, 2)),
    "flip": lambda a: (a.flip(2), a.flip([2, 3]), a.flip(0), a.sum().flip(-1)),
    "legacy": lambda a: (
        torch.cat([a.detach().long(), torch.empty(0)], 2),
        torch.cat([torch.empty(0, dtype=torch.complex128), a], 1),
    ),
    "repeat": lambda a: (a.repeat(1, 2, 2, 1), a.repeat(2, 1, 1, 1, 3), a.tile(2, 1)),
    "interleave": lambda a: (a.repeat_interleave(2, 2), a.repeat_interleave(3, 1)),
}


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


def into_plain(a):
    out = torch.zeros(2, 3, 8, 6, dtype=D)
    out[:, :, 2:6] = a[:, :, 1:5]
    out[a.detach() > 1] = 0.5
    return out * a


x = normal(2, 3, 8, 6)
cases("view", VIEWS, x, dims=[(2, 3, 0, 1)])
cases("slice", INDEX, x, dims=[(2, 3, 0, 1)])
cases("join", JOIN, x, dims=[(2, 3, 0, 1)])
case("assign", x, normal(2, 3, 8, 6), dims=[2, (2, 3)], skip=plain(0))(assign)
case("assign", x, dims=[2], skip=partial)(into_plain)


@case("join", normal(2, 7, 4), normal(1, 1, 4), normal(1, 8, 4), dims=[(1, 2), (), ()])
def class_token(t, c, p):
    y = torch.cat([c.expand(2, -1, -1), t], 1) + p
    return y, y[:, 0], y[:, 1:]
