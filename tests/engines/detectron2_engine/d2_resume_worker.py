"""Runs of the small R-CNN, one after the other, each resumed from what is in its folder; run by test_two_processes.py.

python d2_resume_worker.py DATA RUNS

RUNS is a JSON list of objects with ``"output"``, ``"copy"`` (a folder to begin with a copy of), ``"processes"``,
``"iterations"`` and ``"keys"``. The processes of each are forked from this one, after its imports.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from tests.engines.detectron2_engine.d2_helpers import rcnn_opts, record_images
from tests.reliability.kill_runs import exit_code, fork
from tests.reliability.ranks import ranks
from zenith_det.data import load_coco_dataset
from zenith_det.data.synthetic import split_files
from zenith_det.engines.detectron2_engine import ZenithTrainer, load_config_file, register_checked_dataset
from zenith_det.engines.detectron2_engine.config import to_detectron2
from zenith_det.engines.detectron2_engine.engine import join_machine
from zenith_det.training.processes.launching import launch as launch_ranks


def main(data: str, output: str, iterations: int, keys: list[str]) -> None:
    join_machine()
    seed_all_rng(os.getpid())  # no two processes draw the same by themselves
    files = split_files(data, "train", "instances")
    register_checked_dataset("worker_train", load_coco_dataset(tuple(map(str, files))))
    opts = rcnn_opts(
        DATASETS__TRAIN="('worker_train',)",
        DATASETS__TEST="()",
        MODEL__ROI_HEADS__NUM_CLASSES=6,
        INPUT__MIN_SIZE_TRAIN=(48, 64, 80),
        SOLVER__MAX_ITER=iterations,
        OUTPUT_DIR=output,
    )
    trainer = ZenithTrainer(to_detectron2(load_config_file("", [*opts, *keys])))
    trainer.resume_or_load(resume=True)
    seen = record_images(trainer)
    trainer.train()
    by_rank = comm.all_gather(seen)
    if comm.is_main_process():
        Path(output, "seen.json").write_text(json.dumps(by_rank))


def run(data: str, wanted: dict[str, Any]) -> None:
    output = wanted["output"]
    if wanted["copy"]:
        shutil.copytree(wanted["copy"], output)
    Path(output).mkdir(exist_ok=True)
    args = (data, output, wanted["iterations"], wanted["keys"])
    code = exit_code(
        fork(lambda: ranks(wanted["processes"], lambda: launch_ranks(main, args=args, device="cpu")))
    )
    if code:
        raise SystemExit(f"the run in {output} ended with {code}")


if __name__ == "__main__":
    for wanted in json.loads(sys.argv[2]):
        run(sys.argv[1], wanted)
