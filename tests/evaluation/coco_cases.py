"""Ground truths and detections to evaluate: random ones with every case COCO knows, and real ones
perturbed."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask


def random_ground_truth(
    seed: int, *, num_images: int = 12, num_classes: int = 5, num_keypoints: int = 17
) -> dict[str, Any]:
    """Objects of all sizes, crowds as RLE, empty images, a class without objects, ids with gaps, odd
    visibilities."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    category_ids = [3 * index + 2 for index in range(num_classes)]
    for number in range(num_images):
        image_id = 1000 - 7 * number
        height, width = (int(side) for side in rng.integers(150, 400, 2))
        images.append({"id": image_id, "height": height, "width": width, "file_name": f"{image_id}.jpg"})
        for _ in range(0 if number == 3 else int(rng.integers(1, 14))):
            w, h = np.exp(rng.uniform(np.log(5), np.log(140), 2))
            x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
            crowd = bool(rng.random() < 0.12)
            mask = np.zeros((height, width), np.uint8)
            yy, xx = np.mgrid[:height, :width]
            mask[((xx - x - w / 2) / (w / 2)) ** 2 + ((yy - y - h / 2) / (h / 2)) ** 2 <= 1] = 1
            segmentation: Any
            if crowd:
                flat = mask.reshape(-1, order="F")
                edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]])))
                runs = np.diff(np.concatenate([[0], edges, [flat.size]]))
                segmentation = {"size": [height, width], "counts": [int(run) for run in runs]}
            elif rng.random() < 0.3:
                rle = coco_mask.encode(np.asfortranarray(mask))
                segmentation = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
            else:
                angle = np.linspace(0, 2 * np.pi, 13)[:-1]
                outline = np.stack([x + w / 2 + w / 2 * np.cos(angle), y + h / 2 + h / 2 * np.sin(angle)], 1)
                segmentation = [outline.reshape(-1).round(2).tolist()]
            visibility = rng.integers(0, 3, num_keypoints) * (rng.random() > 0.2)
            points = np.stack(
                [rng.uniform(x, x + w, num_keypoints), rng.uniform(y, y + h, num_keypoints)], 1
            ).round()
            triples = np.concatenate([points * (visibility > 0)[:, None], visibility[:, None]], 1)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(rng.choice(category_ids[:-1])),
                    "bbox": [float(x), float(y), float(w), float(h)],
                    "area": float(mask.sum()),
                    "iscrowd": int(crowd),
                    "segmentation": segmentation,
                    "keypoints": triples.reshape(-1).tolist(),
                    "num_keypoints": int((visibility > 0).sum()),
                }
            )
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": f"class{number}"} for number in category_ids],
    }


def perturb(ground_truth: dict[str, Any], seed: int, *, copies: int = 3) -> list[dict[str, Any]]:
    """Detections from shaken, dropped, doubled and mislabelled ground truth; few distinct scores, so that
    many tie."""
    rng = np.random.default_rng(seed)
    sizes = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
    category_ids = [category["id"] for category in ground_truth["categories"]]
    results = []
    for annotation in ground_truth["annotations"]:
        height, width = sizes[annotation["image_id"]]
        x, y, w, h = annotation["bbox"]
        for _ in range(int(rng.integers(0, copies + 1))):
            shift = rng.normal(0, 0.08, 4) * [w, h, w, h] * rng.choice([0.0, 0.3, 1.0, 3.0])
            bx, by = float(np.clip(x + shift[0], 0, width - 2)), float(np.clip(y + shift[1], 0, height - 2))
            bw = float(np.clip(w + shift[2], 1, width - bx))
            bh = float(np.clip(h + shift[3], 1, height - by))
            mask = _decode(annotation["segmentation"], height, width)
            mask = np.roll(mask, (round(shift[1]), round(shift[0])), (0, 1))
            rle = coco_mask.encode(np.asfortranarray(mask))
            result = {
                "image_id": annotation["image_id"],
                "category_id": int(rng.choice(category_ids))
                if rng.random() < 0.1
                else annotation["category_id"],
                "bbox": [bx, by, bw, bh],
                "score": float(rng.choice([0.1, 0.3, 0.3, 0.5, 0.7, 0.7, 0.9, rng.random()])),
                "segmentation": {"size": [height, width], "counts": rle["counts"].decode()},
            }
            if "keypoints" in annotation:
                points = np.array(annotation["keypoints"], float).reshape(-1, 3)
                points[:, :2] += rng.normal(0, 0.04, points[:, :2].shape) * max(w, h)
                points[:, 2] = rng.random(len(points))
                result["keypoints"] = points.reshape(-1).tolist()
            results.append(result)
    order = rng.permutation(len(results))
    return [results[index] for index in order]


def _decode(segmentation: Any, height: int, width: int) -> np.ndarray:
    if isinstance(segmentation, list):
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))
    if isinstance(segmentation["counts"], list):
        return coco_mask.decode(coco_mask.frPyObjects(segmentation, height, width))
    return coco_mask.decode(segmentation)


def real_coco(name: str) -> dict[str, Any] | None:
    """An annotation file of ``DETECTRON2_DATASETS``, or None where there is none."""
    path = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "coco" / "annotations" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def reference_stats(
    ground_truth: dict[str, Any],
    results: list[dict[str, Any]],
    task: str,
    *,
    sigmas: tuple[float, ...] | None = None,
    max_dets: int = 100,
) -> dict[str, float]:
    """What a user of pycocotools gets by the book: loadRes, evaluate, accumulate, and the numbers of
    summarize."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    results = copy.deepcopy(results)
    if task == "segm":
        for result in results:
            result.pop("bbox")
    gt = COCO()
    gt.dataset = {"info": {}, **copy.deepcopy(ground_truth)}
    gt.createIndex()
    evaluator = COCOeval(gt, gt.loadRes(results), task)
    if sigmas is not None:
        evaluator.params.kpt_oks_sigmas = np.array(sigmas)
    if task != "keypoints":
        evaluator.params.maxDets = sorted({1, 10, max_dets})
    evaluator.evaluate()
    evaluator.accumulate()
    precision = evaluator.eval["precision"]
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    labels = evaluator.params.areaRngLbl
    limit = evaluator.params.maxDets.index(20 if task == "keypoints" else max_dets)

    def mean(part: np.ndarray) -> float:
        part = part[part > -1]
        return float(part.mean()) * 100 if part.size else float("nan")

    if max_dets == 100:
        evaluator.summarize()
        keys = (
            ("AP", "AP50", "AP75", "APm", "APl")
            if task == "keypoints"
            else ("AP", "AP50", "AP75", "APs", "APm", "APl")
        )
        stats = {
            key: float(evaluator.stats[n] * 100 if evaluator.stats[n] >= 0 else "nan")
            for n, key in enumerate(keys)
        }
    else:  # pycocotools' own summarize gives -1 for any limit but 100
        stats = {"AP": mean(precision[..., 0, limit]), "AP50": mean(precision[0, ..., 0, limit])}
        stats |= {"AP75": mean(precision[5, ..., 0, limit])}
        for key, label in (("APs", "small"), ("APm", "medium"), ("APl", "large")):
            stats[key] = mean(precision[..., labels.index(label), limit])
    for index, category_id in enumerate(evaluator.params.catIds):
        stats[f"AP-{names[category_id]}"] = mean(precision[:, :, index, 0, limit])
    return stats
