"""Weights & Biases and MLflow: the scalars of ``metrics.json``, for those who watch their runs there.

Both are optional packages, and both work without a network: Weights & Biases is used offline where it has no key
(``wandb sync`` uploads later), MLflow writes into ``OUTPUT_DIR/mlflow.db`` unless ``MLFLOW_TRACKING_URI`` says
otherwise. A service that fails while training goes on is told once, and left alone.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zenith_det.config.keys import leaves
from zenith_det.errors import ConfigError, one_line
from zenith_det.files import write_whole
from zenith_det.training.logs.events import EventStorage, NewScalars

logger = logging.getLogger(__name__)

#: Names in LOGGERS, and the packages they need.
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}
PROJECT = "zenith_det"
#: The run's id at each service, in ``OUTPUT_DIR``: a resumed run goes on there.
ID_FILES = _WANDB_ID, _MLFLOW_ID = "wandb_run_id", "mlflow_run_id"


def check_loggers(cfg: Any) -> None:
    """See that the packages are there which ``LOGGERS`` needs.

    Raises:
        ConfigError: one is missing.
    """
    for name in cfg.LOGGERS:
        _import(name)


def build_loggers(cfg: Any, output_dir: str | os.PathLike[str]) -> list[ServiceWriter]:
    """The writers that ``LOGGERS`` names, in this order; on the main process alone.

    Raises:
        ConfigError: a package that is missing, or a service that can't be started; the line says what to do.
    """
    makers = {"wandb": _wandb, "mlflow": _mlflow}
    return [ServiceWriter(name, *makers[name](cfg, Path(output_dir))) for name in cfg.LOGGERS]


class ServiceWriter:
    """Sends new scalars to a service; see :class:`zenith_det.training.logs.events.Writer`.

    Args:
        name: of the service, for messages.
        send: takes the scalars of an iteration.
        finish: ends the run there.
    """

    def __init__(
        self, name: str, send: Callable[[dict[str, float], int], None], finish: Callable[[], None]
    ) -> None:
        self._name, self._send, self._finish = name, send, finish
        self._new = NewScalars()
        self._failed = False

    def write(self, storage: EventStorage) -> None:
        """Send the scalars not sent yet, each at its own iteration."""
        for at, scalars in self._new.take(storage).items():
            finite = {name: value for name, value in scalars.items() if math.isfinite(value)}
            self._try(lambda finite=finite, at=at: self._send(finite, at))  # type: ignore[misc]

    def close(self) -> None:
        """End the run there; what it did not send yet is sent."""
        self._try(self._finish)

    def _try(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:  # a service's own errors are of any class; none may end a training
            self._failed = True
            logger.warning(
                "%s: %s: nothing more is sent there; metrics.json has it all",
                self._name,
                one_line(str(error)),
            )


def _import(name: str) -> Any:
    try:
        return importlib.import_module(PACKAGES[name])
    except ImportError as error:
        raise ConfigError(
            f"LOGGERS has {name!r}, which needs the package {PACKAGES[name]} ({one_line(str(error))}): "
            f"pip install {PACKAGES[name]}"
        ) from error


def _known(path: Path) -> str | None:
    """The id that an earlier attempt at this run got from a service."""
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _wandb(cfg: Any, output_dir: Path) -> tuple[Callable[[dict[str, float], int], None], Callable[[], None]]:
    wandb = _import("wandb")
    mode = os.environ.get("WANDB_MODE")
    if mode is None and not _has_key(wandb):
        mode = "offline"  # it would ask for a key on the terminal, and a job has none
        logger.info("wandb: no key is set (wandb login): written offline, below %s/wandb", output_dir)
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=output_dir.resolve().name,
            dir=str(output_dir),
            id=_known(output_dir / _WANDB_ID),
            resume="allow",
            mode=mode,
            config=_flat(cfg),
        )
        write_whole(output_dir / _WANDB_ID, run.id)
        # A resumed run writes again what came after its checkpoint: on an axis of its own it may.
        run.define_metric("iteration")
        run.define_metric("*", step_metric="iteration")
    except Exception as error:
        raise ConfigError(
            f"LOGGERS has 'wandb', which can't be started: {one_line(str(error))}; WANDB_MODE=offline needs no network"
        ) from error
    return lambda scalars, at: run.log({**scalars, "iteration": at}), run.finish


def _has_key(wandb: Any) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        try:
            return bool(wandb.login(prompt=False, verify=False))
        except TypeError:  # an older version: it has no "prompt", and would ask
            return bool(wandb.api.api_key)
    except Exception:  # asking must not fail where it can't be told
        return False


def _mlflow(cfg: Any, output_dir: Path) -> tuple[Callable[[dict[str, float], int], None], Callable[[], None]]:
    mlflow = _import("mlflow")
    # Its newer versions refuse to write plain files.
    own = f"sqlite:///{output_dir.resolve() / 'mlflow.db'}"
    uri = os.environ.get("MLFLOW_TRACKING_URI") or own
    # By default it would make a folder for files, of which there are none, where the command was started.
    place = f"file:{output_dir.resolve() / 'mlflow_artifacts'}" if uri == own else None
    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name, place)
        run_id = _known(output_dir / _MLFLOW_ID)
        if run_id is None:
            run_id = client.create_run(experiment_id, run_name=output_dir.resolve().name).info.run_id
            write_whole(output_dir / _MLFLOW_ID, run_id)
            for key, value in _flat(cfg).items():
                client.log_param(run_id, key, str(value)[:500])
        else:
            client.update_run(run_id, status="RUNNING")
    except Exception as error:
        raise ConfigError(
            f"LOGGERS has 'mlflow', which can't be started at {uri}: {one_line(str(error))}"
        ) from error

    def send(scalars: dict[str, float], at: int) -> None:
        for key, value in scalars.items():
            client.log_metric(run_id, key, value, step=at)

    return send, lambda: client.set_terminated(run_id)


def _flat(cfg: Any) -> dict[str, Any]:
    """Every key of a configuration, dotted, with plain values."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in leaves(cfg)}
