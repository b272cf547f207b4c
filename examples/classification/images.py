"""Labelled images as three datasets: to train on, to choose with, to report on.

The split is fixed and doesn't depend on a run's seed, so that runs differ in nothing but what is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision import datasets
from torchvision.transforms import v2 as transforms

from zenith_det.errors import DatasetError

Transform = Callable[[Any], Tensor]

# The name here, torchvision's class, mean and standard deviation of its pixels (of the training images).
_TORCHVISION: dict[str, tuple[Any, tuple[float, ...], tuple[float, ...]]] = {
    "mnist": (datasets.MNIST, (0.131,) * 3, (0.308,) * 3),
    "cifar10": (datasets.CIFAR10, (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
    "cifar100": (datasets.CIFAR100, (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
}
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NAMES = ("digits", *_TORCHVISION, "folder:PATH")

# Of scikit-learn's 1797 digits; the rest, 900, are the test images. Many, since one error in 900 is 0.1 %.
_DIGITS_TRAIN, _DIGITS_VALIDATION = 600, 297
_VALIDATION_SHARE = 0.1


class Splits(NamedTuple):
    """Items are (image (3, size, size) float32, normalized; label int)."""

    train: Dataset[Any]
    validation: Dataset[Any]
    """To choose the learning rate with; held out of the training images."""
    test: Dataset[Any]
    """To report on."""
    classes: int
    size: int
    """Height and width, in pixels."""


def load(
    name: str,
    data_dir: str | Path = "output/data",
    download: bool = False,
    size: int | None = None,
    limit: int | None = None,
) -> Splits:
    """The dataset called ``name``.

    Args:
        name: one of :data:`NAMES`. ``digits`` needs scikit-learn and no network. ``folder:PATH`` holds
            ``train/CLASS/*`` and ``val/CLASS/*``; ``val`` is what is reported on.
        data_dir: where torchvision keeps MNIST and CIFAR.
        download: whether torchvision may fetch them.
        size: pixels; default the dataset's own (8, 28 and 32), 224 for folders.
        limit: only the first so many training images.

    Raises:
        DatasetError: no such dataset, or it isn't there, or a library is missing.
    """
    if name == "digits":
        splits = _digits(size or 8)
    elif name in _TORCHVISION:
        splits = _torchvision(name, Path(data_dir), download, size)
    elif name.startswith("folder:"):
        splits = _folder(Path(name.removeprefix("folder:")), size or 224)
    else:
        raise DatasetError(f"--data {name}: no such dataset; there are {', '.join(NAMES)}")
    if limit is not None:
        few = range(min(limit, len(splits.train)))  # type: ignore[arg-type]
        splits = splits._replace(train=Subset(splits.train, few))
    return splits


def _digits(size: int) -> Splits:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DatasetError(
            f'--data digits needs scikit-learn ({error}): pip install "zenith_det[classification]"'
        ) from None
    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16  # (1797, 1, 8, 8) in [0, 1]
    if size != images.shape[-1]:
        images = torch.nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
    images = ((images - 0.305) / 0.376).expand(-1, 3, -1, -1).contiguous()
    every = TensorDataset(images, torch.from_numpy(found.target).long())
    order = _fixed_order(len(every))
    ends = (_DIGITS_TRAIN, _DIGITS_TRAIN + _DIGITS_VALIDATION)
    train, validation, test = (order[: ends[0]], order[ends[0] : ends[1]], order[ends[1] :])
    return Splits(Subset(every, train), Subset(every, validation), Subset(every, test), 10, size)


def _torchvision(name: str, root: Path, download: bool, size: int | None) -> Splits:
    dataset, mean, std = _TORCHVISION[name]
    own = 28 if name == "mnist" else 32
    size = size or own
    plain: list[Any] = [transforms.Resize(size)] if size != own else []
    if name == "mnist":
        plain += [transforms.Grayscale(3)]
        varied = plain
    else:
        varied = [*plain, transforms.RandomCrop(size, padding=size // 8), transforms.RandomHorizontalFlip()]
    end = _to_normalized(mean, std)

    def make(train: bool, steps: list[Any]) -> Any:
        return dataset(
            root, train=train, transform=transforms.Compose([*steps, *end]), download=download and train
        )

    try:
        train, held_out, test = make(True, varied), make(True, plain), make(False, plain)
    except (RuntimeError, OSError) as error:
        if download:
            raise DatasetError(f"--download of {name} into {root} failed: {error}") from error
        raise DatasetError(
            f"--data {name}: not in {root}; --download fetches it, --data-dir names another place"
        ) from None
    return _hold_out(train, held_out, test, len(test.classes), size)


def _folder(root: Path, size: int) -> Splits:
    end = _to_normalized(*_IMAGENET)
    varied = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *end]
    plain = [transforms.Resize(round(size * 8 / 7)), transforms.CenterCrop(size), *end]

    def make(part: str, steps: list[Any]) -> datasets.ImageFolder:
        if not (root / part).is_dir():
            raise DatasetError(
                f"--data folder:{root}: no folder {root / part}; wanted are train/CLASS/ and val/CLASS/"
            )
        try:
            return datasets.ImageFolder(str(root / part), transforms.Compose(steps), loader=_read)
        except OSError as error:  # no class folders, or one without images
            raise DatasetError(f"--data folder:{root}: {error}") from error

    train, held_out, test = make("train", varied), make("train", plain), make("val", plain)
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise DatasetError(f"--data folder:{root}: only in one of train/ and val/: {', '.join(odd)}")
    return _hold_out(train, held_out, test, len(test.classes), size)


def _read(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path}: can't be read as an image ({error})") from error


def _to_normalized(mean: tuple[float, ...], std: tuple[float, ...]) -> list[Any]:
    return [
        transforms.ToImage(),
        transforms.ToDtype(torch.float32, scale=True),
        transforms.Normalize(list(mean), list(std)),
    ]


def _hold_out(train: Any, held_out: Any, test: Any, classes: int, size: int) -> Splits:
    """Takes the validation images out of the training images (``held_out``: the same without
    augmentation)."""
    order = _fixed_order(len(train))
    some = max(1, round(len(train) * _VALIDATION_SHARE))
    return Splits(Subset(train, order[some:]), Subset(held_out, order[:some]), test, classes, size)


def _fixed_order(length: int) -> list[int]:
    order: list[int] = torch.randperm(length, generator=torch.Generator().manual_seed(0)).tolist()
    return order
