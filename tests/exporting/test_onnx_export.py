"""``zenith-det export``: the file finds what the model finds, and runs without PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.torch_version import TorchVersion
from torchvision.ops import box_iou

from tests.conftest import ROOT, SmallSet
from tests.predicting.trained_run import write_run
from zenith_det import Predictor, UserError
from zenith_det.commands import export as export_command
from zenith_det.config import get_cfg
from zenith_det.data import load_coco_dataset, read_image
from zenith_det.engines.data_description import DataDescription
from zenith_det.engines.torchvision_engine import conversion
from zenith_det.engines.torchvision_engine.backbone import normalize_and_pad
from zenith_det.engines.torchvision_engine.export_module import ExportableRCNN, export_arguments
from zenith_det.engines.torchvision_engine.rcnn import GeneralizedRCNN, to_original_size
from zenith_det.errors import MissingLibraryError
from zenith_det.exporting.onnx_agreement import check_agreement
from zenith_det.exporting.onnx_export import OLDEST_TORCH, describe, to_onnx

RUNNER = ROOT / "examples" / "onnx" / "run_onnx.py"


def need_libraries() -> None:
    """Those of the extra "test", which an environment from before they were in it lacks."""
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason='needs the ONNX libraries: pip install -e ".[test]"')
    if torch.__version__ < OLDEST_TORCH:
        pytest.skip("PyTorch 2.6 can't export these models")


class Exported:
    """A run, its file, and images of its kind."""

    def __init__(self, run: Path, images: list[Path]) -> None:
        self.run = run
        self.images = images
        self.file = run / "model.onnx"


def prepared(task: str, small: SmallSet, folder: Path, **overrides: Any) -> Exported:
    dataset = load_coco_dataset(small.train)
    write_run(folder, task, dataset, MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.05, **overrides)
    # Random weights score everything alike, and the last bit would decide what suppresses what.
    state = torch.load(folder / "model_final.pth", weights_only=True)
    for name in ("roi_heads.box_predictor.cls_score.weight", "rpn.head.cls_logits.weight"):
        state["model"][name] *= 50
    torch.save(state, folder / "model_final.pth")
    return Exported(folder, sorted(Path(small.val[1]).glob("*.png")))


@pytest.fixture(scope="module")
def mask(shapes: SmallSet, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Of weights as Detectron2 writes them: they are converted on the way."""
    need_libraries()
    given = prepared("mask", shapes, tmp_path_factory.mktemp("mask"))
    checkpoint = given.run / "model_final.pth"
    state = torch.load(checkpoint, weights_only=True)
    torch.save(
        state | {"model": conversion.to_detectron2(state["model"]), "engine": "detectron2"}, checkpoint
    )
    export_command.main([str(given.run), "--images", shapes.val[1], "--compare", "2"])
    return given


@pytest.fixture(scope="module")
def keypoint(figures: SmallSet, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    need_libraries()
    # RGB, no resize, and a head that hasn't a class of its own for each box.
    given = prepared(
        "keypoint", figures, tmp_path_factory.mktemp("keypoint"), INPUT__FORMAT="RGB", INPUT__MIN_SIZE_TEST=0,
        MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG=True,
    )  # fmt: skip
    export_command.main([str(given.run), "--images", figures.val[1], "--compare", "2"])
    return given


def run_file(file: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"images": images})))


def test_any_size_and_batch(mask: Exported) -> None:
    """Also an image without any object, one within a batch of three, and sizes that no example had."""
    predictor = Predictor(mask.run, threshold=None, engine="torchvision")
    image = Image.open(mask.images[0])
    for size in [(96, 61), (40, 77), (301, 233)]:
        bgr = np.ascontiguousarray(np.asarray(image.convert("RGB").resize(size))[..., ::-1])
        batch = np.stack([bgr, np.zeros_like(bgr), bgr[::-1]])
        found = run_file(mask.file, batch)
        assert (np.diff(found["image_index"]) >= 0).all()
        for number, pixels in enumerate(batch):
            expected = predictor(pixels)
            mine = found["image_index"] == number
            assert int(mine.sum()) == len(expected)
            np.testing.assert_allclose(found["scores"][mine], expected.scores, atol=1e-3)
            # Of two with the same score either may come first.
            boxes, classes = torch.from_numpy(found["boxes"][mine]), found["classes"][mine]
            overlap = box_iou(torch.from_numpy(expected.boxes), boxes).numpy()
            overlap[expected.classes[:, None] != classes] = 0
            assert (overlap.max(1, initial=0) > 0.99).all()
            assert (overlap.max(0, initial=0) > 0.99).all()


