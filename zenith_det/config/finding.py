"""Config files by path, or by name: those that come with this toolkit, then those of Detectron2's model zoo."""

from __future__ import annotations

import difflib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

from zenith_det.errors import ConfigError

_FOLDER = "configs"  # in a checkout, and where commands in other people's documents have them
_LAZY_SUFFIX = ".py"


@dataclass(frozen=True)
class ConfigFile:
    """A config file that was found.

    Attributes:
        path: to open.
        origin: "path": it is there under the name that was given; "shipped": it comes with this toolkit; "zoo":
            it is one of Detectron2's model zoo.
    """

    path: str
    origin: Literal["path", "shipped", "zoo"]


def shipped_folder() -> Path:
    """The folder of this toolkit's config files: in the package where it is installed, else in the checkout."""
    package = Path(__file__).parents[1]
    installed = package / _FOLDER
    return installed if installed.is_dir() else package.parent / _FOLDER


def zoo_folder() -> Path | None:
    """The folder of Detectron2's model zoo, or None; nothing of Detectron2 is imported."""
    spec = importlib.util.find_spec("detectron2")
    for package in (spec.submodule_search_locations or ()) if spec else ():
        if os.path.isdir(folder := os.path.join(package, "model_zoo", _FOLDER)):
            return Path(folder)
    return None


def is_zoo_file(path: str) -> bool:
    """Whether a file, under the path at which :func:`find_config_file` found it, is one of the model zoo."""
    zoo = zoo_folder()
    return zoo is not None and Path(path).is_relative_to(zoo)


def find_config_file(name: str, folder: str = "") -> ConfigFile:
    """The file that ``name`` stands for.

    Args:
        name: a path, from ``folder``: it wins where something is there. Otherwise a name in :func:`shipped_folder`
            (``mask_rcnn_zenith.yaml``, ``quickstart/mask_rcnn_zenith_adamw.yaml``, or without the subfolder where
            that is unique) or in Detectron2's model zoo (``COCO-Detection/retinanet_R_50_FPN_1x.yaml``); ``configs/``
            may stand before it.
        folder: of the file whose ``_BASE_`` gives ``name``; "": the current one.

    Raises:
        ConfigError: there is no such file, several of that name, or it is a LazyConfig; with what to give.
    """
    path = os.path.join(folder, os.path.expanduser(name))
    if folder:
        path = os.path.normpath(path)
    found = ConfigFile(path, "path") if os.path.exists(path) else _by_name(name)
    if found is None:
        hint = _did_you_mean(name, path)
        raise ConfigError(
            f"{path}: no such config file, and none of that name comes with zenith_det or Detectron2's model zoo"
            f"{f': did you mean {hint}?' if hint else ''}"
        )
    if found.path.endswith(_LAZY_SUFFIX):
        raise ConfigError(f"{name}: a LazyConfig, which is Python, not YAML: {_instead_of_lazy(name, found)}")
    return found


def _by_name(name: str) -> ConfigFile | None:
    words = PurePath(os.path.normpath(name)).parts
    if not name or os.path.isabs(name) or ".." in words or "\0" in name:
        return None
    if words[0] == _FOLDER and len(words) > 1:
        words = words[1:]
    shipped, zoo = shipped_folder(), zoo_folder()
    if (file := shipped.joinpath(*words)).is_file():
        return ConfigFile(str(file), "shipped")
    same = [file for file in _names(shipped) if file.name == words[0]] if len(words) == 1 else []
    if len(same) > 1:
        raise ConfigError(f"{name}: several configs are called that: give {' or '.join(map(str, same))}")
    if same:
        return ConfigFile(str(shipped / same[0]), "shipped")
    if zoo and (file := zoo.joinpath(*words)).is_file():
        return ConfigFile(str(file), "zoo")
    return None


def _names(folder: Path | None) -> list[PurePath]:
    """All config files below a folder, relative to it."""
    return sorted(file.relative_to(folder) for file in folder.rglob("*.yaml")) if folder else []


def _did_you_mean(name: str, path: str) -> str:
    """The nearest name: beside the path, then of what comes with this toolkit or the zoo; "" for none."""
    folder, base = os.path.split(path)
    siblings = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    for close in difflib.get_close_matches(base, siblings, n=1):
        return os.path.join(folder, close)
    known = [*_names(shipped_folder()), *_names(zoo_folder())]
    of_file = {file.name: str(file) for file in reversed(known)}  # the first of each name
    for close in difflib.get_close_matches(name, map(str, known), n=1, cutoff=0.8):
        return close
    return next((of_file[close] for close in difflib.get_close_matches(base, of_file, n=1)), "")


def _instead_of_lazy(name: str, found: ConfigFile) -> str:
    if os.path.isfile(found.path.removesuffix(_LAZY_SUFFIX) + ".yaml"):
        return f"take {name.removesuffix(_LAZY_SUFFIX)}.yaml, the same model"
    return (
        "train it by Detectron2's tools/lazyconfig_train_net.py with the nodes of zenith_det.lazy "
        "(docs/DETECTRON2.md, LazyConfig)"
    )
