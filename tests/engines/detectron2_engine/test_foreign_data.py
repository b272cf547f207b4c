"""The model zoo's configs for other data than COCO's: trained on one's own files, or one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2.engine", reason="needs the real Detectron2: see docs/DETECTRON2.md")

from detectron2.data import DatasetCatalog, MetadataCatalog

from tests.engines.detectron2_engine.d2_helpers import read_sets, synthetic_set
from zenith_det.config import LoadedConfig
from zenith_det.data.synthetic import SHAPE_NAMES
from zenith_det.engines.detectron2_engine import foreign_data, load_config_file
from zenith_det.engines.detectron2_engine.engine import ENGINE
from zenith_det.errors import ConfigError, DatasetError, UserError

pytestmark = pytest.mark.detectron2

VOC = "PascalVOC-Detection/faster_rcnn_R_50_FPN.yaml"
CITYSCAPES = "Cityscapes/mask_rcnn_R_50_FPN.yaml"
LVIS = "LVISv1-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
PANOPTIC = "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"
SEMANTIC = "Misc/semantic_R_50_FPN_1x.yaml"
FAST_RCNN = "COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return synthetic_set(tmp_path_factory.mktemp("shapes"), train=4, val=2)


def on_own_files(name: str, shapes: Any, folder: Path, *opts: str) -> LoadedConfig:
    keys = {
        "DATASETS.TRAIN_JSON": shapes["train"].json_file, "DATASETS.TRAIN_IMAGES": shapes["train"].image_root,
        "DATASETS.VAL_JSON": shapes["val"].json_file, "DATASETS.VAL_IMAGES": shapes["val"].image_root,
        "OUTPUT_DIR": folder,
    }  # fmt: skip
    return load_config_file(name, [str(word) for pair in keys.items() for word in pair] + [*opts])


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        (VOC, "dataset voc_2007_trainval (DATASETS.TRAIN, "),
        (CITYSCAPES, "dataset cityscapes_fine_instance_seg_train (DATASETS.TRAIN, "),
        (LVIS, "dataset lvis_v1_train (DATASETS.TRAIN, "),
        (PANOPTIC, "dataset coco_2017_train_panoptic_separated (DATASETS.TRAIN, "),
        (SEMANTIC, "dataset coco_2017_train_panoptic_stuffonly (DATASETS.TRAIN, "),
    ],
)
def test_missing_data_is_one_line(
    name: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_config_file(name, ["OUTPUT_DIR", str(tmp_path)])
    train = loaded.cfg.DATASETS.TRAIN[0]
    if any(Path(p).exists() for p in MetadataCatalog.get(train).as_dict().values() if isinstance(p, str)):
        pytest.skip(f"DETECTRON2_DATASETS has {train}")
    with pytest.raises(DatasetError) as caught:
        read_sets(loaded)
    assert str(caught.value).startswith(missing + loaded.sources["DATASETS.TRAIN"])
    assert "isn't there; DETECTRON2_DATASETS is the folder of datasets" in str(caught.value)
    assert ("--train-json" in str(caught.value)) == (name not in (PANOPTIC, SEMANTIC))


@pytest.fixture
def registered(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A set of another kind, registered as Detectron2's are, whose reading can be changed."""
    kind: dict[str, Any] = {"read": list}
    DatasetCatalog.register("zd_foreign", lambda: kind["read"]())
    MetadataCatalog.get("zd_foreign").set(json_file=str(tmp_path), evaluator_type="lvis")
    yield kind
    DatasetCatalog.remove("zd_foreign")
    MetadataCatalog.remove("zd_foreign")


def test_a_missing_library_is_one_line(
    registered: dict[str, Any], shapes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign_data, "_LIBRARIES", {"lvis": ("zd_not_installed", "lvis")})
    with pytest.raises(
        DatasetError, match=r"zd_foreign \(DATASETS.TRAIN, command line\) needs the package zd_not_"
    ):
        read_sets(load_config_file("", ["DATASETS.TRAIN", "('zd_foreign',)"]))
    # A test set is looked at before the training, too.
    loaded = on_own_files(VOC, shapes, tmp_path, "DATASETS.TEST", "('zd_foreign',)")
    loaded.cfg.DATASETS.VAL_JSON = loaded.cfg.DATASETS.VAL_IMAGES = ""
    with pytest.raises(DatasetError, match=r"pip install lvis; or .*DATASETS.TEST \"\(\)\" to train without"):
        read_sets(loaded)


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file", "a.txt"), ImportError("no lvis")])
def test_what_the_reading_lacks_is_one_line(
    registered: dict[str, Any], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign_data, "_LIBRARIES", {})  # what is known to be missing is told before

    def read() -> list[Any]:
        raise error

    registered["read"] = read
    with pytest.raises(
        DatasetError, match=r"zd_foreign \(DATASETS.TRAIN, command line\) can't be read: .*(a.txt|lvis)"
    ):
        ENGINE.training_set(load_config_file("", ["DATASETS.TRAIN", "('zd_foreign',)"]))


@pytest.mark.parametrize("name", [VOC, CITYSCAPES, LVIS])
def test_the_classes_follow_ones_own_data(name: str, shapes: Any, tmp_path: Path) -> None:
    loaded = on_own_files(name, shapes, tmp_path)
    assert len(SHAPE_NAMES) != loaded.cfg.MODEL.ROI_HEADS.NUM_CLASSES
    read_sets(loaded)
    assert len(SHAPE_NAMES) == loaded.cfg.MODEL.ROI_HEADS.NUM_CLASSES
    typed = on_own_files(name, shapes, tmp_path, "MODEL.ROI_HEADS.NUM_CLASSES", "99")
    with pytest.raises(
        ConfigError, match=r"NUM_CLASSES is 99 \(command line\), but .*NUM_CLASSES \d+ at the end"
    ):
        read_sets(typed)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            PANOPTIC,
            r"MODEL.META_ARCHITECTURE is PanopticFPN \(.*Base-Panoptic-FPN.yaml\), which learns semantic",
        ),
        (SEMANTIC, r"MODEL.META_ARCHITECTURE is SemanticSegmentor"),
        (
            FAST_RCNN,
            r"MODEL.LOAD_PROPOSALS is True .*give MODEL.LOAD_PROPOSALS False MODEL.PROPOSAL_GENERATOR.NAME",
        ),
    ],
)
def test_a_model_that_own_files_cannot_train_is_one_line(
    name: str, told: str, shapes: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=told):
        read_sets(on_own_files(name, shapes, tmp_path))
