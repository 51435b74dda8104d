"""The page docs/costs.md: what ops of each family send, counted on simulated ranks; prints it."""

import warnings

import torch
import torch.nn.functional as F
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.testing import make_mesh

RANKS = 4
HEAD = """# What ops cost

What one rank of 4 sends, one with neighbours on both sides, counted by `st.trace`; float32. x is
(2, 8, 64, 64), 256 KiB, cut along its rows: a shard has 64 KiB, a row of the whole width 4 KiB.
Tokens are (2, 4, 64, 16), 32 KiB, cut along the 64. Weights and what else is whole lie on every
rank; their gradients are summed op by op here, together and overlapped under `parallelize`. Made by
`docs/costs.py`, which `tests/test_docs.py` runs.

| op | forward: messages, bytes | backward: messages, bytes | what is sent |
|---|---|---|---|"""
TAIL = """
How it grows:

- **halos**: with the size of a face of the shard, whatever its depth or the number of ranks;
- **statistics, losses, sums**: with the number of channels, or not at all;
- **keys around a ring**: with the tokens of all ranks, as their square grows the work;
- **transforms, changes of the cut, sort**: with the shard, all of which moves;
- **gathers**, of an op without a rule: the whole tensor on each rank, with a warning.
  [Operators](operators.md) names them.

What that means in seconds on your machines: [`shardtensor plan`](plan.md), with links measured by
`shardtensor doctor`."""

Row = tuple[str, str, str]


def cases() -> dict[str, tuple[str, object, str]]:
    """Op: what it is given, what it does, what that sends."""
    torch.manual_seed(0)
    weight, deep = torch.randn(8, 8, 3, 3), torch.randn(8, 8, 7, 7)
    up, dense = torch.randn(8, 8, 2, 2), torch.randn(16, 16)
    gain, other = torch.ones(8), torch.ones(64)
    for w in (weight, deep, up, dense, gain, other):
        w.requires_grad_()
    half = (32, 32)
    return {
        "x + 1, gelu, dropout": ("x", lambda x: F.gelu(x + 1), "nothing"),
        "x * w, a whole (64)": ("x", lambda x: x * other, "the gradient of w"),
        "conv2d 3 x 3": ("x", lambda x: F.conv2d(x, weight, padding=1), "a row each way; dw"),
        "conv2d 7 x 7": ("x", lambda x: F.conv2d(x, deep, padding=3), "three rows each way; dw"),
        "conv2d 3 x 3, stride 2": (
            "x",
            lambda x: F.conv2d(x, weight, padding=1, stride=2),
            "a row one way; dw",
        ),
        "conv_transpose2d 2 x 2, stride 2": (
            "x",
            lambda x: F.conv_transpose2d(x, up, stride=2),
            "dw",
        ),
        "max_pool2d 2 x 2": ("x", lambda x: F.max_pool2d(x, 2), "nothing, cuts being even"),
        "interpolate, bilinear, x 2": (
            "x",
            lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
            "a row each way",
        ),
        "group_norm": ("x", lambda x: F.group_norm(x, 4, gain, gain), "statistics; two gradients"),
        "batch_norm": (
            "x",
            lambda x: F.batch_norm(x, None, None, gain, gain, training=True),
            "statistics; two gradients",
        ),
        "layer_norm over channels": (
            "tokens",
            lambda t: F.layer_norm(t, (16,)),
            "nothing: channels are whole",
        ),
        "linear": ("tokens", lambda t: F.linear(t, dense), "dw"),
        "attention": (
            "tokens",
            lambda t: F.scaled_dot_product_attention(t, t, t),
            "keys and values around the ring, and their gradients",
        ),
        "neighborhood_attention, 7": (
            "window",
            lambda t: st.neighborhood_attention(t, t, t, 7),
            "three rows of keys and values each way",
        ),
        "mse_loss, mean, sum": ("x", lambda x: F.mse_loss(x, x * 0), "one number"),
        "softmax over the cut dim": ("x", lambda x: x.softmax(2), "maxima and sums"),
        "fft2 over rows and columns": (
            "x",
            lambda x: torch.view_as_real(torch.fft.rfft2(x)),
            "the spectrum, once each way it is cut",
        ),
        "16 modes of rfft2": (
            "x",
            lambda x: torch.view_as_real(st.spectral.truncated_rfftn(x, (16, 16), dim=(2, 3))),
            "the modes that stay",
        ),
        "x[:, :, 1:]": ("x", lambda x: x[:, :, 1:], "nothing: cuts move with it"),
        "roll by one row": ("x", lambda x: x.roll(1, 2), "a row"),
        "flip": ("x", lambda x: x.flip(2), "the shard"),
        "cumsum along rows": ("x", lambda x: x.cumsum(2), "one sum of each rank"),
        "transpose, reshape of whole dims": ("x", lambda x: x.transpose(2, 3), "nothing"),
        "flatten(2) to tokens": ("x", lambda x: x.flatten(2), "nothing"),
        "redistribute to columns": (
            "x",
            lambda x: x.redistribute(placements=[Shard(3)]),
            "all but a part of the shard",
        ),
        "sort along rows": ("x", lambda x: x.sort(2).values, "the shard, there and back"),
        "full_tensor()": ("x", lambda x: x.full_tensor(), "the shard to all"),
        "adaptive_avg_pool2d": ("x", lambda x: F.adaptive_avg_pool2d(x, half), "nothing here"),
    }


def counted() -> list[Row]:
    """On one rank: for each op what goes forward, and backward."""
    mesh = make_mesh((RANKS,))
    shapes = {"x": (2, 8, 64, 64), "tokens": (2, 4, 64, 16), "window": (2, 64, 4, 16)}
    cut = {"x": 2, "tokens": 2, "window": 1}
    found = []
    for op, (given, run, _) in cases().items():
        whole = torch.randn(shapes[given])
        x = st.distribute_tensor(whole, mesh, [Shard(cut[given])], src_data_rank=None)
        x.requires_grad_()
        with st.trace() as forward:
            y = run(x)
        ones = torch.ones_like(y)
        with st.trace() as backward:
            y.backward(ones)
        sent = [f"{t.messages}, {t.bytes:,}" if t.messages else "-" for t in (forward, backward)]
        found.append((op, *sent))
    return found


def page() -> str:
    """The page, as markdown."""
    with warnings.catch_warnings():
        # none of these gathers
        warnings.simplefilter("error", st.FallbackWarning)
        rows = st.simulate(RANKS, counted, transport="plain")[1]
    said = cases()
    lines = [f"| {op} | {there} | {back} | {said[op][2]} |" for op, there, back in rows]
    return "\n".join([HEAD, *lines, TAIL])


if __name__ == "__main__":
    print(page())
