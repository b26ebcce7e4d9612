"""Families of timm, each by its smallest member; depth and width are cut further where the constructor allows it."""

import functools
from typing import Any

from network_tools import Network, entry, images, use_networks, warm_up
from torch import nn

CLASSES, SIZE = 10, 64
SMALL_VIT: dict[str, Any] = {"img_size": SIZE, "embed_dim": 64, "depth": 3, "num_heads": 4}
SMALL_SWIN: dict[str, Any] = {
    "img_size": SIZE,
    "embed_dim": 32,
    "depths": (2, 2),
    "num_heads": (4, 8),
    "window_size": 4,
}
SIZED: dict[str, Any] = {"img_size": SIZE}
"""For families that fix their resolution when they are built."""

RESIZED: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": SMALL_VIT,
    "vit_relpos_small_patch16_224": SMALL_VIT,
    "vit_srelpos_small_patch16_224": SMALL_VIT,
    "flexivit_small": SMALL_VIT,
    "deit_tiny_patch16_224": SMALL_VIT,
    "deit_tiny_distilled_patch16_224": SMALL_VIT,
    "deit3_small_patch16_224": SMALL_VIT,
    "cait_xxs24_224": SMALL_VIT,
    "beit_base_patch16_224": SMALL_VIT,
    "beitv2_base_patch16_224": SMALL_VIT,
    "samvit_base_patch16": SMALL_VIT | {"global_attn_indexes": (1,), "window_size": 2},
    "eva02_tiny_patch14_224": SMALL_VIT | {"img_size": 56},
    "convit_tiny": SMALL_VIT | {"embed_dim": 16, "local_up_to_layer": 2},
    "xcit_nano_12_p16_224": SMALL_VIT,
    "tnt_s_patch16_224": SIZED | {"embed_dim": 64, "inner_dim": 16, "depth": 3, "num_heads_outer": 4},
    "mixer_s32_224": SIZED,
    "gmixer_12_224": SIZED,
    "gmlp_ti16_224": SIZED,
    "resmlp_12_224": SIZED,
    "swin_tiny_patch4_window7_224": SMALL_SWIN,
    "swinv2_tiny_window8_256": SMALL_SWIN,
    "swinv2_cr_tiny_224": SIZED,
    "mobilevit_xxs": SIZED,
    "mobilevitv2_050": SIZED,
    "coat_lite_tiny": SIZED,
    "coat_tiny": SIZED,
    "levit_128s": SIZED,
    "pit_ti_224": SIZED,
    "pit_ti_distilled_224": SIZED,
    "efficientformerv2_s0": SIZED,
    "efficientvit_m0": SIZED,
    "sequencer2d_s": SIZED | {"layers": (1, 1, 2, 1)},
    "visformer_tiny": SIZED,
    "volo_d1_224": SIZED,
    "twins_svt_small": SIZED,
    "twins_pcpvt_small": SIZED,
    "nest_tiny": SIZED,
    "maxvit_pico_rw_256": SIZED,
    "coatnet_pico_rw_224": SIZED,
    "maxxvit_rmlp_nano_rw_256": SIZED,
    "hiera_tiny_224": SIZED,
    "mvitv2_tiny": SIZED,
    "swiftformer_xs": SIZED,
    "vitamin_small_224": SIZED,
    "gcvit_xxtiny": SIZED,
    "botnet26t_256": SIZED,
    "lambda_resnet26t": SIZED,
    "efficientformer_l1": {"img_size": 224},
}
PLAIN = [
    "convnext_atto",
    "convnextv2_atto",
    "inception_next_atto",
    "resnetv2_18",
    "resnetv2_50",
    "resnest14d",
    "res2net50_14w_8s",
    "rexnet_100",
    "regnety_002",
    "regnetx_002",
    "regnetz_005",
    "efficientnet_lite0",
    "tf_efficientnetv2_b0",
    "mobilenetv1_100",
    "mobilenetv2_050",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small",
    "mobilenetv4_hybrid_medium",
    "mobileone_s0",
    "mobileone_s1",
    "poolformer_s12",
    "poolformerv2_s12",
    "pvt_v2_b0",
    "edgenext_xx_small",
    "efficientvit_b0",
    "fastvit_t8",
    "ghostnet_050",
    "ghostnetv2_100",
    "hrnet_w18_small",
    "dla34",
    "dla46_c",
    "dpn48b",
    "dpn68",
    "densenetblur121d",
    "xception41",
    "legacy_xception",
    "hardcorenas_a",
    "repvgg_a0",
    "ese_vovnet19b_dw",
    "vovnet39a",
    "selecsls42",
    "skresnet18",
    "davit_tiny",
    "focalnet_tiny_srf",
    "hgnet_tiny",
    "hgnetv2_b0",
    "tiny_vit_5m_224",
    "caformer_s18",
    "convformer_s18",
    "starnet_s1",
    "cspresnet50",
    "cspdarknet53",
    "cs3darknet_s",
    "darknet21",
    "ecaresnet26t",
    "gcresnext26ts",
    "seresnet18",
    "seresnext26t_32x4d",
    "resnet10t",
    "resnet18d",
    "resnetaa34d",
    "tresnet_m",
    "mixnet_s",
    "semnasnet_075",
    "spnasnet_100",
    "fbnetc_100",
    "fbnetv3_b",
    "lcnet_050",
    "tinynet_e",
    "gernet_s",
    "nfnet_l0",
    "nf_regnet_b0",
    "nf_resnet26",
    "nextvit_small",
    "repghostnet_050",
    "repvit_m0_9",
    "rdnet_tiny",
    "fasternet_t0",
    "shvit_s1",
    "mambaout_femto",
    "iformer_t",
    "efficientvim_m1",
    "lowformer_b0",
    "csatv2",
    "mnasnet_small",
]
OTHER: dict[str, tuple[int, dict[str, Any]]] = {
    "inception_v4": (96, {}),
    "inception_resnet_v2": (96, {}),
    "nasnetalarge": (64, {"stem_size": 32, "num_features": 384}),
    "crossvit_tiny_240": (64, {}),
    "convmixer_768_32": (64, {}),
}
"""Another image size, or keywords that are not about resolution."""

MERGED = ("mobileone_s0", "repvgg_a0", "fastvit_t8")
"""Networks with branches in training that one convolution replaces afterwards: both forms are listed."""


def _create(name: str, keywords: dict[str, Any]) -> nn.Module:
    use_networks()
    import timm

    return timm.create_model(name, pretrained=False, num_classes=CLASSES, **keywords)


def _merged(name: str) -> nn.Module:
    """Merged after warming up: without batch statistics the sum of the branches grows from layer to layer."""
    model = warm_up(_create(name, {}).eval(), images(SIZE))
    from timm.utils.model import reparameterize_model

    return reparameterize_model(model)


def timm_networks() -> list[Network]:
    """One entry for every name above; nothing is imported before one is built."""
    tables = {name: (keywords["img_size"], keywords) for name, keywords in RESIZED.items()}
    tables |= {name: (SIZE, {}) for name in PLAIN} | OTHER
    listed = [
        entry("timm", name, functools.partial(_create, name, keywords), images(size))
        for name, (size, keywords) in tables.items()
    ]
    merged = [entry("timm", f"{name}_merged", functools.partial(_merged, name), images(SIZE)) for name in MERGED]
    return listed + merged
