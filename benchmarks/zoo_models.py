"""Third-party models, small and with random weights, none of which knows that it runs sharded.

MODELS: name -> (builder, input shape, dim to shard). A builder imports its library when called.
LARGE: the same at sizes that users have: 2048 x 2048, 256 x 256 x 256, 10^6 points.
REDUCED: how those of MODELS that are too large for every tool differ from what is published.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import shardtensor as st

Entry = tuple[Callable[[], nn.Module], tuple[int, ...], int]
MODELS: dict[str, Entry] = {}
LARGE: dict[str, Entry] = {}
REDUCED = {
    "tv.vgg11_bn": "its first two linear layers, of 4096, are one of 64",
    "timm.beit_base_patch16_224": "2 of 12 blocks",
    "timm.dm_nfnet_f0": "1 block in each of its 4 stages, of 1, 2, 6 and 3",
}
IMAGE = (1, 3, 128, 64)
SQUARE = (1, 3, 64, 64)


class Picked(nn.Module):
    """A model whose output, or whose way of being called, takes a word more."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.model, x)


def add(
    name: str,
    shape: Sequence[int],
    build: Callable[..., nn.Module],
    dim: int = 2,
    large: Sequence[int] = (),
) -> None:
    """Enter a model in the tables. One that is made for a size is given the input's shape."""
    large = tuple(large) or _enlarged(tuple(shape), dim)
    for table, size in ((MODELS, tuple(shape)), (LARGE, large)):
        sized = build.__code__.co_varnames[:1] == ("shape",)
        table[name] = (partial(build, size) if sized else build, size, dim)


def _enlarged(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    batch, channels, *sides = shape
    if len(sides) == 1:
        return (batch, 10**6, *sides)
    return (batch, channels, *([2048] * 2 if len(sides) == 2 else [256] * 3))


def new(path: str, *args: Any, **kwargs: Any) -> nn.Module:
    """package.module.Class(*args, **kwargs)."""
    declare_torchvision_ops()
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)(*args, **kwargs)


def declare_torchvision_ops() -> None:
    """torchvision's wheel may be of another torch build; its import needs these to be known."""
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            schema = f"torchvision::{name}"
            torch.library.define(
                schema, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )


def torchvision(name: str, *args: Any, **kwargs: Any) -> nn.Module:
    return new(f"torchvision.models.{name}", *args, **kwargs)


def _torchvision() -> None:
    def features() -> nn.Module:
        return nn.Sequential(*list(torchvision("resnet18").children())[:-2])

    def vgg(shape: Sequence[int]) -> nn.Module:
        model = torchvision("vgg11_bn")
        if tuple(shape) == IMAGE:
            model.classifier = nn.Sequential(nn.Linear(25088, 64), nn.ReLU(True), nn.Dropout(),
                                             nn.Linear(64, 1000))  # fmt: skip
        return model

    def segmentation(name: str) -> nn.Module:
        model = torchvision(f"segmentation.{name}", weights=None, weights_backbone=None)
        return Picked(model, lambda m, x: m(x)["out"])

    add("tv.resnet18.features", IMAGE, features)
    for name in ("convnext_tiny", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1",
                 "densenet121", "regnet_y_400mf", "efficientnet_b0", "googlenet", "mnasnet0_5"):  # fmt: skip
        extra = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
        add(f"tv.{name}", IMAGE, lambda n=name, e=extra: torchvision(n, **e))
    add("tv.vgg11_bn", IMAGE, vgg)
    add("tv.swin_t", SQUARE, lambda: torchvision("swin_t"))
    add(
        "tv.vit", SQUARE, lambda shape: torchvision("VisionTransformer", shape[2], 8, 2, 4, 64, 128)
    )
    add("tv.deeplabv3", IMAGE, lambda: segmentation("deeplabv3_resnet50"))
    add("tv.fcn_resnet50", IMAGE, lambda: segmentation("fcn_resnet50"))
    add("tv.lraspp", IMAGE, lambda: segmentation("lraspp_mobilenet_v3_large"))
    add("tv.video.r3d_18", (1, 3, 8, 64, 32), lambda: torchvision("video.r3d_18"), 3)


