"""Every family of torchvision: the real constructors, reduced where they have knobs."""

import functools
import types
from collections.abc import Callable

from network_tools import Network, entry, images, tensors, use_networks
from torch import Tensor, nn

CLASSES = 10
PLAIN: dict[str, tuple[int, dict[str, object]]] = {
    "resnet18": (64, {}),
    "resnet50": (64, {}),
    "mobilenet_v2": (64, {}),
    "mobilenet_v3_small": (64, {}),
    "mobilenet_v3_large": (64, {}),
    "efficientnet_b0": (64, {}),
    "efficientnet_v2_s": (64, {}),
    "googlenet": (64, {"aux_logits": False, "init_weights": False}),
    "inception_v3": (96, {"aux_logits": False, "init_weights": False}),
    "regnet_x_400mf": (64, {}),
    "regnet_y_400mf": (64, {}),
    "shufflenet_v2_x1_0": (64, {}),
    "mnasnet1_0": (64, {}),
    "squeezenet1_0": (64, {}),
}
"""Built as they are: name, image size, keywords."""


def _plain(name: str, keywords: dict[str, object]) -> nn.Module:
    return use_networks().models.get_model(name, weights=None, num_classes=CLASSES, **keywords)


def _with_narrow_classifier(name: str) -> nn.Module:
    """AlexNet and VGG hold most parameters in two layers of 4096; 256 have the same structure."""
    model = use_networks().models.get_model(name, weights=None, num_classes=CLASSES)
    linear = [i for i, layer in enumerate(model.classifier) if isinstance(layer, nn.Linear)]
    sizes = [model.classifier[linear[0]].in_features, 256, 256, CLASSES]
    for place, index in enumerate(linear):
        model.classifier[index] = nn.Linear(sizes[place], sizes[place + 1])
    return model


def _bottlenecks(tv: types.ModuleType, **keywords: object) -> nn.Module:
    resnet = tv.models.resnet
    return resnet.ResNet(resnet.Bottleneck, [2, 1, 1, 1], num_classes=CLASSES, **keywords)


def _densenet121(tv: types.ModuleType) -> nn.Module:
    return tv.models.DenseNet(growth_rate=16, block_config=(3, 3, 2), num_init_features=32, num_classes=CLASSES)


def _convnext_tiny(tv: types.ModuleType) -> nn.Module:
    block = tv.models.convnext.CNBlockConfig
    return tv.models.ConvNeXt([block(32, 64, 2), block(64, 96, 2), block(96, None, 1)], num_classes=CLASSES)


def _swin(tv: types.ModuleType, second: bool) -> nn.Module:
    swin = tv.models.swin_transformer
    kinds = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if second else {}
    return swin.SwinTransformer([4, 4], 48, [2, 2], [4, 8], [4, 4], num_classes=CLASSES, **kinds)


def _vit_b_16(tv: types.ModuleType) -> nn.Module:
    return tv.models.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=CLASSES)


def _maxvit_t(tv: types.ModuleType) -> nn.Module:
    return tv.models.MaxVit((32, 32), 32, 4, [32, 64], [1, 2], 16, 0.1, num_classes=CLASSES)


def _video(tv: types.ModuleType, name: str) -> nn.Module:
    return tv.models.video.__dict__[name](weights=None, num_classes=CLASSES)


def _mvit(tv: types.ModuleType, second: bool) -> nn.Module:
    """Three blocks, of which the second halves the resolution; version 1 widens before that block, version 2 in it."""
    mvit = tv.models.video.mvit
    widths = [(32, 32), (32, 64), (64, 64)] if second else [(32, 64), (64, 64), (64, 64)]
    strides = [([], [1, 2, 2]), ([1, 2, 2], [1, 1, 1]), ([], [1, 1, 1])]
    blocks = [
        mvit.MSBlockConfig(4, width, out, [3, 3, 3] if q else [], [3, 3, 3], q, kv)
        for (width, out), (q, kv) in zip(widths, strides, strict=True)
    ]
    kinds = dict.fromkeys(("residual_pool", "rel_pos_embed", "proj_after_attn"), second)
    return mvit.MViT((32, 32), 4, blocks, residual_with_cls_embed=not second, num_classes=CLASSES, **kinds)


