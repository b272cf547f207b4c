"""Every evaluation is in every writer once, even if a run is stopped in between; a new run has its own record."""

from __future__ import annotations

import functools
import importlib.util
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.reliability import runs
from tests.reliability.kill_runs import evaluations_of

#: Where LOGGERS send scalars, as far as they are installed.
SERVICES = tuple(
    name for name, database in (("mlflow", "sqlalchemy"), ("wandb", "wandb"))
    if importlib.util.find_spec(name) and importlib.util.find_spec(database)
)  # fmt: skip
#: After iterations 2, 5 and 7 of 8, none of them a writing period's end but the last.
EVALUATED = [2, 5, 7]


@pytest.fixture(scope="module")
def runs_of(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a run that was stopped and resumed, and another then begun in it."""

    @functools.cache
    def made(engine: str) -> Path:
        runs.need(engine)
        output: Path = tmp_path_factory.mktemp(engine) / "run"
        few = {
            "SOLVER__MAX_ITER": 8, "TEST__EVAL_PERIOD": 3, "SOLVER__AVERAGE__KIND": "''", "CHECKPOINT__BEST": "''",
            "LOGGERS": SERVICES,
        }  # fmt: skip
        code, printed = runs.run(
            runs.arguments(engine, data, output, **few), {"kill": {3: int(signal.SIGTERM)}}
        )
        assert code == 75, printed
        code, printed = runs.run(runs.arguments(engine, data, output, resume=True, **few))
        assert code == 0, printed
        anew = {**few, "SOLVER__MAX_ITER": 2, "SEED": 8}
        code, printed = runs.run(runs.arguments(engine, data, output, **anew))
        assert code == 0, printed
        return output

    return made


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_metrics_and_tensorboard_have_each_evaluation_once(engine: str, runs_of: Any) -> None:
    output = runs_of(engine)
    for folder, iterations in ((output / "earlier_run_1", EVALUATED), (output, [1])):
        for scalars in evaluations_of(folder).values():
            assert sorted(at for name, at, _ in scalars if name == "bbox/AP") == iterations
            assert sorted(at for name, at, _ in scalars if name == "segm/AP75") == iterations


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_mlflow_has_each_evaluation_once_in_the_record_of_its_run(engine: str, runs_of: Any) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs MLflow: pip install mlflow")
    pytest.importorskip("sqlalchemy", reason="needs MLflow with its database: pip install mlflow")
    output = runs_of(engine)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{output / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("zenith_det").experiment_id])
    ids = [(folder / "mlflow_run_id").read_text() for folder in (output / "earlier_run_1", output)]
    assert {run.info.run_id for run in found} == set(ids)
    for run_id, iterations in zip(ids, (EVALUATED, [1])):
        for name in ("bbox/AP", "segm/AP75"):
            assert [point.step for point in client.get_metric_history(run_id, name)] == iterations


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_wandb_has_each_evaluation_once_in_the_record_of_its_run(engine: str, runs_of: Any) -> None:
    pytest.importorskip("wandb", reason="needs Weights & Biases: pip install wandb")
    output = runs_of(engine)
    for folder, iterations in ((output / "earlier_run_1", EVALUATED), (output, [1])):
        identity = (folder / "wandb_run_id").read_text()
        # A file for each process that wrote to the record.
        files = sorted(output.glob(f"wandb/offline-run-*/run-{identity}.wandb"))
        assert len(files) == (2 if iterations == EVALUATED else 1)
        rows = [row for file in files for row in wandb_rows(file)]
        assert [row["iteration"] for row in rows if "bbox/AP" in row] == iterations


def wandb_rows(path: Path) -> list[dict[str, Any]]:
    """What was logged, from an offline file: records in blocks of 32 KiB, as in LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    at, part, rows = 7, b"", []  # after the file's header
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        part += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record.FromString(part)
            part = b""
            if record.WhichOneof("record_type") == "history":
                rows.append(
                    {(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
                )
    return rows
