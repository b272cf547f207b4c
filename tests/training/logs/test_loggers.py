"""Weights & Biases and MLflow without a network, where they are installed."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from zenith_det.config import get_cfg, load_config
from zenith_det.errors import ConfigError
from zenith_det.training.logs.events import EventStorage
from zenith_det.training.logs.loggers import ServiceWriter, build_loggers


def config(*names: str) -> object:
    cfg = get_cfg()
    cfg.LOGGERS = names
    return cfg


def put(storage: EventStorage, iteration: int, **scalars: float) -> None:
    storage.iter = iteration
    storage.put_scalars(smoothing=False, **scalars)


def log_twice(folder: Path, name: str) -> None:
    """A run that is resumed: iterations 19 to 59, with 39 written by both."""
    for first in (19, 39):
        (writer,) = build_loggers(config(name), folder)
        storage = EventStorage()
        for iteration in (first, first + 20):
            put(storage, iteration, **{"total_loss": 5.0 - iteration / 20, "bbox/AP": float("nan")})
            writer.write(storage)
        writer.close()


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=f"pip install {name}"):
            build_loggers(config(name), tmp_path)


def test_other_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="'wandb' and 'mlflow'"):
        load_config(None, ["LOGGERS", "('comet',)"])
    assert load_config(None, ["LOGGERS", "('mlflow',)"]).cfg.LOGGERS == ("mlflow",)


def test_a_service_that_fails_does_not_end_a_training(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def fail(scalars: dict[str, float], at: int) -> None:
        calls.append(at)
        raise ConnectionError("the server\nis gone")

    writer = ServiceWriter("wandb", fail, lambda: None)
    storage = EventStorage()
    with caplog.at_level(logging.WARNING):
        for iteration in (1, 2, 3):
            put(storage, iteration, total_loss=1.0)
            writer.write(storage)
    writer.close()
    assert calls == [1]
    assert [record.getMessage() for record in caplog.records] == [
        "wandb: the server is gone: nothing more is sent there; metrics.json has it all"
    ]


def test_mlflow_on_disk_goes_on_as_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs MLflow: pip install mlflow")
    pytest.importorskip("sqlalchemy", reason="needs MLflow with its database: pip install mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "run").mkdir()
    log_twice(tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("zenith_det").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["SOLVER.OPTIMIZER"] == "ZENITH"
    history = client.get_metric_history(run.info.run_id, "total_loss")
    assert sorted({(point.step, point.value) for point in history}) == [(19, 4.05), (39, 3.05), (59, 2.05)]
    assert "bbox/AP" not in run.data.metrics


def test_wandb_offline_goes_on_as_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="needs Weights & Biases: pip install wandb")
    for variable in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key from there
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run"
    folder.mkdir()
    log_twice(folder, "wandb")
    wandb.teardown()  # as at a process's end: its service has written all
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    identity = (folder / "wandb_run_id").read_text()
    assert all(identity in path.name for path in files)
    assert all(path.stat().st_size > 500 for path in files)