def _timm() -> None:
    # not here: xcit, levit, tiny_vit. Their one-device gradient on a CPU is wrong in torch 2.13, in
    # whose batch norm a transposed gradient is read as if it were contiguous

    def build(name: str, **kwargs: Any) -> nn.Module:
        return new("timm.create_model", name, pretrained=False, **kwargs)

    def resized(name: str, side: int) -> nn.Module:
        """The model for images of another size than its own, if its size is fixed at all."""
        fewer = {"depth": 2} if name.startswith("beit") else {}
        try:
            return build(name, **({"img_size": side} if side > 256 else fewer))
        except TypeError:
            return build(name)

    for name in ("swinv2_cr_tiny_224", "mixer_s32_224", "coatnet_pico_rw_224", "vit_tiny_patch16_224",
                 "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "maxvit_rmlp_pico_rw_256",
                 "mobilevit_xxs", "crossvit_tiny_240", "pvt_v2_b0", "gcvit_xxtiny",
                 "efficientformerv2_s0", "hiera_tiny_224", "cait_xxs24_224",
                 "beit_base_patch16_224", "twins_svt_small", "convit_tiny"):  # fmt: skip
        side = int(name[-3:]) if name[-3:].isdigit() else 224
        add(f"timm.{name}", (1, 3, side, side), lambda shape, n=name: resized(n, shape[2]))
    for name in ("efficientnet_b0", "poolformer_s12", "resnet50", "convnextv2_atto", "regnetx_002",
                 "mobilenetv3_small_100", "edgenext_xx_small", "hrnet_w18_small", "focalnet_tiny_srf",
                 "davit_tiny", "res2net50_14w_8s", "repvgg_a0", "fastvit_t8",
                 "mobilenetv4_conv_small", "ghostnet_100", "resnest14d", "starnet_s1",
                 "botnet26t_256", "caformer_s18", "rexnet_100", "dla34", "sknet18"):  # fmt: skip
        side = (1, 3, 256, 256) if name.endswith("256") else IMAGE
        name = "skresnet18" if name == "sknet18" else name
        add(f"timm.{name}", side, lambda n=name: build(n))
    add("timm.dm_nfnet_f0", IMAGE, lambda shape: build("dm_nfnet_f0",
        **({"depths": (1, 1, 1, 1)} if tuple(shape) == IMAGE else {})))  # fmt: skip


