"""A folder that holds a run: a command that ends in a mistake changes nothing of it, a new run replaces none of it."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.reliability import runs
from tests.reliability.kill_runs import at_call, before_call, exit_code, fork
from zenith_det.training.course.earlier_run import give_way, undo_unfinished_move
from zenith_det.training.course.run_record import announce_run

MODELS = ("model_final.pth", "model_final_averaged.pth")


def files(folder: Path) -> dict[str, bytes]:
    """What is of the folder's run."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
        and p.name != "log.txt"
        and not p.relative_to(folder).parts[0].startswith("earlier_run_")
    }


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_a_mistake_changes_nothing_and_a_new_run_moves_it_aside(
    engine: str, data: Path, tmp_path: Path
) -> None:
    runs.need(engine)
    few = {"SOLVER__MAX_ITER": 4, "TEST__EVAL_PERIOD": 0, "SOLVER__AVERAGE__KIND": "tail"}
    code, printed = runs.run(runs.arguments(engine, data, tmp_path, **few))
    assert code == 0, printed
    first = files(tmp_path)
    assert {*MODELS, "config.yaml", "last_checkpoint", "datasets.json", "metrics.json", "run_id"} <= set(
        first
    )
    assert "run.lock" not in first

    code, printed = runs.run(
        runs.arguments(engine, data, tmp_path, **few, MODEL__WEIGHTS="nowhere.pth", SEED=8)
    )
    assert code == 2, printed
    assert files(tmp_path) == first
    wider = {**few, "MODEL__ROI_BOX_HEAD__FC_DIM": 48, "SOLVER__MAX_ITER": 6}
    code, printed = runs.run(runs.arguments(engine, data, tmp_path, resume=True, **wider))
    assert code == 2, printed
    assert files(tmp_path) == first

    # Killed when all is ready to train.
    code, printed = runs.run(runs.arguments(engine, data, tmp_path, **few, SEED=8), {"kill_at": "give_way"})
    assert code == -signal.SIGKILL, printed
    left = files(tmp_path)
    assert {name for name in left if left[name] != first.get(name)} == {"run.lock", "run_id.pending"}

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


def test_what_the_folder_remembers_goes_aside_whole_or_not_at_all(tmp_path: Path) -> None:
    """Killed before any of the renames, the earlier run is where it was, or aside."""
    of_the_run = {
        "model_0000003.pth", "model_final.pth", "last_checkpoint", "config.yaml", "run_id", "metrics.json",
        "events.out.tfevents.1.host", "wandb_run_id", "mlflow_run_id", "inference/evaluated.json", "curves.png",
    }  # fmt: skip
    for kill_at in range(1, 20):
        folder = tmp_path / str(kill_at)
        for name in (*of_the_run, "notes.txt"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
        announce_run(folder)
        child = fork(lambda folder=folder, kill_at=kill_at: killed_while_it_gives_way(folder, kill_at))
        code = exit_code(child)
        undo_unfinished_move(folder)
        where = folder / "earlier_run_1" if (folder / "earlier_run_1").exists() else folder
        assert {*files(where)} - {"notes.txt", "run_id.pending"} == of_the_run
        assert (folder / "notes.txt").exists()
        assert not list(folder.glob("*.moving"))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert kill_at > len({name.split("/")[0] for name in of_the_run})
    assert {*files(folder)} == {"notes.txt", "run_id"}


def killed_while_it_gives_way(folder: Path, call: int) -> None:
    before_call(os, "replace", at_call(call))
    give_way(folder)
