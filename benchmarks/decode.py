"""Large images and videos decoded on ranks and in parts, beside the models' own blend of tiles.

    OMP_NUM_THREADS=1 python -W ignore benchmarks/decode.py exact [AutoencoderKL ...] > exact.md
    python -W ignore benchmarks/decode.py memory > memory.md
    python -W ignore benchmarks/decode.py denoise > denoise.md
    python -W ignore benchmarks/decode.py picture decode.png

exact: small models of each class with random weights, in float64, on 3 simulated ranks of uneven
shards and in 4 parts on one device, held against the plain decoder; then its own tiles. Errors are
over the largest value, of the blend also the root of the mean square over that of the output.
memory: models of published sizes on fake tensors: what a rank holds at its peak, and the blend.
denoise: loops of ten steps of a U-Net and a DiT. picture: an autoencoder is trained for a minute,
and decodes an image nine times as large as those that it saw. Needs diffusers (extra `zoo`).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from decode_models import CASES, Case, Decoder
from torch import Tensor, nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.plan.estimate import Layout, Task, estimate

GIB = 2**30
RANKS = 3


def rows(x: Tensor) -> int:
    """The dim of height."""
    return x.ndim - 2


def sharded(make: Callable[[], nn.Module], z: Tensor, call: Any = None) -> tuple[Tensor, st.trace]:
    """The output whole, of uneven shards of rows on simulated ranks, and a trace of the first."""

    def on_rank() -> Any:
        mesh, _ = st.init()
        sizes = st.balance.sizes(z.shape[rows(z)], RANKS, speeds=[3, 2, 1])
        x = st.distribute_tensor(
            z, mesh, [Shard(rows(z))], src_data_rank=None, sizes={rows(z): sizes}
        )
        model = make()
        with st.trace() as t:
            y = model(x) if call is None else call(model, x)
        return y.full_tensor(), t

    return st.simulate(RANKS, on_rank)[0]


def off(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def latents(case: Case) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(case.latents, dtype=torch.float64, generator=g)


def exact(names: Sequence[str]) -> None:
    print("| model | output | 3 ranks, uneven | 4 parts, one device | its own tiles: largest | "
          "rms | messages of a rank | gathers |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for name in names or CASES:
        case = CASES[name]
        z = latents(case)

        def make(case: Case = case) -> Decoder:
            return case.made().double()

        want = make()(z)
        got, t = sharded(make, z)
        with tempfile.TemporaryDirectory(dir=".") as folder:
            parts = st.tiled(make(), 4, rows(z), memory=2**22, spill=folder)(z)
        blend = case.tiled(make())(z)
        rms = float((blend - want).square().mean().sqrt() / want.square().mean().sqrt())
        shape = " x ".join(map(str, want.shape[2:]))
        print(f"| {name} | {shape} | {off(got, want):.0e} | {off(parts, want):.0e} | "
              f"{off(blend, want):.2f} | {rms:.2f} | {t.messages} | "
              f"{len(t.gathered) or 'none'} |", flush=True)  # fmt: skip


def memory(names: Sequence[str]) -> None:
    print("| model | output | one device | 4 ranks | 8 ranks | its own tiles | "
          "time of the tiles |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for name in names or CASES:
        case = CASES[name]
        d = len(case.large) - 2
        found = []
        for n, make in (
            (1, partial(case.made, True)), (4, partial(case.made, True)),
            (8, partial(case.made, True)), (1, lambda c=case: c.tiled(c.made(True), True)),
        ):  # fmt: skip
            task = Task(make, [case.large], dims=(d,), train=False)
            found.append(estimate(task, Layout(1, (d,), (n,))))
        shape = output_of(case)
        told = [e.refused or f"{e.peak / GIB:.1f}" for e in found]
        longer = found[3].compute / found[0].compute
        print(f"| {name} | {shape} | {' | '.join(told)} | {longer:.2f} x |", flush=True)


def output_of(case: Case) -> str:
    """The size of what the large latents decode to."""
    with torch.device("meta"):
        vae = case.made(True)
        shape = vae(torch.empty(case.large)).shape
    return " x ".join(map(str, shape[2:]))


class Denoising(nn.Module):
    """Ten steps of a scheduler, from noise to latents."""

    def __init__(self, net: nn.Module, **given: Any) -> None:
        super().__init__()
        self.net, self.given = net, given
        self.scheduler = diffusers.DDIMScheduler()

    def forward(self, x: Tensor) -> Tensor:
        self.scheduler.set_timesteps(10)
        for t in self.scheduler.timesteps:
            noise = self.net(x, t.reshape(1), **self.given).sample
            x = self.scheduler.step(noise, t, x).prev_sample
        return x


def unet() -> nn.Module:
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=48, in_channels=4, out_channels=4, block_out_channels=(16, 32),
        norm_num_groups=8, layers_per_block=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return Denoising(net).double().eval()


def dit() -> nn.Module:
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=48,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=8,
    )  # fmt: skip
    return Denoising(net, class_labels=torch.tensor([1])).double().eval()


def denoise(names: Sequence[str]) -> None:
    print("| loop | latents | 3 ranks, uneven | 4 parts, one device | messages of a rank |")
    print("|---|---|---|---|---|")
    g = torch.Generator().manual_seed(2)
    for name, make in (("UNet2DModel, 10 steps of DDIM", unet), ("DiT, 10 steps of DDIM", dit)):
        z = torch.randn(1, 4, 48, 48, dtype=torch.float64, generator=g)
        want = make()(z)
        got, t = sharded(make, z)
        with tempfile.TemporaryDirectory(dir=".") as folder:
            parts = st.tiled(make(), 4, 2, memory=2**20, spill=folder)(z)
        print(f"| {name} | 48 x 48 | {off(got, want):.0e} | {off(parts, want):.0e} | "
              f"{t.messages} |", flush=True)  # fmt: skip


def fields(n: int, edge: int, g: torch.Generator) -> Tensor:
    """Images (n, 3, edge, edge) of swirls and fronts: smooth noise through a steep function."""
    wave = torch.fft.fftfreq(edge)[:, None] ** 2 + torch.fft.rfftfreq(edge)[None] ** 2
    shape = (wave * 64**2 + 1.0) ** -1.6
    noise = torch.randn(n, 3, edge, edge, generator=g)
    smooth = torch.fft.irfft2(torch.fft.rfft2(noise) * shape, s=(edge, edge))
    smooth = smooth / smooth.std((2, 3), keepdim=True)
    return torch.tanh(smooth + 0.7 * smooth.roll(1, 1) * smooth.roll(2, 1))


def trained(steps: int = 500) -> nn.Module:
    """A small AutoencoderKL that has learned such images of 64 x 64."""
    torch.manual_seed(0)
    n = 3
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 32), norm_num_groups=8, latent_channels=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * n, up_block_types=("UpDecoderBlock2D",) * n,
        sample_size=64,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    g = torch.Generator().manual_seed(0)
    for step in range(steps):
        x = fields(8, 64, g)
        posterior = vae.encode(x).latent_dist
        loss = (
            F.l1_loss(vae.decode(posterior.sample()).sample, x) + 1e-4 * posterior.kl().mean() / 64
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return vae.eval().requires_grad_(False)


def picture(names: Sequence[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    edge, tile = 192, 64
    with torch.enable_grad():
        vae = trained()
    image = fields(1, edge, torch.Generator().manual_seed(7))
    z = vae.encode(image).latent_dist.mode()
    decoder = Decoder(vae)
    want = decoder(z)
    got, _ = sharded(lambda: decoder, z)
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // 4
    blend = decoder(z)
    gap, ours = (blend - want).abs().amax(1)[0], (got - want).abs().amax(1)[0]
    starts = range(3 * tile // 4, edge, 3 * tile // 4)
    edges = torch.zeros(edge, dtype=torch.bool)
    for a in starts:
        edges[a : a + tile // 4] = True
    inside = gap[:, ~edges][~edges].mean()
    seams = gap.mean(0)[edges].mean()
    print(
        f"blend: {gap.max():.3f} at most, {gap.mean():.4f} on average, {seams:.4f} in columns of "
        f"seams, {inside:.4f} inside tiles; ranks: {ours.max():.1e}; reconstruction: "
        f"{(want - image).abs().mean():.4f} on average, with the blend "
        f"{(blend - image).abs().mean():.4f}; values {want.min():.2f} to {want.max():.2f}"
    )
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.7), layout="constrained")
    for ax, (title, shown) in zip(
        axes,
        (("decoded on one device", want), ("blend of tiles", blend)), strict=False,
    ):  # fmt: skip
        ax.imshow((shown[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1), interpolation="nearest")
        ax.set_title(title, fontsize=10)
    for ax, (title, shown) in zip(
        axes[2:], (("error of the blend", gap), ("error of 3 ranks", ours)), strict=True
    ):
        drawn = ax.imshow(shown.clamp(min=1e-8).log10(), cmap="magma", vmin=-7, vmax=0)
        ax.set_title(f"{title}: at most {shown.max():.1e}", fontsize=10)
    for a in starts:
        for ax in axes[1:3]:
            ax.axhline(a, color="white", lw=0.4, alpha=0.6)
            ax.axvline(a, color="white", lw=0.4, alpha=0.6)
    cuts = [4 * e for e in st.balance.sizes(edge // 4, RANKS, speeds=[3, 2, 1]).offsets[1:-1]]
    for c in cuts:
        axes[3].axhline(c, color="white", lw=0.6, ls="--")
    bar = figure.colorbar(drawn, ax=axes[2:], shrink=0.9)
    bar.set_ticks(range(-7, 1), labels=[f"1e{k}" for k in range(-7, 1)])
    for ax in axes:
        ax.set_xticks([])
        ax.set_yticks([])
    figure.savefig(names[0] if names else "decode.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = {f.__name__: f for f in (exact, memory, denoise, picture)}
    parser.add_argument("what", choices=list(kinds))
    parser.add_argument("names", nargs="*", help="models; of picture the file")
    options = parser.parse_args()
    with torch.no_grad():
        kinds[options.what](options.names)


if __name__ == "__main__":
    main()