def test_what_the_file_says_of_itself(mask: Exported, keypoint: Exported, figures: SmallSet) -> None:
    import onnxruntime

    def about(file: Path) -> dict[str, Any]:
        meta = onnxruntime.InferenceSession(str(file)).get_modelmeta()
        found: dict[str, Any] = json.loads(meta.custom_metadata_map["zenith_det"])
        return found

    metadata = load_coco_dataset(figures.train).metadata
    of_keypoints = about(keypoint.file)
    assert of_keypoints["keypoint_names"] == list(metadata.keypoint_names)
    assert of_keypoints["skeleton"] == [list(pair) for pair in metadata.keypoint_connections]
    assert of_keypoints["channels"] == "RGB"
    of_masks = about(mask.file)
    assert of_masks["class_names"] == ["rectangle", "ellipse", "triangle", "star", "ring", "cross"]
    assert of_masks["score_threshold"] == 0.05
    assert of_masks["category_ids"] == [1, 2, 3, 4, 5, 6]


def test_the_runner_needs_neither_torch_nor_us(mask: Exported, tmp_path: Path) -> None:
    image = read_image(mask.images[0])
    np.save(tmp_path / "image.npy", image)
    code = (
        f"import sys, runpy, numpy as np, onnxruntime\nsys.path.insert(0, {str(RUNNER.parent)!r})\nimport run_onnx\n"
        f"found = run_onnx.detect(onnxruntime.InferenceSession({str(mask.file)!r}), np.load('image.npy'))\n"
        "np.save('masks.npy', found['masks']); np.save('scores.npy', found['scores'])\n"
        "assert not {'torch', 'zenith_det', 'onnx', 'cv2', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    expected = Predictor(mask.run, threshold=None, engine="torchvision")(image)
    masks = np.load(tmp_path / "masks.npy")
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), expected.scores, atol=1e-3)
    assert expected.masks is not None
    assert masks.shape == expected.masks.shape
    assert (masks != expected.masks).mean() < 1e-3
    assert len(RUNNER.read_text().splitlines()) < 45


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda state: state["roi_heads.box_predictor.cls_score.bias"][0].add_(0.1), "no counterpart"),
        (
            lambda state: state["roi_heads.mask_predictor.mask_fcn_logits.bias"].add_(1.0),
            "the mask of object",
        ),
    ],
)
def test_a_file_that_differs_is_not_kept(
    mask: Exported, tmp_path: Path, spoil: Callable[[dict[str, torch.Tensor]], None], told: str
) -> None:
    """The agreement of the file with another model's."""
    predictor = Predictor(mask.run, threshold=None, engine="torchvision")
    seen = check_agreement(mask.file.read_bytes(), predictor, mask.images[:1])
    assert seen.boxes > 0
    assert seen.score < 1e-3
    with torch.no_grad():
        spoil(predictor.model.state_dict())
    with pytest.raises(UserError, match=rf"isn't kept: in .*{told}"):
        check_agreement(mask.file.read_bytes(), predictor, mask.images[:1])


def test_a_keypoint_file_agrees(keypoint: Exported) -> None:
    predictor = Predictor(keypoint.run, threshold=None, engine="torchvision")
    expected = predictor(keypoint.images[3])
    found = run_file(keypoint.file, read_image(keypoint.images[3], "RGB")[None])
    assert expected.keypoints is not None
    assert found["keypoints"].shape == expected.keypoints.shape
    assert len(expected) > 0
    distance = np.linalg.norm(found["keypoints"][..., :2] - expected.keypoints[..., :2], axis=-1)
    assert np.median(distance) < 0.01


def test_images_of_registered_sets_are_found_by_what_the_run_says(shapes: SmallSet, tmp_path: Path) -> None:
    """Those of the quickstart and of COCO, which are named in ``DATASETS.TEST``."""
    cfg = get_cfg()
    description = DataDescription(cfg)
    description.add(load_coco_dataset(shapes.train), training=True)
    description.add(load_coco_dataset(shapes.val), training=False)
    description.keep(tmp_path)
    found = export_command.chosen_images(None, tmp_path, cfg, 2)
    assert len(found) == 2
    assert {file.parent for file in found} == {Path(shapes.val[1])}


