"""``--tune-share``: learning rates are chosen on images that are neither trained on nor reported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, SmallSet
from zenith_det.commands import compare
from zenith_det.comparing.plan import Run
from zenith_det.comparing.runner import Result
from zenith_det.errors import ConfigError

CONFIG = str(ROOT / "configs" / "quickstart" / "mask_rcnn_zenith.yaml")


class Runs:
    """In place of the runner: leaves at once what runs leave, with an AP that is highest where it is told."""

    planned: list[Run]

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def carry_out(self, runs: Sequence[Run]) -> None:
        for run in runs:
            self.planned.append(run)
            # On the held-out images 0.04 is best; on the reported ones it would be the lowest.
            ap = 50 - abs(run.lr - 0.04) if "tuning" in run.folder.parts else 10 / run.lr
            run.folder.mkdir(parents=True, exist_ok=True)
            Result("ok", run.fingerprint, []).save(run.folder)
            lines = [{"iteration": 9, "total_loss": 1.0, "time": 0.1}, {"iteration": 9, "bbox/AP": ap}]
            (run.folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


def images_of(run: Run, part: str) -> set[int]:
    content = json.loads(Path(run.keys[f"DATASETS.{part}_JSON"]).read_text())
    return {image["id"] for image in content["images"]}


def test_learning_rates_are_chosen_on_images_of_their_own(
    shapes: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "Runner", Runs)
    monkeypatch.setattr(Runs, "planned", [], raising=False)
    command = [
        "--config-file", CONFIG, *shapes.flags, "--output", str(tmp_path), "--arms", "zenith", "zenith_auto_lr",
        "sgd_cosine", "--seeds", "3", "4", "--lrs", "zenith=0.01,0.04", "--lr-scales", "1", "2", "4",
        "--tune-share", "0.25", "SOLVER.MAX_ITER", "10",
    ]  # fmt: skip
    assert compare.main(command) == 0
    tries = [run for run in Runs.planned if "tuning" in run.folder.parts]
    reported = [run for run in Runs.planned if run not in tries]
    # The range test chooses its own: it has no tries.
    assert [(run.arm.name, run.lr, run.seed) for run in tries] == [
        ("zenith", 0.01, 3), ("zenith", 0.04, 3), ("sgd_cosine", 0.02, 3), ("sgd_cosine", 0.04, 3),
        ("sgd_cosine", 0.08, 3),
    ]  # fmt: skip
    assert [(run.arm.name, run.lr, run.seed) for run in reported] == [
        (arm, lr, seed)
        for seed in (3, 4)
        for arm, lr in (("zenith", 0.04), ("zenith_auto_lr", 0.02), ("sgd_cosine", 0.04))
    ]
    (whole,) = {frozenset(images_of(run, "TRAIN")) for run in reported}
    held_out = images_of(tries[0], "VAL")
    assert images_of(tries[0], "TRAIN") == whole - held_out
    assert len(held_out) == round(0.25 * len(whole))
    assert {run.keys["DATASETS.VAL_JSON"] for run in reported} == {shapes.val[0]}
    said = "chosen with seed 3 on 25% of the training images"
    assert f"eta0: {said}" in capsys.readouterr().out
    assert said in (tmp_path / "compare.html").read_text()


def test_a_mistake_is_told_before_the_tries(shapes: SmallSet, tmp_path: Path) -> None:
    command = ["--config-file", CONFIG, *shapes.flags, "--output", str(tmp_path), "--arms", "zenith"]
    command += ["--tune-share", "0.25"]
    with pytest.raises(ConfigError, match="every arm has one learning rate: give more with --lrs"):
        compare.main(command)
    with pytest.raises(ConfigError, match="--lrs sgd=…: no such arm among --arms"):
        compare.main([*command, "--lrs", "sgd=0.1,0.2", "zenith=0.1,0.2"])
    assert not (tmp_path / "tuning").exists()
