"""``--val-share``: a run holds out a part of its training set, the same whatever is run and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import SmallSet
from zenith_det.config import LoadedConfig, get_cfg
from zenith_det.engines.val_share import hold_out
from zenith_det.errors import ConfigError


def held_out(
    train: tuple[str, str], folder: Path, *, resume: bool = False, share: float = 0.25
) -> LoadedConfig:
    loaded = LoadedConfig(get_cfg())
    loaded.override("DATASETS.TRAIN_JSON", train[0])
    loaded.override("DATASETS.TRAIN_IMAGES", train[1])
    loaded.override("DATASETS.VAL_SHARE", share, "--val-share")
    hold_out(loaded, folder, resume=resume)
    return loaded


def names(json_file: str) -> set[str]:
    return {image["file_name"] for image in json.loads(Path(json_file).read_text())["images"]}


def test_keys_name_the_parts_and_a_resumed_run_keeps_them(shapes: SmallSet, tmp_path: Path) -> None:
    original = tmp_path / "all.json"
    original.write_text(Path(shapes.train[0]).read_text())
    train = (str(original), shapes.train[1])
    keys = held_out(train, tmp_path / "a").cfg.DATASETS
    assert keys.VAL_SHARE == 0  # config.yaml is to be trained on again as it is
    assert keys.TRAIN_IMAGES == keys.VAL_IMAGES == shapes.train[1]
    assert (len(names(keys.TRAIN_JSON)), len(names(keys.VAL_JSON))) == (18, 6)
    assert (keys.TRAIN, keys.TEST) == ((keys.TRAIN_JSON,), (keys.VAL_JSON,))
    elsewhere = held_out(train, tmp_path / "b").cfg.DATASETS
    assert names(elsewhere.VAL_JSON) == names(keys.VAL_JSON)
    # Other images since: a run that goes on keeps its parts, another one gets its own beside them.
    content = json.loads(original.read_text())
    content["images"] = content["images"][:12]
    original.write_text(json.dumps(content))
    assert held_out(train, tmp_path / "a", resume=True).cfg.DATASETS.VAL_JSON == keys.VAL_JSON
    anew = held_out(train, tmp_path / "a").cfg.DATASETS
    assert len(names(anew.VAL_JSON)) == 3
    assert len(names(keys.VAL_JSON)) == 6


def test_two_validation_sets_are_refused(shapes: SmallSet, tmp_path: Path) -> None:
    loaded = LoadedConfig(get_cfg())
    for key, value in zip(
        ("TRAIN_JSON", "TRAIN_IMAGES", "VAL_JSON", "VAL_IMAGES"), (*shapes.train, *shapes.val)
    ):
        loaded.override(f"DATASETS.{key}", value)
    loaded.override("DATASETS.VAL_SHARE", 0.2, "--val-share")
    with pytest.raises(
        ConfigError, match=r"--val-share 0\.2 .*is a validation set already: give one of the two"
    ):
        hold_out(loaded, tmp_path)
