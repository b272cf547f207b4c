"""Detectron2's model-zoo configs by name, as they are and with ZENITH put under them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("detectron2.engine", reason="needs the real Detectron2: see docs/DETECTRON2.md")

from detectron2 import model_zoo

from zenith_det.config import zenith_unused_keys
from zenith_det.config.finding import shipped_folder
from zenith_det.engines.detectron2_engine import load_config_file
from zenith_det.engines.detectron2_engine.config import to_detectron2
from zenith_det.errors import ConfigError

pytestmark = pytest.mark.detectron2

ROOT = Path(model_zoo.__file__).parent / "configs"
MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


def test_every_zoo_config_loads_by_name_and_says_what_detectron2_reads() -> None:
    names = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.yaml"))
    assert len(names) > 60
    for name in names:
        if (shipped_folder() / name).exists():  # Base-RCNN-FPN.yaml: ours come first
            continue
        ours = to_detectron2(load_config_file(name))
        theirs = model_zoo.get_config(name)
        for section in ("MODEL", "INPUT", "DATASETS", "DATALOADER", "TEST", "SOLVER"):
            for key, value in theirs[section].items():
                if not isinstance(value, dict):
                    assert ours[section][key] == value, f"{name}: {section}.{key}"
        assert ours.SOLVER.OPTIMIZER == "SGD"


def test_zenith_goes_under_any_of_them() -> None:
    loaded = load_config_file(MASK_RCNN, ["SOLVER.BASE_LR", "0.01"], zenith=True)
    solver = loaded.cfg.SOLVER
    assert (solver.OPTIMIZER, solver.LR_SCHEDULER_NAME, solver.STEPS) == ("ZENITH", "WarmupZenithLR", ())
    assert (solver.BASE_LR, solver.MAX_ITER, solver.IMS_PER_BATCH) == (0.01, 90000, 16)
    assert not {"SOLVER.STEPS", "SOLVER.GAMMA"} & set(loaded.sources)
    assert zenith_unused_keys(loaded.sources, loaded.cfg) == []
    assert loaded.sources["MODEL.MASK_ON"] == str(ROOT / MASK_RCNN)
    # RetinaNet's anchors are an expression in the file.
    assert load_config_file(RETINANET, zenith=True).cfg.MODEL.ANCHOR_GENERATOR.SIZES[0][0] == 32


def test_what_was_typed_is_kept_or_reported() -> None:
    typed = ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"]
    assert load_config_file(MASK_RCNN, typed, zenith=True).cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupCosineLR"
    loaded = load_config_file(MASK_RCNN, ["SOLVER.STEPS", "(10,)"], zenith=True)
    assert ("SOLVER.STEPS", "command line") in zenith_unused_keys(loaded.sources, loaded.cfg)
    assert load_config_file(MASK_RCNN, ["SOLVER.OPTIMIZER", "ZENITH"]).cfg.SOLVER.OPTIMIZER == "ZENITH"


def test_unknown_names_and_bad_keys_are_one_line() -> None:
    with pytest.raises(ConfigError, match=r"COCO/x.yaml: no such config file, and none of that name"):
        load_config_file("COCO/x.yaml")
    with pytest.raises(ConfigError, match=r"command line: unknown key SOLVER.BASELR"):
        load_config_file(MASK_RCNN, ["SOLVER.BASELR", "1"])