def _s3d(tv: types.ModuleType) -> nn.Module:
    model = tv.models.video.s3d(weights=None, num_classes=CLASSES)
    model.avgpool = nn.AdaptiveAvgPool3d((2, 1, 1))  # the fixed window of 7 asks for frames of 224
    return model


def _swin3d_t(tv: types.ModuleType) -> nn.Module:
    swin = tv.models.video.swin_transformer
    return swin.SwinTransformer3d([2, 4, 4], 48, [2, 2], [4, 8], [2, 4, 4], num_classes=CLASSES)


class Detector(nn.Module):
    """Backbone and heads of a detector; what follows (anchors, suppression) depends on the values it sees."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x: Tensor) -> object:
        return self.head(list(self.backbone(x).values()))


def _detector(tv: types.ModuleType, name: str) -> nn.Module:
    model = tv.models.get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES)
    return Detector(model.backbone, model.rpn.head if hasattr(model, "rpn") else model.head)


def _segmenter(tv: types.ModuleType, name: str) -> nn.Module:
    return tv.models.get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES)


REDUCED: dict[str, tuple[int, Callable[[types.ModuleType], nn.Module]]] = {
    "resnext50_32x4d": (64, functools.partial(_bottlenecks, groups=32, width_per_group=4)),
    "wide_resnet50_2": (64, functools.partial(_bottlenecks, width_per_group=128)),
    "densenet121": (64, _densenet121),
    "convnext_tiny": (64, _convnext_tiny),
    "swin_t": (32, functools.partial(_swin, second=False)),
    "swin_v2_t": (32, functools.partial(_swin, second=True)),
    "vit_b_16": (32, _vit_b_16),
    "maxvit_t": (32, _maxvit_t),
    "deeplabv3_resnet50": (64, functools.partial(_segmenter, name="deeplabv3_resnet50")),
    "fcn_resnet50": (64, functools.partial(_segmenter, name="fcn_resnet50")),
    "lraspp_mobilenet_v3_large": (64, functools.partial(_segmenter, name="lraspp_mobilenet_v3_large")),
    "ssd300_vgg16": (272, functools.partial(_detector, name="ssd300_vgg16")),
    "ssdlite320_mobilenet_v3_large": (96, functools.partial(_detector, name="ssdlite320_mobilenet_v3_large")),
    "retinanet_resnet50_fpn": (64, functools.partial(_detector, name="retinanet_resnet50_fpn")),
    "fcos_resnet50_fpn": (64, functools.partial(_detector, name="fcos_resnet50_fpn")),
    "fasterrcnn_mobilenet_v3_large_fpn": (64, functools.partial(_detector, name="fasterrcnn_mobilenet_v3_large_fpn")),
}
VIDEOS: dict[str, tuple[tuple[int, ...], Callable[[types.ModuleType], nn.Module]]] = {
    "r3d_18": ((3, 4, 32, 32), functools.partial(_video, name="r3d_18")),
    "r2plus1d_18": ((3, 4, 32, 32), functools.partial(_video, name="r2plus1d_18")),
    "mc3_18": ((3, 4, 32, 32), functools.partial(_video, name="mc3_18")),
    "s3d": ((3, 16, 64, 64), _s3d),
    "mvit_v1_b": ((3, 4, 32, 32), functools.partial(_mvit, second=False)),
    "mvit_v2_s": ((3, 4, 32, 32), functools.partial(_mvit, second=True)),
    "swin3d_t": ((3, 4, 32, 32), _swin3d_t),
}


def _with_library(make: Callable[[types.ModuleType], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: make(use_networks())


def torchvision_networks() -> list[Network]:
    """One entry for every family; nothing is imported before one is built."""
    plain = [
        entry("torchvision", name, functools.partial(_plain, name, keywords), images(size))
        for name, (size, keywords) in PLAIN.items()
    ]
    classic = [
        entry("torchvision", name, functools.partial(_with_narrow_classifier, name), images(64))
        for name in ("alexnet", "vgg16_bn")
    ]
    reduced = [entry("torchvision", name, _with_library(make), images(size)) for name, (size, make) in REDUCED.items()]
    videos = [entry("torchvision", name, _with_library(make), tensors(shape)) for name, (shape, make) in VIDEOS.items()]
    return plain + classic + reduced + videos
