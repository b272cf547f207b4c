"""The page of a run tells what the run's folder holds."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.data import builders
from tests.report.browser import BROWSER, Browser
from zenith_det.config import load_config
from zenith_det.data import CocoDataset, load_coco_dataset
from zenith_det.data.catalog import ROOT_VARIABLE
from zenith_det.data.synthetic import generate
from zenith_det.engines.data_description import DataDescription
from zenith_det.evaluation import EvaluatedWeights, RecommendedScore, note_weights
from zenith_det.report import run_data
from zenith_det.report.run_data import read_evaluated, recommended_score
from zenith_det.report.run_report import write_run_report

RESULTS = "coco_instances_results.json"


def page_of(folder: Path) -> tuple[str, list[str]]:
    """The page's text without what is drawn or folded, a line for each row and paragraph, and what was missing."""
    missing: list[str] = []
    page = write_run_report(folder, say=missing.append).read_text()
    page = re.sub(r"<(svg|style|details)\b.*?</\1>", "", page, flags=re.DOTALL)
    page = re.sub(r"</t[dh]>", " | ", re.sub(r"</(p|tr|h\d|li|caption)>", "\n", page))
    text = html.unescape(re.sub(r"<[^>]+>", "", page)).replace("\xa0", " ")
    return text, missing


def write_run(folder: Path, evaluations: list[dict[str, Any]], *opts: Any) -> Path:
    """A run's folder: its config.yaml, with ``opts``, and its metrics.json."""
    folder.mkdir()
    loaded = load_config(None, ["SOLVER.MAX_ITER", 40, *opts])
    (folder / "config.yaml").write_text(loaded.cfg.dump())
    lines = [{"iteration": i, "total_loss": 3.0 - i / 40, "lr": 0.02} for i in range(9, 40, 10)] + evaluations
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    return folder


def write_detections(path: Path, dataset: CocoDataset, weights: EvaluatedWeights | None = None) -> None:
    """One on each object: all are found; and what they are of, where it is known."""
    ids = dataset.metadata.contiguous_id_to_thing_dataset_id
    results = [
        {
            "image_id": record["image_id"],
            "category_id": ids[o["category_id"]],
            "bbox": o["bbox"],
            "score": 0.9,
        }
        for record in dataset.records
        for o in record["annotations"]
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results))
    if weights is not None:
        note_weights(path.parent, weights)


def describe(folder: Path, dataset: CocoDataset) -> None:
    """What a run does when it starts."""
    description = DataDescription(load_config(None).cfg)
    description.add(dataset, training=False)
    description.tell()
    description.keep(folder)


def test_a_set_with_bad_images_and_dropped_annotations(tmp_path: Path) -> None:
    data = builders.content(3)
    data["annotations"][0] |= {"bbox": [5, 5, 0, 10], "segmentation": []}
    data["images"][2]["file_name"] = "gone.png"
    json_file, images = builders.write(tmp_path / "data", data)
    keys = ["DATASETS.VAL_JSON", json_file, "DATASETS.VAL_IMAGES", images, "DATASETS.MAX_BAD_IMAGES", 1]
    folder = write_run(tmp_path / "run", [{"iteration": 39, "bbox/AP": 40.0}], *keys)
    dataset = load_coco_dataset((json_file, images), max_bad_images=1)
    describe(folder, dataset)
    write_detections(folder / "inference" / RESULTS, dataset)
    text, missing = page_of(folder)
    assert missing == []
    assert "square | 40.0 | 1 | 1 | 0 | 0 |" in text  # of three images one is gone, one has no object left
    assert "All 1 objects are found." in text
    assert "set: 2 images (1 without objects), 1 annotation, 1 class; dropped: " in text
    assert re.search(r"^missing file +dropped +1  .*gone\.png", text, re.MULTILINE)
    assert re.search(r"^box without area +dropped +1  1\.png, annotation 1: ", text, re.MULTILINE)


def test_suspicious_boxes_are_told_with_the_data(tmp_path: Path) -> None:
    data = builders.content(1)
    data["annotations"] = [
        {**data["annotations"][0], "id": i, "bbox": [5.2, 5.3, 0.1, 0.2]} for i in range(12)
    ]
    folder = write_run(tmp_path / "run", [])
    describe(folder, load_coco_dataset(builders.write(tmp_path / "data", data)))
    text, _ = page_of(folder)
    told = text[text.index("set: 1 image ") :].splitlines()
    assert told[0].endswith("1 class; suspicious boxes")
    assert told[1].startswith("set: no box is larger than a pixel: are they relative to the image's size?")


