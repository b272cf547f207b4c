"""``INPUT.FORMAT``: grey and YUV images from the file to the network, in training, prediction and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import SmallSet
from tests.engines.torchvision_engine.small_models import small_config
from zenith_det import Predictor
from zenith_det.config import CfgNode
from zenith_det.data import CocoDataset, load_coco_dataset
from zenith_det.engines.engine import load_engine
from zenith_det.engines.input_format import check_channels
from zenith_det.engines.torchvision_engine.backbone import normalize_and_pad
from zenith_det.engines.torchvision_engine.input_pipeline import TestMapper, TrainingMapper
from zenith_det.engines.torchvision_engine.rcnn import build_model
from zenith_det.engines.torchvision_engine.weights import to_our_names
from zenith_det.errors import ConfigError
from zenith_det.exporting.onnx_graphs import preparing
from zenith_det.training.course.resume_report import config_facts
from zenith_det.training.logs.events import EventStorage

#: (INPUT.FORMAT, PIXEL_MEAN): a grey image also goes into three channels.
FORMATS = [
    ("L", [110.0]),
    ("L", [103.5, 116.3, 123.7]),
    ("YUV-BT.601", [0.45, 0.0, 0.0]),
    ("RGB", [120.0] * 3),
]


def config(name: str, mean: list[float], **keys: Any) -> Any:
    std = [0.25 if name.startswith("YUV") else 57.0] * len(mean)
    return small_config(
        "mask", INPUT__FORMAT=name, MODEL__PIXEL_MEAN=mean, MODEL__PIXEL_STD=std, INPUT__MIN_SIZE_TRAIN=(80,),
        INPUT__MIN_SIZE_TEST=80, MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.0, VIS_PERIOD=1, **keys,
    )  # fmt: skip


@pytest.fixture
def dataset(shapes: SmallSet) -> CocoDataset:
    return load_coco_dataset(shapes.train)


@pytest.mark.parametrize(("name", "mean"), FORMATS, ids=str)
def test_a_model_trains_and_is_used(
    name: str, mean: list[float], dataset: CocoDataset, tmp_path: Path
) -> None:
    loaded = config(name, mean)
    engine = load_engine("torchvision")
    engine.prepare(loaded)
    torch.manual_seed(0)
    model = build_model(loaded.cfg)
    assert model.backbone.body.conv1.in_channels == len(mean)
    record = dataset.records[0]
    sample = TrainingMapper(loaded.cfg, dataset.metadata)(record, np.random.default_rng(0))
    assert len(sample["image"]) == (1 if name == "L" else 3)
    with engine.recording(storage := EventStorage()):
        sum(model([sample]).values()).backward()
    assert model.backbone.body.layer3[0].conv1.weight.grad.abs().sum() > 0
    (picture, *_) = [image for title, image, _ in storage.images]
    shown, _ = engine.shown(loaded.cfg, sample)
    for pixels in (shown, picture.permute(1, 2, 0).numpy()):  # train_batch.png's and TensorBoard's
        assert pixels.shape[2] == 3
        assert pixels.dtype == np.uint8
    assert (np.ptp(shown.astype(int), axis=2).max() == 0) == (name == "L")

    facts = {"dataset": dataset.metadata.to_dict(), "config": config_facts(loaded.cfg)}
    torch.save({"model": model.state_dict(), "engine": "torchvision", **facts}, tmp_path / "model.pth")
    predictor = Predictor(tmp_path / "model.pth", threshold=None, device="cpu")
    with torch.no_grad():
        (expected,) = model.eval()([TestMapper(loaded.cfg)(record)])
    assert len(expected["boxes"]) > 5
    for source in (
        record["file_name"],
        np.asarray(Image.open(record["file_name"]).convert("RGB"))[..., ::-1],
    ):
        np.testing.assert_allclose(predictor(source).boxes, expected["boxes"].numpy(), atol=1e-3)


@pytest.mark.parametrize(("name", "mean"), FORMATS, ids=str)
def test_an_exported_file_prepares_the_same(name: str, mean: list[float], dataset: CocoDataset) -> None:
    parser = pytest.importorskip("onnx.parser", reason='needs pip install -e ".[test,onnx]"')
    runtime = pytest.importorskip("onnxruntime", reason='needs pip install -e ".[test,onnx]"')
    cfg: CfgNode = config(name, mean).cfg
    graph = preparing(mean, cfg.MODEL.PIXEL_STD, 80, 1333, 16, name)
    session = runtime.InferenceSession(parser.parse_model(graph).SerializeToString())
    mapper = TestMapper(cfg)
    for record in dataset.records[:3]:
        image = np.asarray(Image.open(record["file_name"]).convert("RGB"))
        given = image if name == "RGB" else image[..., ::-1]
        batch, size, _ = session.run(None, {"images": np.ascontiguousarray(given)[None]})
        tensors = [torch.tensor(numbers).view(-1, 1, 1) for numbers in (mean, cfg.MODEL.PIXEL_STD)]
        expected, (expected_size,) = normalize_and_pad([mapper(record)["image"]], *tensors, 16)
        assert tuple(size) == expected_size
        np.testing.assert_allclose(batch, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("engine", ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)])
@pytest.mark.parametrize(
    ("name", "mean", "std", "told"),
    [
        ("BGR", [1.0], [1.0], r"have 1 entry, but INPUT\.FORMAT BGR needs 3"),
        ("YUV-BT.601", [1.0], [1.0], r"have 1 entry, but INPUT\.FORMAT YUV-BT\.601 needs 3"),
        ("L", [1.0, 1.0], [1.0, 1.0], r"have 2 entries, .* L needs 1, or 3 for a model of three channels"),
        ("L", [1.0], [1.0, 1.0, 1.0], r"has 1 entries and MODEL\.PIXEL_STD 3"),
    ],
)
def test_another_number_of_channels_is_told(
    engine: str, name: str, mean: list[float], std: list[float], told: str
) -> None:
    if engine == "detectron2":
        pytest.importorskip("detectron2.engine", reason="needs the real Detectron2: see docs/DETECTRON2.md")
    loaded = small_config("mask", INPUT__FORMAT=name, MODEL__PIXEL_MEAN=mean, MODEL__PIXEL_STD=std)
    with pytest.raises(ConfigError, match=rf"^MODEL\.PIXEL_MEAN .*{told}"):
        load_engine(engine).prepare(loaded)


def test_torchvisions_weights_are_for_three_colours() -> None:
    for name, mean in (("L", [1.0]), ("YUV-BT.601", [0.5, 0.0, 0.0])):
        loaded = config(name, mean, MODEL__WEIGHTS="ResNet50_Weights.IMAGENET1K_V1")
        check_channels(loaded.cfg)
        with pytest.raises(ConfigError, match="torchvision's first layer is for red, green and blue"):
            to_our_names(
                loaded.cfg,
                {"conv1.weight": torch.zeros(64, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(1)},
            )
