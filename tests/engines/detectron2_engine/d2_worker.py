"""One process of a run over several; run by test_two_processes.py, by itself or under torchrun.

python d2_worker.py DATA OUTPUT [PROCESSES of Detectron2's launch]
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase, launch
from detectron2.utils import comm

from tests.engines.detectron2_engine.d2_helpers import load_coco_dataset, rcnn_opts, register_checked_dataset
from zenith_det.data.synthetic import split_files
from zenith_det.engines.detectron2_engine import ZenithTrainer, load_config_file
from zenith_det.engines.detectron2_engine.config import to_detectron2
from zenith_det.engines.detectron2_engine.engine import join_machine
from zenith_det.training.processes.launching import launch as launch_ranks

# Nothing is drawn at random: every anchor and proposal counts, each image has as many, and none is flipped.
KEYS = {
    "DATASETS__TRAIN": "('worker_train',)",
    "DATASETS__TEST": "()",
    "DATALOADER__ASPECT_RATIO_GROUPING": False,
    "INPUT__RANDOM_FLIP": "none",
    "MODEL__RPN__BATCH_SIZE_PER_IMAGE": 8192,
    "MODEL__RPN__NMS_THRESH": 1.0,
    "MODEL__ROI_HEADS__BATCH_SIZE_PER_IMAGE": 4096,
    "MODEL__ROI_HEADS__PROPOSAL_APPEND_GT": False,
    "MODEL__ROI_HEADS__NUM_CLASSES": 6,
    "SOLVER__MAX_ITER": 5,
    "SOLVER__ZENITH__WINDOW": 1,
    "SOLVER__WARMUP_ITERS": 0,
    "SEED": 1,  # with some others the norm only grows, and the ratio stays 1
}


class Record(HookBase):
    """Losses as logged, and what ZENITH has on every process."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def after_step(self) -> None:
        ratios = comm.all_gather(self.trainer.optimizer.zenith_state()["ratio"])
        latest = self.trainer.storage.latest()
        losses = {name: latest[name][0] for name in latest if "loss" in name}
        self.lines.append({"ratios": ratios, **losses})


def register(data: str) -> None:
    """Images of one size: padding in a batch, which GroupNorm sees, would tell one process from two."""
    dataset = load_coco_dataset(tuple(map(str, split_files(data, "train", "instances"))))
    sizes = Counter((record["height"], record["width"]) for record in dataset.records)
    size = sizes.most_common(1)[0][0]
    records = [record for record in dataset.records if (record["height"], record["width"]) == size]
    assert len(records) >= 4
    register_checked_dataset("worker_train", replace(dataset, records=records))


def main(data: str, output: str) -> None:
    join_machine()
    register(data)
    cfg = to_detectron2(load_config_file("", rcnn_opts(OUTPUT_DIR=output, **KEYS)))
    trainer = ZenithTrainer(cfg)
    record = Record()
    trainer.register_hooks([record])
    trainer.train()
    if comm.is_main_process():
        Path(output, "record.json").write_text(json.dumps(record.lines))


if __name__ == "__main__":
    data, output, *processes = sys.argv[1:]
    if processes == ["torchrun"]:
        launch_ranks(main, args=(data, output))
    else:
        launch(main, int(processes[0]), dist_url="auto", args=(data, output))
