"""A run of the small R-CNN over several processes, resumed from what is in OUTPUT; run by test_two_processes.py.

python d2_resume_worker.py DATA OUTPUT PROCESSES ITERATIONS [KEY VALUE ...]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from d2_helpers import rcnn_opts, record_images
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from zenith_det.data import load_coco_dataset
from zenith_det.data.synthetic import split_files
from zenith_det.engines.detectron2_engine import ZenithTrainer, load_config_file, register_checked_dataset
from zenith_det.engines.detectron2_engine.run import join_machine, to_detectron2
from zenith_det.training import distributed


def main(data: str, output: str, iterations: str, keys: list[str]) -> None:
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


if __name__ == "__main__":
    data, output, processes, iterations, *keys = sys.argv[1:]
    distributed.launch(main, int(processes), args=(data, output, iterations, keys), device="cpu")