def _diffusers() -> None:
    def sample(model: nn.Module, **kwargs: Any) -> nn.Module:
        return Picked(model, lambda m, x: m(x, **{k: v() for k, v in kwargs.items()}).sample)

    def unet() -> nn.Module:
        return sample(new("diffusers.UNet2DModel", sample_size=64, block_out_channels=(32, 64),
            layers_per_block=1, norm_num_groups=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D")), timestep=lambda: torch.tensor([5]))  # fmt: skip

    def conditioned() -> nn.Module:
        return sample(new("diffusers.UNet2DConditionModel", sample_size=32, in_channels=3,
            out_channels=3, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=16,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=8),
            timestep=lambda: torch.tensor([5]),
            encoder_hidden_states=lambda: torch.ones(1, 4, 16))  # fmt: skip

    def dit(shape: Sequence[int]) -> nn.Module:
        return sample(new("diffusers.DiTTransformer2DModel", num_attention_heads=2,
            attention_head_dim=16, in_channels=3, num_layers=2, sample_size=shape[2], patch_size=4,
            num_embeds_ada_norm=10, norm_num_groups=8), timestep=lambda: torch.tensor([5]),
            class_labels=lambda: torch.tensor([1]))  # fmt: skip

    two = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    small = {"block_out_channels": (32, 64), "norm_num_groups": 8, **two}
    shape = (1, 3, 64, 32)
    add("diffusers.UNet2D", shape, unet)
    add("diffusers.UNet2DCondition", shape, conditioned)
    add("diffusers.DiT", (1, 3, 32, 32), dit)
    add("diffusers.AutoencoderKL", shape, lambda: sample(new("diffusers.AutoencoderKL", **small)))
    add("diffusers.VQModel", shape, lambda: sample(new("diffusers.VQModel", **small)))


def _neuralop() -> None:
    settings = {"hidden_channels": 16, "in_channels": 3, "out_channels": 2, "n_layers": 2}
    shape = (1, 3, 64, 32)
    add("neuralop.FNO2d", shape, lambda: new("neuralop.models.FNO", n_modes=(8, 8), **settings))
    add("neuralop.TFNO2d", shape, lambda: new("neuralop.models.TFNO", n_modes=(8, 8), **settings))
    add("neuralop.FNO3d", (1, 3, 16, 16, 16),
        lambda: new("neuralop.models.FNO", n_modes=(4, 4, 4), **settings))  # fmt: skip
    add("neuralop.UNO", shape, lambda: new("neuralop.models.UNO", 3, 2, hidden_channels=8,
        uno_out_channels=[8, 8, 8], uno_n_modes=[[4, 4]] * 3, n_layers=3, channel_mlp_skip="linear",
        uno_scalings=[[1.0, 1.0], [0.5, 0.5], [2.0, 2.0]]))  # fmt: skip


def _monai() -> None:
    nets = "monai.networks.nets."
    cube, box = (1, 1, 32, 32, 32), (1, 1, 32, 16, 16)
    add(
        "monai.UNet3d",
        box,
        lambda: new(nets + "UNet", 3, 1, 2, (8, 16, 32), (2, 2), num_res_units=1),
    )
    add("monai.VNet", cube, lambda: new(nets + "VNet", 3, 1, 2, dropout_prob_down=0.0,
        dropout_prob_up=(0.0, 0.0)))  # fmt: skip
    add("monai.UNETR", cube, lambda shape: new(nets + "UNETR", 1, 2, shape[2:], feature_size=8,
        hidden_size=48, mlp_dim=96, num_heads=4))  # fmt: skip
    add(
        "monai.SwinUNETR",
        (1, 1, 64, 64, 64),
        lambda: new(nets + "SwinUNETR", 1, 2, feature_size=12),
    )
    add("monai.SegResNet", box, lambda: new(nets + "SegResNet", 3, 8, 1, 2))
    add(
        "monai.AttentionUnet",
        box,
        lambda: new(nets + "AttentionUnet", 3, 1, 2, (8, 16, 32), (2, 2)),
    )
    add("monai.BasicUNet", cube, lambda: new(nets + "BasicUNet", 3, 1, 2, (8, 8, 16, 16, 32, 8)))
    add("monai.HighResNet", box, lambda: new(nets + "HighResNet", 3, 1, 2))
    add("monai.DynUNet", box, lambda: new(nets + "DynUNet", 3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2]))
    add("monai.DenseNet", cube, lambda: new(nets + "DenseNet", 3, 1, 2, block_config=(2, 2, 2)))


def _smp() -> None:
    for name in ("Unet", "PSPNet", "DeepLabV3Plus", "UnetPlusPlus", "FPN", "Linknet", "MAnet", "PAN",
                 "DeepLabV3", "UPerNet", "Segformer"):  # fmt: skip
        path = f"segmentation_models_pytorch.{name}"
        add(f"smp.{name}", (1, 3, 256, 128), lambda p=path: new(p, "resnet18", encoder_weights=None,
            in_channels=3, classes=2))  # fmt: skip


def _transformers() -> None:
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

    def vit(shape: Sequence[int]) -> dict[str, Any]:
        return {"image_size": shape[2], "patch_size": 8, "intermediate_size": 128, **small}

    def build(
        name: str, get: str = "last_hidden_state", config: str = "", **kwargs: Any
    ) -> nn.Module:
        config = config or name.removesuffix("Model")
        model = new(f"transformers.{name}", new(f"transformers.{config}Config", **kwargs))
        return Picked(model, lambda m, x: getattr(m(x), get))

    add("hf.Segformer", IMAGE, lambda: build("SegformerForSemanticSegmentation", "logits", "Segformer",
        hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=32))  # fmt: skip
    add("hf.ViT", SQUARE, lambda shape: build("ViTModel", **vit(shape)))
    add("hf.DeiT", SQUARE, lambda shape: build("DeiTModel", **vit(shape)))
    add("hf.Beit", SQUARE, lambda shape: build("BeitModel", **vit(shape)))
    add(
        "hf.Dinov2",
        SQUARE,
        lambda shape: build("Dinov2Model", image_size=shape[2], patch_size=8, **small),
    )
    add("hf.Swin", SQUARE, lambda shape: build("SwinModel", image_size=shape[2], embed_dim=16, depths=[2, 2],
        num_heads=[2, 4], window_size=4))  # fmt: skip
    add("hf.ConvNextV2", IMAGE, lambda: build("ConvNextV2Model", hidden_sizes=[16, 32, 64, 64],
        depths=[1, 1, 1, 1]))  # fmt: skip
    add("hf.ResNet", IMAGE, lambda: build("ResNetModel", embedding_size=16,
        hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1], layer_type="basic"))  # fmt: skip
    add("hf.MobileViT", IMAGE, lambda: build("MobileViTModel", hidden_sizes=[32, 32, 32],
        neck_hidden_sizes=[8, 16, 16, 32, 32, 32, 32]))  # fmt: skip
    add("hf.Swin2SR", (1, 3, 32, 32), lambda shape: build("Swin2SRForImageSuperResolution",
        "reconstruction", "Swin2SR", image_size=shape[2], embed_dim=16, depths=[2, 2], num_heads=[2, 2],
        window_size=8))  # fmt: skip
    add("hf.GLPN", IMAGE, lambda: build("GLPNForDepthEstimation", "predicted_depth", "GLPN",
        hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=32))  # fmt: skip