def test_a_run_within_its_warm_up_looks_out_of_the_ordinary(tmp_path: Path) -> None:
    text, _ = page_of(write_run(tmp_path / "short", []))
    assert "The run's 40 iterations don't leave the warm-up of SOLVER.WARMUP_ITERS 1000, and the LR " in text
    assert "Nothing in the curves" not in text
    text, _ = page_of(write_run(tmp_path / "long", [], "SOLVER.WARMUP_ITERS", 4, "SOLVER.ZENITH.WINDOW", 4))
    assert "Nothing in the curves" in text


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")
def test_on_a_telephone_nothing_is_out_of_reach(tmp_path: Path) -> None:
    """Long names and paths break into lines, and the names of rows leave room for what stands beside them."""
    data = builders.content(2)
    data["categories"][0]["name"] = (
        "a class with a name of very many words, some_that_do_not_break_by_themselves"
    )
    json_file, images = builders.write(tmp_path / "a_folder_with_a_long_name" / "and_another_in_it", data)
    keys = ["DATASETS.VAL_JSON", json_file, "DATASETS.VAL_IMAGES", images]
    folder = write_run(tmp_path / "run", [{"iteration": 39, "bbox/AP": 40.0}], *keys)
    dataset = load_coco_dataset((json_file, images))
    describe(folder, dataset)
    write_detections(folder / "inference" / RESULTS, dataset)
    page = write_run_report(folder)
    with Browser() as browser:
        browser.open(page, 400)
        cut_off = (
            "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, svg') && "
            "(e.getBoundingClientRect().right > innerWidth || e.clientWidth > 0 && "
            "e.scrollWidth > e.clientWidth + 1)).map(e => e.innerText)"
        )
        assert browser.evaluate(cut_off) == []
        widest = "Math.max(...[...document.querySelectorAll('tr > :first-child')].map(e => e.offsetWidth))"
        assert 40 < browser.evaluate(widest) < 200


def test_one_test_set_has_no_name(tmp_path: Path) -> None:
    evaluation = {"iteration": 39, "bbox/AP": 40.0, "bbox/AP50": 60.0, "averaged/bbox/AP": 42.0}
    with_tta = {"iteration": 39, "bbox_TTA/AP": 41.0, "bbox_TTA/AP50": 61.0}
    text, _ = page_of(write_run(tmp_path / "run", [evaluation, with_tta]))
    assert (
        "Box AP 40.0, box AP 41.0 with test-time augmentation, box AP 42.0 with averaged weights, at iteration 39.\n"
    ) in text
    assert "box, test-time augmentation | 41.0 | 61.0 | n/a | n/a | n/a | n/a | 39 | 41.0 at 39 |" in text
    assert "COCO AP in percent, last evaluation; n/a" in text
    assert "box | 40.0 | 60.0 | n/a | n/a | n/a | n/a | 39 | 40.0 at 39 |" in text
    assert "COCO AP in percent, averaged weights; n/a" in text


