"""ResNet with a feature pyramid, to Detectron2's recipe, from torchvision's classes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from zenith_det.config import CfgNode
from zenith_det.engines.torchvision_engine.frozen_batch_norm import FrozenBatchNorm2d

NORM_LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "FrozenBN": FrozenBatchNorm2d,
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "GN": partial(nn.GroupNorm, 32),
}
RESNETS = {18: resnet.resnet18, 34: resnet.resnet34, 50: resnet.resnet50, 101: resnet.resnet101}
LAYERS = {"res2": "layer1", "res3": "layer2", "res4": "layer3", "res5": "layer4"}
STAGES = tuple(LAYERS)


def norm_layer(name: str) -> Callable[[int], nn.Module] | None:
    """Detectron2's name of a norm to a factory taking the number of channels; ``""`` to ``None``."""
    return NORM_LAYERS[name] if name else None


class ResNetFPN(nn.Module):
    """A torchvision ResNet whose stages, ``res2`` … ``res5`` or a part of them, feed torchvision's pyramid.

    What Detectron2 does otherwise than torchvision, done here: the stride of a bottleneck on its
    1×1 convolution (``STRIDE_IN_1X1``), freezing by stage with the batch norms of frozen stages
    turned into constants, the norms GN and SyncBN, and no stage past the last that the pyramid uses.

    Args:
        cfg: reads ``MODEL.RESNETS``, ``MODEL.FPN``, ``MODEL.BACKBONE.FREEZE_AT``, and from ``MODEL.PIXEL_MEAN`` how
            many channels there are.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        depth = cfg.MODEL.RESNETS.DEPTH
        body = RESNETS[depth](weights=None, norm_layer=NORM_LAYERS[cfg.MODEL.RESNETS.NORM])
        del body.fc, body.avgpool
        channels = len(cfg.MODEL.PIXEL_MEAN)
        if channels != body.conv1.in_channels:
            body.conv1 = nn.Conv2d(channels, body.conv1.out_channels, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(body.conv1.weight, mode="fan_out", nonlinearity="relu")
        if cfg.MODEL.RESNETS.STRIDE_IN_1X1:
            _move_stride_to_1x1(body)
        in_features = list(cfg.MODEL.FPN.IN_FEATURES)
        for name in STAGES[STAGES.index(in_features[-1]) + 1 :]:
            setattr(body, LAYERS[name], nn.Identity())
        _freeze_stages(body, cfg.MODEL.BACKBONE.FREEZE_AT)
        self.body = body

        channels = 64 if depth in (18, 34) else 256
        self.in_features = in_features
        self.fpn = FeaturePyramidNetwork(
            [channels * 2 ** STAGES.index(name) for name in in_features],
            cfg.MODEL.FPN.OUT_CHANNELS,
            extra_blocks=LastLevelMaxPool(),
            norm_layer=norm_layer(cfg.MODEL.FPN.NORM),
        )
        first = STAGES.index(in_features[0]) + 2
        names = [f"p{first + i}" for i in range(len(in_features) + 1)]
        self.strides = {name: 2 ** int(name[1:]) for name in names}
        # As in Detectron2: up to the last stage, not to the level that is pooled from it.
        self.size_divisibility = self.strides[names[-2]]
        self.out_channels = cfg.MODEL.FPN.OUT_CHANNELS

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """A batch to feature maps by name.

        Args:
            images: ``(N, C, H, W)``, H and W multiples of ``size_divisibility``.

        Returns:
            ``p{l}``: ``(N, out_channels, H / 2^l, W / 2^l)``.
        """
        body = self.body
        x = body.maxpool(body.relu(body.bn1(body.conv1(images))))
        features: OrderedDict[str, Tensor] = OrderedDict()
        for name in STAGES:
            x = getattr(body, LAYERS[name])(x)
            if name in self.in_features:
                features[name] = x
            if name == self.in_features[-1]:
                break
        return dict(zip(self.strides, self.fpn(features).values()))


def _move_stride_to_1x1(body: resnet.ResNet) -> None:
    for module in body.modules():
        if isinstance(module, resnet.Bottleneck):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride


def _freeze_stages(body: resnet.ResNet, freeze_at: int) -> None:
    stages = [[("conv1", body), ("bn1", body)]]
    stages += [[(name, body)] for name in LAYERS.values()]
    for stage in stages[:freeze_at]:
        for name, parent in stage:
            frozen = _batch_norm_to_constant(getattr(parent, name))
            for parameter in frozen.parameters():
                parameter.requires_grad_(False)
            setattr(parent, name, frozen)


def _batch_norm_to_constant(module: nn.Module) -> nn.Module:
    """Replace every batch norm below ``module`` by one that neither learns nor follows the batch."""
    if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        frozen = FrozenBatchNorm2d(module.num_features, module.eps)
        if module.affine:
            frozen.weight.data = module.weight.data.clone().detach()
            frozen.bias.data = module.bias.data.clone().detach()
        assert module.running_mean is not None
        assert module.running_var is not None
        frozen.running_mean.data = module.running_mean.data.clone()
        frozen.running_var.data = module.running_var.data.clone()
        return frozen
    for name, child in module.named_children():
        new_child = _batch_norm_to_constant(child)
        if new_child is not child:
            setattr(module, name, new_child)
    return module


def normalize_and_pad(
    images: list[Tensor], mean: Tensor, std: Tensor, divisibility: int
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Batch images as Detectron2 does: normalize, then pad right and bottom with zeros.

    Args:
        images: uint8 or float ``(C, H_i, W_i)``, or grey ``(1, H_i, W_i)``, which is the same in each channel.
        mean, std: ``(C, 1, 1)``, in the channel order of the images.
        divisibility: height and width of the batch become multiples of it.

    Returns:
        The batch ``(N, C, H, W)`` on the device of ``mean`` and the sizes ``(H_i, W_i)`` before padding.
    """
    sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
    height = -(-max(h for h, _ in sizes) // divisibility) * divisibility
    width = -(-max(w for _, w in sizes) // divisibility) * divisibility
    batch = torch.zeros((len(images), len(mean), height, width), dtype=mean.dtype, device=mean.device)
    for i, (image, (h, w)) in enumerate(zip(images, sizes)):
        batch[i, :, :h, :w] = (image.to(mean.device, non_blocking=True) - mean) / std
    return batch, sizes
