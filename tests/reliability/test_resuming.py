"""Resumed with something changed: what is applied is said and done, what can't be is refused or told."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reliability import runs


def table(printed: str) -> dict[str, tuple[str, str]]:
    """The rows of the table of changed keys: key -> (its values, what became of it)."""
    rows: dict[str, tuple[str, str]] = {}
    lines = iter(printed.splitlines())
    for line in lines:
        if line.endswith("changed since the checkpoint:"):
            next(lines)
            for row in lines:
                cells = re.split(r"  +", row.strip())
                if row.startswith("[") or len(cells) < 4:
                    break
                rows[cells[0]] = (f"{cells[1]} -> {cells[2]}", cells[3])
    return rows


@pytest.fixture(scope="module")
def begun(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of an engine that has ended after four iterations, made once."""
    folder = tmp_path_factory.mktemp("begun")

    def run(engine: str) -> Path:
        runs.need(engine)
        if not (output := folder / engine).exists():
            words = runs.arguments(engine, data, output, SOLVER__MAX_ITER=4, TEST__EVAL_PERIOD=0)
            code, printed = runs.run(words)
            assert code == 0, printed
        return output

    return run


def resumed(engine: str, data: Path, begun: Path, output: Path, **keys: Any) -> tuple[int, str]:
    """A copy of the four iterations, then the rest with other keys."""
    if not output.exists():
        shutil.copytree(begun, output)
    keys = {"SOLVER__MAX_ITER": 8, "TEST__EVAL_PERIOD": 0, **keys}
    return runs.run(runs.arguments(engine, data, output, resume=True, **keys))


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_changed_keys_are_told_and_honoured(
    engine: str, data: Path, begun: Callable[[str], Path], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    code, printed = resumed(
        engine, data, begun(engine), output, SOLVER__BASE_LR=0.04, SOLVER__WEIGHT_DECAY=0.001,
        SOLVER__IMS_PER_BATCH=4, SEED=8, SOLVER__ZENITH__WINDOW=3,
    )  # fmt: skip
    assert code == 0, printed
    rows = table(printed)
    assert rows["SOLVER.BASE_LR"] == ("0.02 -> 0.04", "applied")
    assert rows["SOLVER.WEIGHT_DECAY"][1] == "applied"
    assert rows["SOLVER.MAX_ITER"] == ("4 -> 8", "applied; 4 iterations to go")
    assert rows["SOLVER.ZENITH.WINDOW"] == ("5 -> 3", "applied; the newest 3 norms are kept")
    assert (
        rows["SEED"][1] == "can't be applied, because the order of the images goes on from the run's seed, 7"
    )
    changed = rows["SOLVER.IMS_PER_BATCH"][1]
    assert "BASE_LR is 0.04: the old one, scaled with the batch, would be 0.04" in changed
    assert "its window spans 12 images now, 10 before" in changed
    state = torch.load(output / "model_final.pth", weights_only=True)
    optimizer = state["optimizer"]
    assert optimizer["param_groups"][0]["initial_lr"] == 0.04
    assert max(group["weight_decay"] for group in optimizer["param_groups"]) == 0.001
    assert state["images_seen"] == 4 * 2 + 4 * 4
    # Norms of another batch size aren't comparable.
    assert "history starts again (2 images a batch before, 4 now)" in printed
    assert "ZENITH's history is kept" not in printed
    assert recorded(output) == 4


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_the_history_may_be_kept_with_another_batch_size(
    engine: str, data: Path, begun: Callable[[str], Path], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    keys = {"SOLVER__IMS_PER_BATCH": 4, "SOLVER__MAX_ITER": 6, "SOLVER__ZENITH__KEEP_HISTORY": True}
    code, printed = resumed(engine, data, begun(engine), output, **keys)
    assert code == 0, printed
    assert recorded(output) == 6
    assert "ZENITH's history is kept" in printed
    assert "history starts again" not in printed


def recorded(output: Path) -> int:
    """How many norms ZENITH has of the run."""
    optimizer = torch.load(output / "model_final.pth", weights_only=True)["optimizer"]
    return int(optimizer["param_groups"][0]["zenith"]["counts"][0])


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_another_optimizer_starts_its_state_anew_and_sgd_keeps_momentum(
    engine: str, data: Path, begun: Callable[[str], Path], tmp_path: Path
) -> None:
    start, output = begun(engine), tmp_path / "run"
    schedule = {"SOLVER__LR_SCHEDULER_NAME": "WarmupConstantLR"}
    keys = {"SOLVER__OPTIMIZER": "SGD", "SOLVER__MAX_ITER": 6, **schedule}
    code, printed = resumed(engine, data, start, output, **keys)
    assert code == 0, printed
    assert table(printed)["SOLVER.OPTIMIZER"][1] == "applied; momentum is kept"
    code, printed = resumed(
        engine, data, start, output, SOLVER__OPTIMIZER="AdamW", SOLVER__BASE_LR=0.0001, **schedule
    )
    assert code == 0, printed
    assert table(printed)["SOLVER.OPTIMIZER"][1] == "applied; the optimizer's state starts again"


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_twice_as_long_is_the_same_as_going_on(
    engine: str, data: Path, tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    whole = undisturbed(engine)
    code, printed = runs.run(runs.arguments(engine, data, tmp_path, SOLVER__MAX_ITER=12))
    assert code == 0, printed
    code, printed = runs.run(runs.arguments(engine, data, tmp_path, resume=True))
    assert code == 0, printed
    assert table(printed).keys() == {"SOLVER.MAX_ITER"}
    runs.assert_same_result(whole, tmp_path)


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_a_model_with_another_head_is_refused_by_the_names_of_its_tensors(
    engine: str, data: Path, begun: Callable[[str], Path], tmp_path: Path
) -> None:
    code, printed = resumed(engine, data, begun(engine), tmp_path / "run", MODEL__ROI_BOX_HEAD__FC_DIM=48)
    assert code == 2, printed
    assert "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "tensors have another shape" in line
    assert "box_predictor" in line or "box_head" in line
    assert "MODEL.WEIGHTS_ALLOW_MISMATCH True" in line


def test_weights_alone_are_no_run_to_resume(data: Path, tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(2)}}, tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    code, printed = runs.run(runs.arguments("torchvision", data, tmp_path, resume=True))
    assert code == 2, printed
    assert "not a checkpoint of a run: give it as MODEL.WEIGHTS instead" in printed


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_a_worse_evaluation_after_resuming_does_not_replace_the_best_model(
    engine: str, data: Path, tmp_path: Path
) -> None:
    runs.need(engine)
    output = tmp_path / "run"
    code, printed = runs.run(runs.arguments(engine, data, output, SOLVER__MAX_ITER=4))
    assert code == 0, printed
    best = torch.load(output / "model_best.pth", weights_only=True)
    assert best["best"]["metric"] == "averaged box AP"
    assert best["best"]["iteration"] == best["iteration"] == 3
    # As if it had been much better.
    best["best"]["value"] = 99.0
    torch.save(best, output / "model_best.pth")
    code, printed = runs.run(runs.arguments(engine, data, output, resume=True, SOLVER__MAX_ITER=8))
    assert code == 0, printed
    assert "the best so far is 99.000" in printed
    assert torch.load(output / "model_best.pth", weights_only=True)["best"]["value"] == 99.0


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_a_training_set_that_has_changed_is_told(
    engine: str, data: Path, begun: Callable[[str], Path], tmp_path: Path
) -> None:
    runs.need(engine)
    copy, output = shutil.copytree(data, tmp_path / "set"), tmp_path / "run"
    code, printed = resumed(engine, copy, begun(engine), output)
    assert code == 0, printed
    assert "the training set has changed" not in printed
    (file,) = (copy / "annotations").glob("*train*.json")
    content = json.loads(file.read_text())
    content["annotations"] = content["annotations"][1:]
    file.write_text(json.dumps(content))
    code, printed = resumed(engine, copy, output, output, SOLVER__MAX_ITER=9)
    assert code == 0, printed
    assert "the training set has changed since the checkpoint (" in printed