def test_what_cant_be_exported_is_one_line(shapes: SmallSet, tmp_path: Path) -> None:
    """Before anything is written."""
    need_libraries()
    given = prepared("faster", shapes, tmp_path / "run")
    images = ["--images", shapes.val[1]]
    with pytest.raises(UserError, match=r"RPN.HEAD_NAME = 'Mine'.*the torchvision engine can't honour it"):
        export_command.main([str(given.run), *images, "MODEL.RPN.HEAD_NAME", "Mine"])
    with pytest.raises(UserError, match="validation images aren't here"):
        export_command.main([str(given.run)])
    with pytest.raises(UserError, match=r"must end in \.onnx"):
        export_command.main([str(given.run), *images, "--output", "x.pt"])
    assert not list(given.run.glob("*.onnx"))


def test_the_comparison_reads_images_as_the_run_does(
    mask: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of 16 bits on the run's own scale, on which the objects are seen."""
    bright = read_image(mask.images[0])
    grey = bright[..., 1].astype(np.uint16) * 4 + 100
    Image.fromarray(grey).save(tmp_path / "deep.png")
    predictor = Predictor(
        mask.run, threshold=None, engine="torchvision", opts=["INPUT.VALUE_RANGE", (100, 1120)]
    )
    seen: list[np.ndarray] = []
    detect = Predictor.__call__

    def watched(self: Predictor, source: Any) -> Any:
        seen.append(source)
        return detect(self, source)

    monkeypatch.setattr(Predictor, "__call__", watched)
    check_agreement(mask.file.read_bytes(), predictor, [tmp_path / "deep.png"])
    np.testing.assert_array_equal(seen[0], np.repeat(bright[..., 1:2], 3, axis=2))
    assert describe(predictor.cfg, predictor.metadata)["value_range"] == [100, 1120]


def test_an_old_pytorch_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0+cpu"))
    with pytest.raises(
        UserError, match=r"PyTorch 2\.6\.0\+cpu can't export these models to ONNX: install a newer one"
    ):
        to_onnx(*[None] * 3)  # type: ignore[arg-type]  # it isn't looked at


def test_without_the_libraries(shapes: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = prepared("faster", shapes, tmp_path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingLibraryError, match=r"onnx is needed .*pip install \"zenith_det\[onnx\]\""):
        export_command.main([str(given.run), "--images", shapes.val[1]])


def test_torch_export(shapes: SmallSet, tmp_path: Path) -> None:
    """Without ONNX: in PyTorch, and through ``torch.export`` at another size and batch than its example's."""
    given = prepared("faster", shapes, tmp_path)
    predictor = Predictor(given.run, threshold=None, engine="torchvision")
    model = predictor.model
    assert isinstance(model, GeneralizedRCNN)
    core = ExportableRCNN(model).eval()
    image = read_image(given.images[0])
    sample = predictor.mapper(image)
    batch, sizes = normalize_and_pad(
        [sample["image"]] * 3, model.pixel_mean, model.pixel_std, model.backbone.size_divisibility
    )
    arguments = (batch, torch.tensor(sizes[0]).float(), torch.tensor(image.shape[:2]).float())
    with torch.no_grad():
        features = model.backbone(batch[:1])
        proposals = model.rpn.propose(model.rpn.predict(batch[:1], sizes[:1], features), sizes[:1])
        (detected,) = model.roi_heads.detect(features, proposals, sizes[:1])
        expected = to_original_size(detected, sizes[0], image.shape[:2])
        boxes, scores, classes, index, *_ = core(*arguments)
        count = len(expected["boxes"])
        assert index.tolist() == sorted([0, 1, 2] * count)
        torch.testing.assert_close(boxes[:count], expected["boxes"], rtol=0, atol=1e-2)
        torch.testing.assert_close(scores[-count:], expected["scores"], rtol=0, atol=1e-4)
        assert classes[:count].tolist() == expected["classes"].tolist()
        program = torch.export.export(core, **export_arguments(core))
        for found, wanted in zip(program.module()(*arguments), core(*arguments)):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
