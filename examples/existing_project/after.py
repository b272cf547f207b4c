"""A Detectron2 project: its own data, its own trainer, ZENITH without a schedule."""

from __future__ import annotations

import argparse
from pathlib import Path

import discs
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer, default_setup
from detectron2.evaluation import COCOEvaluator

from zenith_det.config import add_zenith_config
from zenith_det.engines.detectron2_engine import ZenithTrainerMixin


class Trainer(ZenithTrainerMixin, DefaultTrainer):
    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        return COCOEvaluator(dataset_name, output_dir=f"{cfg.OUTPUT_DIR}/inference")


def make_config(args: argparse.Namespace) -> CfgNode:
    cfg = get_cfg()
    add_zenith_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"))
    cfg.merge_from_file(str(Path(__file__).with_name("project.yaml")))
    cfg.SOLVER.MAX_ITER = args.iterations
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupZenithLR"
    cfg.OUTPUT_DIR = args.output
    return cfg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="output")
    parser.add_argument("--iterations", type=int, default=300)
    args = parser.parse_args()
    discs.register(f"{args.output}/data")
    cfg = make_config(args)
    default_setup(cfg, args)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()


if __name__ == "__main__":
    main()
