"""Keys that the built-in engine can't honour are refused by name, with the file and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines.torchvision_engine.small_models import small_config
from zenith_det.config import load_config
from zenith_det.engines.torchvision_engine.support import check_supported
from zenith_det.errors import ConfigError


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.META_ARCHITECTURE", "RetinaNet"),
        ("MODEL.BACKBONE.NAME", "build_resnet_backbone"),
        ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True]),
        ("MODEL.RESNETS.NUM_GROUPS", 32),
        ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads"),
        ("MODEL.ROI_BOX_HEAD.USE_FED_LOSS", True),
        ("MODEL.LOAD_PROPOSALS", True),
        ("DATALOADER.SAMPLER_TRAIN", "MySampler"),
        ("INPUT.FORMAT", "HSV"),
        ("TEST.PRECISE_BN.ENABLED", True),
    ],
)
def test_refused(key: str, value: object) -> None:
    loaded = small_config("mask", **{key.replace(".", "__"): value})
    with pytest.raises(ConfigError) as caught:
        check_supported(loaded)
    message = str(caught.value)
    assert key in message
    assert "command line" in message
    assert "--engine detectron2" in message
    assert "\n" not in message


def test_the_file_that_set_the_key_is_named(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(
        f'_BASE_: "{Path("configs/mask_rcnn_zenith.yaml").absolute()}"\nTEST:\n  PRECISE_BN:\n    ENABLED: True\n'
    )
    with pytest.raises(ConfigError, match=r"TEST\.PRECISE_BN\.ENABLED = True .*mine\.yaml"):
        check_supported(load_config(str(config)))


def test_the_defaults_alone_are_another_model() -> None:
    with pytest.raises(
        ConfigError,
        match=r"no --config-file was given.*give one, such as mask_rcnn_zenith.yaml.*BACKBONE\.NAME",
    ):
        check_supported(load_config(None, ["SOLVER.MAX_ITER", 1]))
    # What was typed is refused as such.
    with pytest.raises(ConfigError, match=r"^MODEL\.META_ARCHITECTURE = 'RetinaNet' \(command line\)"):
        check_supported(load_config(None, ["MODEL.META_ARCHITECTURE", "RetinaNet"]))


@pytest.mark.parametrize("path", sorted(str(p) for p in Path("configs").rglob("*_rcnn_*.yaml")))
def test_every_shipped_config_is_supported(path: str) -> None:
    check_supported(load_config(path))


def test_anchor_sizes_for_another_number_of_levels() -> None:
    loaded = small_config("mask", MODEL__ANCHOR_GENERATOR__SIZES=[[8], [16], [32]])
    with pytest.raises(ConfigError, match=r"SIZES has 3 entries .* for 4 levels"):
        check_supported(loaded)
