"""Turn a checkpoint of one engine into the other's, without loss; also torchvision's and the model zoo's."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from zenith_det import cli
from zenith_det.config import CfgNode, follow_dataset, load_config
from zenith_det.data import DatasetMetadata
from zenith_det.engines.torchvision_engine import conversion
from zenith_det.engines.torchvision_engine.rcnn import build_model
from zenith_det.engines.torchvision_engine.weights import to_our_names
from zenith_det.errors import CheckpointError, UserError
from zenith_det.training.checkpoints.checkpoint import Checkpointer
from zenith_det.training.checkpoints.reading import load_checkpoint
from zenith_det.training.checkpoints.weights import load_model_weights, read_weights


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.parser("convert-checkpoint", __doc__)
    parser.add_argument(
        "input", help="a checkpoint (.pth), a model-zoo file (.pkl), detectron2://… or https://…"
    )
    parser.add_argument("output", type=Path, help="the checkpoint to write, ending in .pth")
    parser.add_argument("--to", required=True, choices=("detectron2", "torchvision"), help="whose names")
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="the model's config, checked against the weights"
    )
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="config keys to override")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Read, convert, check against the model that the config describes, write."""
    args = cli.parse_arguments(argument_parser(), argv)
    if args.output.suffix != ".pth":
        raise UserError(f"{args.output}: the name must end in .pth")
    loaded = load_config(args.config_file, args.opts)
    cfg = loaded.cfg
    cfg.MODEL.DEVICE = "cpu"
    facts = _facts(args.input)
    dataset = facts.get("dataset", {})
    if dataset:
        keypoints = len(dataset.get("keypoint_names", ()))
        follow_dataset(loaded, args.input, len(dataset["thing_classes"]), keypoints)
    weights = convert(cfg, args.input, args.to)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": weights, **facts}
    if args.to == "detectron2":
        state["__author__"] = "zenith_det"
    Checkpointer(args.output.parent).save(args.output.stem, state, mark_last=False)
    print(f"{args.output}: {len(weights)} tensors under {args.to}'s names")
    return 0


def convert(cfg: CfgNode, name: str, to: str) -> dict[str, torch.Tensor]:
    """The weights ``name`` under the names of the engine ``to``.

    Raises:
        CheckpointError: they don't fill the model that ``cfg`` describes.
    """
    tensors = to_our_names(cfg, read_weights(name))
    model = build_model(cfg)
    own = model.state_dict()
    tensors = {k: v for k, v in tensors.items() if k in own or not k.endswith("num_batches_tracked")}
    report = load_model_weights(model, tensors, source=name, require_all=True)
    if report.unexpected:
        raise CheckpointError(
            f"{name}: the config's model has no place for {', '.join(report.unexpected[:3])}: give the config "
            "that these weights were trained with"
        )
    if to == "torchvision":
        return tensors
    return conversion.to_detectron2(tensors, conversion.lowest_level(cfg))


def _facts(name: str) -> dict[str, Any]:
    """What a checkpoint of ours says of its classes; nothing of the optimizer fits the other engine."""
    path = Path(name)
    if path.suffix != ".pth" or not path.is_file():
        return {}
    state = load_checkpoint(path)
    return {"dataset": state["dataset"]} if DatasetMetadata.from_dict(state.get("dataset")) else {}
