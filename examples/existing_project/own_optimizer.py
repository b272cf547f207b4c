"""The project with an optimizer of its own, as most have one: ZENITH goes over it, and it stays what it is."""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import after
import discs
import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.solver import get_default_optimizer_params


class ClippedAdamW(torch.optim.AdamW):
    """Clips the norm of the whole gradient, as Mask2Former and its like do."""

    def step(self, closure: Any = None) -> None:
        everything = itertools.chain(*[group["params"] for group in self.param_groups])
        torch.nn.utils.clip_grad_norm_(everything, max_norm=1.0)
        super().step(closure)


class Trainer(after.Trainer):
    """The mix-in is among its bases; nothing else tells of ZENITH."""

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        groups = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay_norm=0.0,
            lr_factor_func=lambda name: 0.1 if name.startswith("backbone") else 1.0,
        )
        return ClippedAdamW(groups, cfg.SOLVER.BASE_LR, weight_decay=0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="output")
    parser.add_argument("--iterations", type=int, default=300)
    args = parser.parse_args()
    discs.register(f"{args.output}/data")
    cfg = after.make_config(args)
    cfg.SOLVER.OPTIMIZER = "ADAMW"  # the project's own key and value: ZENITH's part reads neither
    cfg.SOLVER.BASE_LR = 0.0005
    default_setup(cfg, args)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()


if __name__ == "__main__":
    main()
