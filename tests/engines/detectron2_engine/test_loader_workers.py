"""Loader workers and the signals that end a run."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import time
from pathlib import Path

import pytest

pytest.importorskip("detectron2.engine", reason="needs the real Detectron2: see docs/DETECTRON2.md")

from tests.engines.detectron2_engine.d2_helpers import forget, rcnn_cfg, register_synthetic, synthetic_set
from zenith_det.engines.detectron2_engine.data import build_test_loader
from zenith_det.engines.detectron2_engine.exact_resume import TrainLoader

pytestmark = pytest.mark.detectron2


@pytest.mark.parametrize("loader", ["train", "test"])
def test_workers_live_through_signals_that_stop_the_main_process(tmp_path: Path, loader: str) -> None:
    files = synthetic_set(tmp_path, train=12, val=12)
    register_synthetic("signals", files["val"])
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    try:
        cfg = rcnn_cfg(tmp_path, "signals", DATALOADER__NUM_WORKERS=2)
        made = TrainLoader(cfg) if loader == "train" else build_test_loader(cfg, "signals")
        stream = iter(made)
        next(stream), next(stream)
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        for worker in workers:
            for name in ("INT", "TERM", "USR1"):
                # By another process: the loader's own may end its workers.
                subprocess.run(["kill", "-s", name, str(worker.pid)], check=True)
        time.sleep(0.2)
        assert all(worker.is_alive() for worker in workers)
        for _ in range(8):
            assert next(stream)
        after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
        assert after == before
    finally:
        forget("signals")
