"""A detector of this engine as one ONNX file: images in, detections out."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.torch_version import TorchVersion

from zenith_det.config import CfgNode
from zenith_det.data import DatasetMetadata
from zenith_det.engines.torchvision_engine.export_module import ExportableRCNN, export_arguments
from zenith_det.engines.torchvision_engine.rcnn import GeneralizedRCNN
from zenith_det.errors import MissingLibraryError, UserError
from zenith_det.exporting.onnx_graphs import DECODING, IR_VERSION, OPSET, preparing

HOW_TO_INSTALL = 'pip install "zenith_det[onnx]" (onnx, onnxscript and onnxruntime)'
#: The exporter of 2.6 fails on the pyramid's upsampling.
OLDEST_TORCH = TorchVersion("2.7")
#: What the metadata of the file is written under.
METADATA_KEY = "zenith_det"


def need(library: str) -> Any:
    """A library of the extra ``onnx``.

    Raises:
        MissingLibraryError: it isn't installed; with what to do.
    """
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise MissingLibraryError(
            f"{library} is needed for ONNX and can't be imported ({error}): {HOW_TO_INSTALL}"
        ) from error


def to_onnx(model: GeneralizedRCNN, cfg: CfgNode, metadata: DatasetMetadata) -> bytes:
    """The file's content.

    Its input ``images`` is uint8 ``(N, H, W, 3)``, N images of one size as they are, RGB if that is ``INPUT.FORMAT``,
    else BGR: what makes grey or YUV of them, resizes, normalizes and pads is in the file. Its outputs have a row for
    each object, image after image, best first: ``boxes (M, 4)`` xyxy in pixels of the image, ``scores (M,)``, ``classes
    (M,)``, ``image_index (M,)``, and by task ``masks (M, S, S)``, probabilities within the box, or ``keypoints (M, K,
    3)`` (x, y, score).

    Args:
        model: on the CPU, in evaluation mode.
        cfg: its configuration.
        metadata: its classes.

    Raises:
        MissingLibraryError: onnx or onnxscript isn't installed.
        UserError: something in the model can't be exported, or this PyTorch can't export it.
    """
    if torch.__version__ < OLDEST_TORCH:
        raise UserError(
            f"PyTorch {torch.__version__} can't export these models to ONNX: install a newer one (tried with 2.14)"
        )
    onnx = need("onnx")
    need("onnx.parser")
    need("onnxscript")
    core = ExportableRCNN(model).eval()
    network = _network(core, keypoints=cfg.MODEL.KEYPOINT_ON)
    prepare = preparing(
        cfg.MODEL.PIXEL_MEAN,
        cfg.MODEL.PIXEL_STD,
        cfg.INPUT.MIN_SIZE_TEST,
        cfg.INPUT.MAX_SIZE_TEST,
        model.backbone.size_divisibility,
        cfg.INPUT.FORMAT,
    )
    parse = onnx.parser.parse_model
    whole = _joined(_prefixed(parse(prepare), "prepare"), network, ("batch_", "input_size", "original_size"))
    if cfg.MODEL.KEYPOINT_ON:
        # As it is: a prefix doesn't reach into its loop. All other parts have one.
        whole = _joined(whole, parse(DECODING), ("heatmaps", "input_boxes", "scale"))
    whole.producer_name = "zenith_det"
    whole.graph.name = "detector"
    entry = whole.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, json.dumps(describe(cfg, metadata))
    onnx.checker.check_model(whole)
    return bytes(whole.SerializeToString())


def describe(cfg: CfgNode, metadata: DatasetMetadata) -> dict[str, Any]:
    """What whoever runs the file wants to know; plain values."""
    return {
        "class_names": list(metadata.thing_classes),
        "category_ids": metadata.to_dict()["category_ids"],
        "channels": "RGB" if cfg.INPUT.FORMAT == "RGB" else "BGR",
        "value_range": list(cfg.INPUT.VALUE_RANGE),
        "score_threshold": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
        "nms_threshold": cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
        "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "mask_threshold": 0.5 if cfg.MODEL.MASK_ON else None,
        "keypoint_names": list(metadata.keypoint_names) if cfg.MODEL.KEYPOINT_ON else [],
        "skeleton": [list(pair) for pair in metadata.keypoint_connections] if cfg.MODEL.KEYPOINT_ON else [],
    }


def _network(core: ExportableRCNN, *, keypoints: bool) -> Any:
    names = ["boxes", "scores", "classes", "image_index"]
    if core.heads.mask_head is not None:
        names.append("masks")
    if keypoints:
        names += ["heatmaps", "input_boxes", "scale"]
    try:
        with torch.inference_mode(), _quiet():
            program = torch.onnx.export(
                core,
                **export_arguments(core),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=["batch_", "input_size", "original_size"],
                output_names=names,
                custom_translation_table={torch.ops.zenith_det.grouped_nms.default: _grouped_nms},
            )
    except torch.onnx.OnnxExporterError as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(f"the model can't be exported to ONNX: {lines[0]}") from error
    assert program is not None
    network = program.model_proto
    network.ir_version = IR_VERSION
    return _prefixed(network, "network")


def _grouped_nms(boxes: Any, scores: Any, iou_threshold: float, score_threshold: float) -> Any:
    """:func:`.export_module.grouped_nms` in ONNX's operators."""
    op = importlib.import_module("onnxscript").opset18
    most = op.Shape(scores, start=1)
    picked = op.NonMaxSuppression(
        boxes,
        op.Unsqueeze(scores, op.Constant(value_ints=[1])),
        most,
        op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[score_threshold]),
    )  # (K, 3): group, 0, box
    where = op.Gather(picked, op.Constant(value_ints=[0, 2]), axis=1)
    nothing = op.Expand(op.Cast(op.Constant(value_int=0), to=9), op.Shape(scores))
    ones = op.Expand(op.Cast(op.Constant(value_int=1), to=9), op.Shape(where, end=1))
    return op.ScatterND(nothing, where, ones)


def _prefixed(model: Any, name: str) -> Any:
    """Nothing in it is called as in another part, but for inputs and outputs."""
    return need("onnx.compose").add_prefix(
        model, f"{name}/", rename_inputs=False, rename_outputs=False, rename_functions=True
    )


def _joined(first: Any, second: Any, shared: tuple[str, ...]) -> Any:
    """The outputs ``shared`` of one graph into the inputs of the same names of the other."""
    return need("onnx.compose").merge_models(first, second, io_map=[(name, name) for name in shared])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says about itself; its errors stay."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
