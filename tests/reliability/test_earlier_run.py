"""A folder that holds a run: a command that ends in a mistake changes nothing of it, a new run replaces none of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.reliability import runs

MODELS = ("model_final.pth", "model_final_averaged.pth")


def files(folder: Path) -> dict[str, bytes]:
    """What the folder's run is gone on with, and evaluated from."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".pth" or p.name in (
        "config.yaml", "last_checkpoint")}  # fmt: skip


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_a_mistake_changes_nothing_and_a_new_run_moves_it_aside(
    engine: str, data: Path, tmp_path: Path
) -> None:
    runs.need(engine)
    few = {"SOLVER__MAX_ITER": 4, "TEST__EVAL_PERIOD": 0, "SOLVER__AVERAGE__KIND": "tail"}
    code, printed = runs.run(runs.arguments(engine, data, tmp_path, **few))
    assert code == 0, printed
    first = files(tmp_path)
    assert {*MODELS, "config.yaml", "last_checkpoint"} <= set(first)

    code, printed = runs.run(
        runs.arguments(engine, data, tmp_path, **few, MODEL__WEIGHTS="nowhere.pth", SEED=8)
    )
    assert code == 2, printed
    assert files(tmp_path) == first
    wider = {**few, "MODEL__ROI_BOX_HEAD__FC_DIM": 48, "SOLVER__MAX_ITER": 6}
    code, printed = runs.run(runs.arguments(engine, data, tmp_path, resume=True, **wider))
    assert code == 2, printed
    assert files(tmp_path) == first

    code, printed = runs.run(runs.arguments(engine, data, tmp_path, **few, SEED=8))
    assert code == 0, printed
    aside = tmp_path / "earlier_run_1"
    told = (
        rf"held an earlier run, which --resume would have gone on with: its \d checkpoints are in {aside} now"
    )
    assert re.search(told, printed)
    assert files(aside) == first
    second = files(tmp_path)
    assert second["model_final.pth"] != first["model_final.pth"]
    assert b"SEED: 8" in second["config.yaml"]

    # From its weights, in its place.
    weights = tmp_path / "model_final.pth"
    code, printed = runs.run(
        runs.arguments(engine, data, tmp_path, **few, MODEL__WEIGHTS=str(weights), SEED=9)
    )
    assert code == 0, printed
    assert files(tmp_path / "earlier_run_2") == second
    # Going on moves nothing.
    code, printed = runs.run(
        runs.arguments(engine, data, tmp_path, resume=True, **{**few, "SOLVER__MAX_ITER": 5})
    )
    assert code == 0, printed
    assert not (tmp_path / "earlier_run_3").exists()
