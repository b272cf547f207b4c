"""The Detectron2 examples run, on the real Detectron2, and their READMEs say what they do."""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = pytest.mark.detectron2


def run(folder: str, *command: str, **environment: str) -> str:
    pytest.importorskip("detectron2.engine", reason="needs the real Detectron2: see docs/DETECTRON2.md")
    done = subprocess.run(
        [sys.executable, *command],
        cwd=EXAMPLES / folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


@pytest.mark.parametrize("script", ["before.py", "after.py"])
def test_existing_project(tmp_path: Path, script: str) -> None:
    printed = run("existing_project", script, "--output", str(tmp_path), "--iterations", "6")
    assert "copypaste: Task: bbox" in printed
    lines = metrics(tmp_path)
    assert any("bbox/AP" in line for line in lines)
    trained = next(line for line in lines if "total_loss" in line)
    assert ("zenith/ratio" in trained) == (script == "after.py")


def test_existing_project_with_an_optimizer_of_its_own(tmp_path: Path) -> None:
    printed = run("existing_project", "own_optimizer.py", "--output", str(tmp_path), "--iterations", "6")
    readme = (EXAMPLES / "existing_project" / "README.md").read_text()
    shown = re.search(r"^    (ZENITH's LR ratio is over .*)$", readme, re.M)
    assert shown is not None
    assert shown[1] in printed
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)["trainer"]["_trainer"]["optimizer"]
    groups = state["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    assert sorted({group["initial_lr"] for group in groups}) == pytest.approx([0.00005, 0.0005])
    assert state["param_groups"][0]["zenith"]["counts"][0] == 6
    assert "zenith/ratio" in next(line for line in metrics(tmp_path) if "total_loss" in line)


def test_existing_projects_readme_shows_the_difference() -> None:
    before, after = (
        (EXAMPLES / "existing_project" / f).read_text().splitlines() for f in ("before.py", "after.py")
    )
    shown = re.search(r"```diff\n(.*?)\n```", (EXAMPLES / "existing_project" / "README.md").read_text(), re.S)
    assert shown is not None
    difference = list(difflib.unified_diff(before, after, "before.py", "after.py", lineterm="", n=1))
    assert shown[1].splitlines() == difference
    changed = [line for line in difference if line[0] in "+-" and line.strip("+-")]
    assert len(changed) <= 14


def small_coco(folder: Path) -> None:
    """A generated set where Detectron2 looks for COCO, with all of COCO's categories declared."""
    from detectron2.data import MetadataCatalog

    from zenith_det.data.synthetic import generate

    meta = MetadataCatalog.get("coco_2017_train")
    original = {index: number for number, index in meta.thing_dataset_id_to_contiguous_id.items()}
    files = generate(folder / "made", train=6, val=2, size=64)
    (folder / "coco" / "annotations").mkdir(parents=True)
    for split, made in files.items():
        content = json.loads(Path(made.json_file).read_text())
        for annotation in content["annotations"]:
            annotation["category_id"] = original[annotation["category_id"] % 80]
        content["categories"] = [
            {"id": original[i], "name": name} for i, name in enumerate(meta.thing_classes)
        ]
        (folder / f"coco/annotations/instances_{split}2017.json").write_text(json.dumps(content))
        (folder / f"coco/{split}2017").symlink_to(made.image_root)


def test_lazyconfig(tmp_path: Path) -> None:
    pytest.importorskip("detectron2.engine", reason="needs the real Detectron2: see docs/DETECTRON2.md")
    small_coco(tmp_path)
    overrides = {
        "train.output_dir": tmp_path / "out",
        "train.device": "cpu",
        "train.init_checkpoint": "''",
        "train.max_iter": 4,
        "train.log_period": 2,
        "optimizer.window": 2,
        "optimizer.lr": 0.001,
        "lr_multiplier.warmup_iters": 1,
        "dataloader.train.total_batch_size": 1,
        "dataloader.train.num_workers": 0,
        "dataloader.test.num_workers": 0,
        "dataloader.train.mapper.augmentations.0.short_edge_length": "[64]",
        "dataloader.train.mapper.instance_mask_format": "bitmask",
        "dataloader.test.mapper.augmentations.0.short_edge_length": 64,
        # From scratch, frozen norms would let the activations explode.
        "model.backbone.bottom_up.stem.norm": "GN",
        "model.backbone.bottom_up.stages.norm": "GN",
        "model.proposal_generator.pre_nms_topk": "[50,50]",
        "model.proposal_generator.post_nms_topk": "[20,20]",
        "model.roi_heads.box_predictor.test_score_thresh": 0.0,
    }
    words = [f"{key}={value}" for key, value in overrides.items()]
    run(
        "lazyconfig", "train_net.py", "--config-file", "mask_rcnn_coco.py", "--num-gpus", "1", *words,
        DETECTRON2_DATASETS=str(tmp_path),
    )  # fmt: skip
    lines = metrics(tmp_path / "out")
    trained = [line for line in lines if "zenith/ratio" in line]
    assert [line["iteration"] for line in trained] == [1, 3]
    assert trained[1]["lr"] == pytest.approx(0.001 * trained[1]["zenith/ratio"], rel=1e-6)
    assert any("segm/AP" in line for line in lines)
    readme, script, config = (
        (EXAMPLES / "lazyconfig" / name).read_text()
        for name in ("README.md", "train_net.py", "mask_rcnn_coco.py")
    )
    for shown in re.findall(r"^(?:optimizer|lr_multiplier|from|    Zenith).*$", readme, re.M):
        assert shown in script or shown in config
