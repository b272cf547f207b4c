"""COCO evaluation: perfect detections score 100, and the compiled evaluator is there."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from pycocotools import mask as mask_api

from zenith_det.evaluation import evaluate_coco
from zenith_det.self_check.finding import OK, SLOW, Finding, broken


def check_evaluation(json_file: Path) -> Finding:
    """Each object of the set, given as a detection, is found: AP 100 for boxes and masks."""
    truth = json.loads(json_file.read_text())
    sides = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    results = []
    for o in truth["annotations"]:
        rle = mask_api.merge(mask_api.frPyObjects(o["segmentation"], *sides[o["image_id"]]))
        results.append(
            {
                **{key: o[key] for key in ("image_id", "category_id", "bbox")},
                "segmentation": {**rle, "counts": rle["counts"].decode()},
                "score": 0.9,
            }
        )
    found = evaluate_coco(truth, results, ["bbox", "segm"])
    box, mask = found["bbox"]["AP"], found["segm"]["AP"]
    text = f"perfect detections have box AP {box:.1f}, mask AP {mask:.1f}"
    figures = {"box_ap": box, "mask_ap": mask}
    if not min(box, mask) > 99.9:
        return broken(f"{text}: both should be 100")
    if importlib.util.find_spec("faster_coco_eval") is None:
        return Finding(
            SLOW, f"{text}; by pycocotools, the slower one", "pip install faster-coco-eval", figures
        )
    return Finding(OK, text, figures=figures)
