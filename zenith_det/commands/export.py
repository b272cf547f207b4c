"""Write a trained model as one file that runs without PyTorch and without this toolkit.

    %(prog)s output/mine                                     # output/mine/model.onnx
    %(prog)s output/mine/model_best.pth --output best.onnx --images photos/
    %(prog)s --config-file mask_rcnn_zenith.yaml --images photos/ MODEL.WEIGHTS model.pth

The models are those of the built-in engine; weights that Detectron2 trained are converted. The file is compared with
the model on real images before it is kept: those of the run's validation set, or --images. docs/EXPORT.md says what is
in it and how to run it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from zenith_det import cli
from zenith_det.commands.model_arguments import add_model_flags, parse_model_arguments
from zenith_det.config import CfgNode
from zenith_det.data.statistics import STATISTICS_FILE, read_statistics
from zenith_det.errors import UserError
from zenith_det.files import write_whole
from zenith_det.predicting.image_sources import collect
from zenith_det.predicting.predictor import Predictor
from zenith_det.training.logs.logging_setup import setup_logging


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.parser("export", __doc__)
    add_model_flags(parser)
    parser.add_argument("--format", choices=("onnx",), default="onnx", help="default %(default)s")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: model.onnx in the run's folder")
    parser.add_argument(
        "--images",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="to compare on: images or folders (default: the run's validation images)",
    )
    parser.add_argument(
        "--compare", type=int, default=8, metavar="N", help="on so many of them (default %(default)s)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Load, export, compare, write."""
    args = parse_model_arguments(argument_parser(), argv)
    setup_logging()
    # Here and not above: --help needs no torchvision.
    from zenith_det.exporting.onnx_agreement import check_agreement
    from zenith_det.exporting.onnx_export import need, to_onnx

    for library in ("onnx", "onnxscript", "onnxruntime"):
        need(library)
    if args.compare < 1:
        raise UserError(f"--compare {args.compare}: give 1 or more, as a file is kept only where it agrees")
    source = Path(args.run or args.config_file)
    folder = source if source.is_dir() else source.parent
    output = args.output or folder / "model.onnx"
    if output.suffix != ".onnx":
        raise UserError(f"--output {output}: the name must end in .onnx")
    predictor = Predictor(
        args.run or args.config_file,
        threshold=None,
        engine="torchvision",
        device="cpu",
        class_names=args.class_names,
        opts=["MODEL.CHANNELS_LAST", False, *args.opts],
    )
    images = chosen_images(args.images, folder, predictor.cfg, args.compare)
    content = to_onnx(predictor.model, predictor.cfg, predictor.metadata)
    agreement = check_agreement(content, predictor, images)
    write_whole(output, content)
    print(f"{output}: {len(content) / 1e6:.1f} MB, agrees with PyTorch on {agreement}")
    return 0


def chosen_images(given: Sequence[Path] | None, run: Path, cfg: CfgNode, most: int) -> list[Path]:
    """The images to compare on, spread over all that there are.

    Args:
        given: files and folders; default: the folder of the run's validation or training images.
        run: the folder of the run, which tells where registered sets have their images.
        most: at most so many.

    Raises:
        UserError: there are none.
    """
    if given is None:
        sets = read_statistics(run)[0] if (run / STATISTICS_FILE).exists() else []
        keys = (("validation", cfg.DATASETS.VAL_IMAGES), ("training", cfg.DATASETS.TRAIN_IMAGES))
        folders = [
            Path(folder)
            for role, key in keys
            for folder in (key, *(one.image_root for one in sets if one.role == role))
            if folder
        ]
        given = [folder for folder in folders if folder.is_dir()][:1]
        if not given:
            raise UserError(
                "the run's validation images aren't here: give some to compare the exported model on (--images)"
            )
    files = [file for file, _ in collect(given, videos=False)]
    return files[:: max(1, len(files) // most)][:most]