# The built-in engine's folders, and Detectron2's.
@pytest.mark.parametrize("where", ["shapes_val/inference", "inference/shapes_val"])
def test_several_test_sets_have_their_own_numbers(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    generate(tmp_path / "shapes", train=3, val=4, size=64, seed=5)
    evaluation = {
        "iteration": 39,
        "shapes_train/bbox/AP": 51.0, "shapes_train/bbox/AP-ring": 52.0, "shapes_train/bbox/AP50": 53.0,
        "averaged/shapes_train/bbox/AP": 54.0,
        "shapes_val/bbox/AP": 41.0, "shapes_val/bbox/AP-star": 42.0, "shapes_val/bbox/AP50": 43.0,
    }  # fmt: skip
    folder = write_run(tmp_path / "run", [evaluation], "DATASETS.TEST", ("shapes_val", "shapes_train"))
    dataset = load_coco_dataset("shapes_val")
    write_detections(folder / where / RESULTS, dataset)
    text, missing = page_of(folder)
    assert missing == []
    assert "No AP yet" not in text
    assert "shapes_train: box AP 51.0, box AP 54.0 with averaged weights, at iteration 39.\n" in text
    assert "shapes_val: box AP 41.0, at iteration 39.\n" in text
    assert re.search(r"on shapes_train, last evaluation.*\n.*\n *box \| 51.0 \| 53.0 \|", text)
    assert re.search(r"on shapes_train, averaged weights.*\n.*\n *box \| 54.0 \| n/a \|", text)
    assert re.search(r"on shapes_val, last evaluation.*\n.*\n *box \| 41.0 \| 43.0 \|", text)
    # What was found is of the first set of DATASETS.TEST, and stands by its classes alone.
    star = dataset.metadata.thing_classes.index("star")
    stars = sum(o["category_id"] == star for record in dataset.records for o in record["annotations"])
    assert stars
    assert re.search(
        rf"on shapes_val; found: .*\n.*\n *star \| 42.0 \| {stars} \| {stars} \| 0 \| 0 \|", text
    )
    assert re.search(r"on shapes_train\n.*\n *ring \| 52.0 \| *\n", text)
    assert "Largest objects missed: shapes_val" in text


def run_of_two_cameras(folder: Path, evaluation: dict[str, Any], *opts: Any) -> tuple[Path, CocoDataset]:
    """A run, without detections yet, on images that share a base name."""
    data = builders.content(2)
    for number, image in enumerate(data["images"]):
        image["file_name"] = f"camera{number}/000003.png"
        path = folder / "data" / "images" / image["file_name"]
        path.parent.mkdir(parents=True)
        builders.picture().save(path)
    json_file, images = builders.write(folder / "data", data)
    keys = ["DATASETS.VAL_JSON", json_file, "DATASETS.VAL_IMAGES", images]
    run = write_run(folder / "run", [{"iteration": 39, **evaluation}], *keys, *opts)
    return run, load_coco_dataset((json_file, images))


def test_images_are_named_as_the_annotations_name_them(tmp_path: Path) -> None:
    run, dataset = run_of_two_cameras(tmp_path, {"bbox/AP": 40.0})
    (run / "inference").mkdir()
    (run / "inference" / RESULTS).write_text("[]")
    text, _ = page_of(run)
    assert "square: no detection there, camera0/000003.png" in text
    assert "square: no detection there, camera1/000003.png" in text
    assert str(dataset.metadata.image_root) not in text[text.index("Largest") : text.index("Skipped")]


@pytest.mark.parametrize("noted", [True, False])
def test_averaged_weights_are_those_whose_errors_are_shown(tmp_path: Path, noted: bool) -> None:
    evaluation = {"bbox/AP": 40.0, "averaged/bbox/AP": 42.0}
    run, dataset = run_of_two_cameras(tmp_path, evaluation, "SOLVER.AVERAGE.KIND", "ema")
    (run / "inference").mkdir()
    (run / "inference" / RESULTS).write_text("[]")
    text, _ = page_of(run)  # averaged ones are not there, or no longer
    assert "Classes, hardest first (trained weights)" in text
    assert "square | 40.0 | 2 | 0 | 2 | 0 |" in text
    weights = EvaluatedWeights(dataset.metadata.name, averaged=True, iteration=39) if noted else None
    write_detections(run / "averaged" / "inference" / RESULTS, dataset, weights)
    text, _ = page_of(run)
    assert "Classes, hardest first (averaged weights)" in text
    assert "square | 42.0 | 2 | 2 | 0 | 0 |" in text
    assert f"Largest objects missed (averaged weights{', iteration 39' if noted else ''})" in text
    assert f"with the highest scores (averaged weights{', iteration 39' if noted else ''})" in text
    assert "Objects found, missed and false positives are of" not in text


@pytest.mark.parametrize(
    ("of", "heading", "line"),
    [
        ({"iteration": 39}, "trained weights, iteration 39", ""),
        ({"iteration": 40}, "trained weights, iteration 40", ""),  # Detectron2's last
        ({"iteration": 19}, "trained weights, iteration 19", "iteration 19"),
        (
            {"file": "out/model_best.pth"},
            "model_best.pth",
            "out/model_best.pth, which was evaluated by itself",
        ),
        (
            {"file": "x/model_final_averaged.pth", "averaged": True},
            "averaged weights, model_final_averaged.pth",
            "x/model_final_averaged.pth, which was evaluated by itself",
        ),
    ],
)
def test_results_of_other_weights_are_called_so(
    tmp_path: Path, of: dict[str, Any], heading: str, line: str
) -> None:
    run, dataset = run_of_two_cameras(tmp_path, {"bbox/AP": 40.0})
    weights = EvaluatedWeights(dataset.metadata.name, **({"averaged": False} | of))
    write_detections(run / "inference" / RESULTS, dataset, weights)
    text, _ = page_of(run)
    assert f"Largest objects missed ({heading})" in text
    told = re.findall(r"are of (.*); the AP are of the run's last evaluation, at iteration 39\.", text)
    assert told == ([line] if line else [])


def test_results_on_another_set_are_refused(tmp_path: Path) -> None:
    run, dataset = run_of_two_cameras(tmp_path, {"bbox/AP": 40.0})
    other = EvaluatedWeights("night", averaged=False, file="model_final.pth")
    write_detections(run / "inference" / RESULTS, dataset, other)
    text, missing = page_of(run)
    assert len(missing) == 1
    assert f"the detections are on night, not on the run's {dataset.metadata.name}" in missing[0]
    assert "Largest objects missed" not in text


@pytest.mark.parametrize("content", ["", "[]", '{"dataset": 1, "averaged": 2}', '{"of": "x"}'])
def test_a_damaged_note_is_as_none(tmp_path: Path, content: str) -> None:
    run, dataset = run_of_two_cameras(tmp_path, {"bbox/AP": 40.0})
    write_detections(run / "inference" / RESULTS, dataset)
    (run / "inference" / "evaluated.json").write_text(content)
    assert read_evaluated(run).of == "trained weights"


def test_the_score_to_keep_is_recommended_told_and_written_down(tmp_path: Path) -> None:
    """A cat and two dogs: one dog is taken for a cat with a low score, the other is missed."""
    data = builders.content(3)
    data["categories"] = [{"id": 4, "name": "cat"}, {"id": 9, "name": "dog"}]
    boxes = [[5, 5, 20, 20], [5, 5, 20, 20], [30, 5, 20, 20]]
    data["annotations"] = [
        {"id": n + 1, "image_id": min(n, 1) + 1, "category_id": 4 if n == 0 else 9, "bbox": box,
         "area": 400, "iscrowd": 0} for n, box in enumerate(boxes)
    ]  # fmt: skip
    json_file, images = builders.write(tmp_path / "data", data)
    keys = ["DATASETS.VAL_JSON", json_file, "DATASETS.VAL_IMAGES", images, "SOLVER.AVERAGE.KIND", "''"]
    folder = write_run(tmp_path / "run", [{"iteration": 39, "bbox/AP": 40.0}], *keys)
    (folder / "inference").mkdir()
    detections = [
        {"image_id": 1, "category_id": 4, "bbox": boxes[0], "score": 0.9},
        {"image_id": 2, "category_id": 4, "bbox": boxes[1], "score": 0.3},
    ]
    (folder / "inference" / RESULTS).write_text(json.dumps(detections))
    text, _ = page_of(folder)
    # F1 of cats: 1 for 0.301 to 0.9, of dogs: 0.
    assert (
        "Recommended score: 0.6. Detections from it on have the highest F1, 0.500 averaged over classes."
        in text
    )
    assert "cat | 1 | 1.000 | 1.000 | 1.000 | 1.000 | 0.6 |" in text
    assert "dog | 2 | n/a | 0.000 | 0.000 | 0 | n/a |" in text
    assert "cat | 1 | 0 | 0 |" in text
    assert "dog | 0 | 0 | 2 |" in text
    assert "background | 0 | 0 | – |" in text
    assert "found: a box of IoU 0.5 with a score of 0.6 or more" in text
    note = folder / "inference" / "recommended_score.json"
    assert json.loads(note.read_text())["score"] == 0.6
    shown = write_run_report(folder, threshold=0.25, say=lambda line: None).read_text()
    assert "from 0.25 on, which the tables here are of, it is 0.333" in shown

    detections[0]["score"] = 0.25
    (folder / "inference" / RESULTS).write_text(json.dumps(detections[:1]))  # the note is not of these
    assert recommended_score(folder) == RecommendedScore(
        0.125, 0.5, (folder / "inference" / RESULTS).stat().st_size
    )
    Path(json_file).unlink()
    run_data._load.cache_clear()
    recommended = recommended_score(folder)  # the note is enough
    assert recommended is not None
    assert recommended.score == 0.125
