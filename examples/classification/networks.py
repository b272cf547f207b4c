"""torchvision's classification networks, for images of any size."""

from __future__ import annotations

import contextlib
import difflib

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.densenet import DenseNet
from torchvision.models.resnet import ResNet
from torchvision.models.vgg import VGG

from zenith_det.errors import ConfigError

#: Images up to this size, in pixels, get a stem that doesn't shrink them.
SMALL = 64
#: DenseNet-121 has (6, 12, 24, 16): too deep for seconds on one core.
_OWN = {"densenet41": lambda classes: DenseNet(block_config=(2, 4, 8, 4), num_classes=classes)}


def build(name: str, classes: int, size: int, width: float = 1.0, dropout: float = 0.0) -> nn.Module:
    """An untrained network: images (N, 3, size, size) to logits (N, classes).

    Args:
        name: any classification model of torchvision, or ``densenet41``.
        classes: how many.
        size: of the images, in pixels. Up to :data:`SMALL` the stem is adapted: 3×3 with stride 1 and no
            pooling in ResNets and DenseNets, VGG without the poolings that nothing is left for and with a
            small head, stride 1 in the first convolution of all others.
        width: 1 / n with an integer n: an n-th of the channels in every layer, for experiments on a CPU; all
            convolutions are then initialized as torchvision does in ResNets (He et al., fan out).
        dropout: probability, in all of the network's dropout layers; before the last linear layer if it has
            none. 0 turns them off.

    Raises:
        ConfigError: there is no such network, or it can't take such images or be made so narrow.
    """
    names = [*torchvision.models.list_models(module=torchvision.models), *_OWN]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see torchvision.models.list_models()"
        raise ConfigError(f"--model {name}: no such network; {hint}")
    divisor = round(1 / width) if 0 < width <= 1 else 0
    if not divisor or abs(divisor * width - 1) > 1e-6:
        raise ConfigError(f"--width {width:g}: must be 1, 0.5, 0.25 …: 1 divided by an integer")

    more = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    outputs = classes * divisor  # all channels are divided below
    # Without memory where every layer is replaced anyway: VGG's own head has 120 M weights.
    with torch.device("meta") if divisor > 1 else contextlib.nullcontext():
        if name in _OWN:
            model = _OWN[name](outputs)
        else:
            model = torchvision.models.get_model(name, num_classes=outputs, **more)
    if size <= SMALL:
        _adapt_stem(model, outputs, size)
    try:
        if divisor > 1:
            _thin(model, divisor)
        _set_dropout(model, dropout)
        with torch.no_grad():
            logits = model.eval()(torch.zeros(2, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"--model {name}: doesn't take {size}-pixel images at width {width:g} ({error}); "
            "--size and --width change them"
        ) from error
    assert isinstance(logits, Tensor)
    assert logits.shape == (2, classes)
    return model.train()


def _adapt_stem(model: nn.Module, outputs: int, size: int) -> None:
    if isinstance(model, ResNet):
        model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()  # type: ignore[assignment]
    elif isinstance(model, DenseNet):
        model.features.conv0 = nn.Conv2d(3, model.features.conv0.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.features.conv0.weight)
        model.features.pool0 = nn.Identity()
    elif isinstance(model, VGG):
        for index, layer in enumerate(model.features):
            if isinstance(layer, nn.MaxPool2d):
                if size < 2:
                    model.features[index] = nn.Identity()
                size //= 2
        # ImageNet's head takes 7×7 positions into 4096 channels: 100 times what the digits need.
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Sequential(
            nn.Linear(512, 512), nn.ReLU(), nn.Dropout(), nn.Linear(512, outputs)
        )
    else:
        first = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
        if first is not None:
            first.stride = (1, 1)


def _thin(model: nn.Module, divisor: int) -> None:
    """Divides the channels of every layer (but the image's 3) by ``divisor``, in place."""

    def part(channels: int) -> int:
        if channels % divisor:
            raise ValueError(f"a layer's {channels} channels can't be divided by {divisor}")
        return channels // divisor

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Conv2d):
                new: nn.Module = nn.Conv2d(
                    layer.in_channels if layer.in_channels == 3 else part(layer.in_channels),
                    part(layer.out_channels),
                    layer.kernel_size,  # type: ignore[arg-type]
                    layer.stride,  # type: ignore[arg-type]
                    layer.padding,  # type: ignore[arg-type]
                    layer.dilation,  # type: ignore[arg-type]
                    layer.groups if layer.groups == 1 else part(layer.groups),
                    layer.bias is not None,
                )
                nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
                if layer.bias is not None:
                    nn.init.zeros_(new.bias)  # type: ignore[arg-type]
            elif isinstance(layer, nn.BatchNorm2d):
                new = nn.BatchNorm2d(part(layer.num_features), layer.eps, layer.momentum)
            elif isinstance(layer, nn.Linear):
                new = nn.Linear(part(layer.in_features), part(layer.out_features), layer.bias is not None)
            else:
                continue
            setattr(parent, name, new)
    kept = [name for name, value in model.named_parameters() if value.is_meta]
    if kept:
        raise ValueError(f"--width doesn't know the layer of {kept[0]}")


def _set_dropout(model: nn.Module, probability: float) -> None:
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Dropout)]
    for layer in layers:
        layer.p = probability
    if layers or not probability:
        return
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise ValueError("there is no linear layer to put dropout before")
    parent, _, last = linear[-1].rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, last, nn.Sequential(nn.Dropout(probability), getattr(owner, last)))
