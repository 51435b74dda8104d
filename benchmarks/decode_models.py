"""Decoders of diffusers, small ones with random weights and those of published sizes.

`Case.made` makes one, `Case.tiled` turns on the model's own blend of tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from zoo_models import declare_torchvision_ops

declare_torchvision_ops()
import diffusers  # noqa: E402


class Decoder(nn.Module):
    """The decoding half of an autoencoder, as a module of latents."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        vae.encoder = nn.Identity()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z, return_dict=False)[0]


@dataclass(frozen=True)
class Case:
    """small, full: arguments of the class; latents: their shapes; ratio: pixels of a latent.

    tile: pixels of a tile of the small one, which overlap by a quarter; the full one has those that
    its class has. large: a shape of latents for it.
    """

    kind: str
    small: dict[str, Any]
    latents: tuple[int, ...]
    ratio: int
    tile: int
    full: dict[str, Any]
    large: tuple[int, ...]

    def made(self, full: bool = False) -> Decoder:
        """With random weights, the same each time."""
        torch.manual_seed(0)
        vae = getattr(diffusers, self.kind)(**(self.full if full else self.small))
        return Decoder(vae.eval().requires_grad_(False))

    def tiled(self, decoder: Decoder, full: bool = False) -> Decoder:
        """The same with the model's own tiles, which are blended."""
        vae, n = decoder.vae, self.tile
        vae.enable_tiling()
        if full:
            return decoder
        if hasattr(vae, "tile_sample_min_size"):
            vae.tile_sample_min_size, vae.tile_latent_min_size = n, n // self.ratio
        for name in ("height", "width"):
            given = {
                f"tile_sample_min_{name}": n, f"tile_sample_stride_{name}": 3 * n // 4,
                f"tile_latent_min_{name}": n // self.ratio, f"tile_overlap_factor_{name}": 0.25,
            }  # fmt: skip
            for key in given:
                if hasattr(vae, key):
                    setattr(vae, key, given[key])
        return decoder


def _kl(widths: tuple[int, ...], groups: int, **more: Any) -> dict[str, Any]:
    return dict(
        block_out_channels=widths, norm_num_groups=groups,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths), **more,
    )  # fmt: skip


def _same(kind: str, n: int) -> dict[str, Any]:
    return {
        "down_block_types": (f"{kind}DownBlock3D",) * n,
        "up_block_types": (f"{kind}UpBlock3D",) * n,
    }


CASES = {
    "AutoencoderKL": Case(
        "AutoencoderKL", _kl((16, 32), 8), (1, 4, 48, 48), 2, 32,
        _kl((128, 256, 512, 512), 32, layers_per_block=2, sample_size=512), (1, 4, 256, 256),
    ),
    "DC-AE": Case(
        "AutoencoderDC",
        dict(
            latent_channels=8, attention_head_dim=8, encoder_block_out_channels=(16, 32),
            decoder_block_out_channels=(16, 32), encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
        ),
        (1, 8, 48, 48), 2, 32,
        dict(
            encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
            decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        ),
        (1, 32, 128, 128),
    ),
    "Wan": Case(
        "AutoencoderKLWan",
        dict(base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
             latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scale_factor_temporal=2,
             scale_factor_spatial=2),
        (1, 4, 3, 48, 48), 2, 32, {}, (1, 16, 5, 160, 160),
    ),
    "Qwen-Image": Case(
        "AutoencoderKLQwenImage",
        dict(base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
             latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        (1, 4, 1, 48, 48), 2, 32, {}, (1, 16, 1, 256, 256),
    ),
    "LTX-Video": Case(
        "AutoencoderKLLTXVideo",
        dict(
            latent_channels=8, block_out_channels=(16, 32), decoder_block_out_channels=(16, 32),
            layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1), patch_size=2,
            spatio_temporal_scaling=(True, False), decoder_spatio_temporal_scaling=(True, False),
            decoder_inject_noise=(False,) * 3, downsample_type=("conv",) * 2,
            upsample_residual=(False,) * 2, upsample_factor=(1, 1),
            down_block_types=("LTXVideoDownBlock3D",) * 2,
        ),
        (1, 8, 3, 32, 32), 4, 48, {}, (1, 128, 9, 64, 64),
    ),
    "HunyuanVideo": Case(
        "AutoencoderKLHunyuanVideo",
        dict(latent_channels=4, block_out_channels=(8, 16, 16, 16), layers_per_block=1,
             norm_num_groups=4, **_same("HunyuanVideo", 4)),
        (1, 4, 2, 24, 24), 8, 64, {}, (1, 16, 5, 96, 96),
    ),
    "CogVideoX": Case(
        "AutoencoderKLCogVideoX",
        dict(latent_channels=4, block_out_channels=(8, 16, 16, 16), layers_per_block=1,
             norm_num_groups=4, **_same("CogVideoX", 4)),
        (1, 4, 2, 24, 24), 8, 64, {}, (1, 16, 5, 96, 96),
    ),
    "Mochi": Case(
        "AutoencoderKLMochi",
        dict(
            latent_channels=4, encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32), layers_per_block=(1, 1, 1, 1, 1),
            add_attention_block=(False,) * 5, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4,
        ),
        (1, 4, 2, 16, 16), 8, 64, {}, (1, 12, 4, 96, 96),
    ),
}  # fmt: skip