def _vit_pytorch() -> None:
    def vit(shape: Sequence[int]) -> dict[str, int]:
        return {"image_size": shape[2], "patch_size": 8, "num_classes": 10, "dim": 64, "depth": 2,
                "heads": 4, "mlp_dim": 128}  # fmt: skip

    add("vit_pytorch.SimpleViT", SQUARE, lambda shape: new("vit_pytorch.SimpleViT", **vit(shape)))
    add("vit_pytorch.ViT", SQUARE, lambda shape: new("vit_pytorch.ViT", **vit(shape)))
    add(
        "vit_pytorch.DeepViT",
        SQUARE,
        lambda shape: new("vit_pytorch.deepvit.DeepViT", **vit(shape)),
    )
    add("vit_pytorch.RegionViT", (1, 3, 224, 224), lambda: new("vit_pytorch.regionvit.RegionViT",
        dim=(16, 32, 64, 64), depth=(1, 1, 1, 1), num_classes=10))  # fmt: skip
    add("vit_pytorch.MaxViT", SQUARE, lambda: new("vit_pytorch.max_vit.MaxViT", num_classes=10,
        dim=16, depth=(1, 1), window_size=4, dim_head=8, dim_conv_stem=16))  # fmt: skip
    add("vit_pytorch.CvT", SQUARE, lambda: new("vit_pytorch.cvt.CvT", num_classes=10, s1_emb_dim=16,
        s2_emb_dim=16, s3_emb_dim=32, s2_heads=2, s3_heads=2, s3_depth=2))  # fmt: skip


def _physicsnemo() -> None:
    def joined(model: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([y.flatten(1, -3) for y in model(x)], 1)

    def seeded(model: nn.Module, x: Tensor) -> Tensor:
        # it draws noise in eval mode, too
        torch.manual_seed(1)
        with st.random.match_single_device():
            return model(x, x)

    models = "physicsnemo.models."
    add("pn.AFNO", (1, 2, 32, 64), lambda shape: new(models + "afno.AFNO", inp_shape=[*shape[2:]],
        in_channels=2, out_channels=1, patch_size=[8, 8], embed_dim=32, depth=2, num_blocks=2))  # fmt: skip
    add("pn.FNO", (1, 2, 32, 32), lambda: new(models + "fno.FNO", in_channels=2, out_channels=1,
        decoder_layers=1, decoder_layer_size=8, dimension=2, latent_channels=8, num_fno_layers=2,
        num_fno_modes=4, padding=4))  # fmt: skip
    add("pn.UNet3d", (1, 1, 32, 16, 16), lambda: new(models + "unet.UNet", 1, 2, model_depth=2,
        feature_map_channels=[8, 8, 16, 16], num_conv_blocks=2))  # fmt: skip
    add("pn.Pix2Pix", (1, 2, 64, 32), lambda: new(models + "pix2pix.Pix2Pix", 2, 1, dimension=2,
        conv_layer_size=8, n_downsampling=2, n_blocks=1))  # fmt: skip
    add("pn.SRResNet", (1, 1, 16, 8, 8), lambda: new(models + "srrn.SRResNet", 1, 1,
        conv_layer_size=8, n_resid_blocks=2, scaling_factor=2))  # fmt: skip
    add("pn.SongUNet", (1, 4, 64, 32), lambda shape: Picked(new(models + "diffusion_unets.SongUNet",
        [*shape[2:]], 4, 4, model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[32],
        label_dim=0), lambda m, x: m(x, torch.tensor([0.5]), None)))  # fmt: skip
    add("pn.DhariwalUNet", (1, 4, 32, 32), lambda shape: Picked(new(models + "diffusion_unets.DhariwalUNet",
        shape[2], 4, 4, model_channels=32, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[16],
        label_dim=0), lambda m, x: m(x, torch.tensor([0.5]), None)))  # fmt: skip
    add("pn.Transolver", (1, 512, 3), lambda: Picked(new(models + "transolver.Transolver",
        functional_dim=3, out_dim=2, embedding_dim=3, n_layers=2, n_hidden=32, n_head=4, slice_num=8,
        unified_pos=False, structured_shape=None, use_te=False), lambda m, x: m(x, x)), dim=1)  # fmt: skip
    points = {"functional_dim": 3, "out_dim": 2, "n_layers": 2, "n_hidden": 32, "n_head": 4, "slice_num": 8,
              "use_te": False}  # fmt: skip
    add("pn.Transolver++", (1, 512, 3), lambda: Picked(new(models + "transolver.Transolver", **points,
        embedding_dim=3, unified_pos=False, structured_shape=None, plus=True), seeded), dim=1)  # fmt: skip
    add("pn.GeoTransolver", (1, 512, 3), lambda: Picked(new(models + "geotransolver.GeoTransolver", **points,
        geometry_dim=3, global_dim=4), lambda m, x: m(x, geometry=x, global_embedding=torch.ones(1, 1, 4,
        dtype=x.dtype))), dim=1)  # fmt: skip
    add("pn.GeoTransolver.local", (1, 512, 3), lambda: Picked(new(models + "geotransolver.GeoTransolver",
        **points, geometry_dim=3, include_local_features=True, radii=[0.5, 1.0], neighbors_in_radius=[4, 8]),
        lambda m, x: m(x, local_positions=x, geometry=x)), dim=1)  # fmt: skip
    add("pn.FLARE", (1, 512, 3), lambda: Picked(new(models + "flare.FLARE", functional_dim=3, out_dim=2,
        embedding_dim=3, n_layers=2, n_hidden=32, n_head=4, slice_num=8, use_te=False),
        lambda m, x: m(x, x)), dim=1)  # fmt: skip
    add("pn.DiT", (1, 2, 64, 32), lambda shape: Picked(new(models + "dit.DiT", shape[2:], 2, (8, 8), hidden_size=32,
        depth=2, num_heads=4), lambda m, x: m(x, torch.tensor([0.5], dtype=x.dtype))))  # fmt: skip
    add("pn.DPOT", (1, 64, 64, 1, 1), lambda shape: new(models + "dpot.DPOTNet", shape[1], 8, embed_dim=32,
        depth=2, modes=4, num_blocks=2), dim=1, large=(1, 2048, 2048, 1, 1))  # fmt: skip
    add("pn.Pangu", (1, 72, 32, 64), lambda shape: Picked(new(models + "pangu.Pangu", shape[2:], (2, 4, 4), 24,
        (2, 2, 2, 2), (2, 2, 4)), joined))  # fmt: skip
    add("pn.Fengwu", (1, 24, 32, 64), lambda shape: Picked(new(models + "fengwu.Fengwu", shape[2:], 4, 24, (4, 4),
        (2, 2, 2, 2), (2, 2, 4)), joined))  # fmt: skip


for _family in (_torchvision, _timm, _diffusers, _neuralop, _monai, _smp, _transformers,
                _vit_pytorch, _physicsnemo):  # fmt: skip
    _family()
