"""Draw what a trained model finds in images, folders of images or videos, and write it as COCO results.

    %(prog)s output/mine --input photo.jpg --output found/
    %(prog)s output/mine/model_best.pth --input cameras/ clip.mp4 --output found/ --crop
    %(prog)s --config-file mask_rcnn_zenith.yaml --input photo.jpg --output found/ MODEL.WEIGHTS output/model_best.pth

A folder is searched with its subfolders, which are kept below --output. Names that meet there are numbered.
--output/predictions.json has a COCO result for each object that is drawn, with the file_name of its image below the
folder that was named, and the frame of a video.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zenith_det import cli
from zenith_det import opencv as cv2
from zenith_det.commands.model_arguments import add_model_flags, parse_model_arguments
from zenith_det.errors import UserError
from zenith_det.evaluation import ResultsWriter
from zenith_det.evaluation.recommended import DEFAULT_SCORE
from zenith_det.predicting.image_sources import collect, frames_per_second, is_video
from zenith_det.predicting.prediction import Prediction, save_picture
from zenith_det.predicting.predictor import Predictor
from zenith_det.report.run_data import recommended_score
from zenith_det.training.logs.logging_setup import setup_logging

PREDICTIONS_FILE = "predictions.json"
CROPS_FOLDER = "crops"


@dataclass(frozen=True)
class Input:
    """An image or a video.

    Attributes:
        path: of the file.
        name: its path below the folder that was named, or the name alone; the path where several share that.
        target: the picture or video to be made of it.
    """

    path: Path
    name: str
    target: Path


def argument_parser() -> argparse.ArgumentParser:
    """The flags of Detectron2's demo that make sense without a screen, with their meanings."""
    parser = cli.parser("demo", __doc__)
    add_model_flags(parser)
    parser.add_argument(
        "--engine",
        choices=("auto", "detectron2", "torchvision"),
        default="auto",
        help="default auto: the one that trained the weights, where it can be used here",
    )
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        type=Path,
        metavar="PATH",
        help="images, videos, or folders of them and of more folders",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where the pictures go")
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        metavar="P",
        help="lowest score that is drawn (default: the one that RUN's evaluation recommends; "
        f"{DEFAULT_SCORE} where that is not known)",
    )
    parser.add_argument(
        "--crop",
        action="store_true",
        help=f"also write what is within each box, to --output/{CROPS_FOLDER}/",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=4,
        metavar="N",
        help="images of one size that the model takes at once",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Find the inputs, build the model once, draw one after the other."""
    args = parse_model_arguments(argument_parser(), argv)
    setup_logging()
    inputs = targets(collect(args.input, leave_out=args.output), args.output)
    predictor = Predictor(
        args.run or args.config_file,
        threshold=None,
        engine=args.engine,
        batch_size=args.batch_size,
        class_names=args.class_names,
        opts=args.opts,
    )
    threshold = lowest_score(args)
    make_folder(args.output)
    of_path = {one.path: one for one in inputs}
    predictions = predictor.stream((one.path for one in inputs), lambda error: print(f"passed over: {error}"))
    with ResultsWriter(args.output / PREDICTIONS_FILE) as results:
        image_id = 0
        for path, group in groupby(predictions, key=lambda prediction: prediction.path):
            assert path is not None
            one = of_path[path]
            make_folder(one.target.parent)
            video = _Video(one) if is_video(path) else None
            try:
                for detected in group:
                    found = detected.above(threshold)
                    image_id += 1
                    results.add(_results(found, image_id, one.name))
                    if args.crop:
                        _write_crops(found, one, args.output)
                    if video:
                        video.add(found.draw())
                    else:
                        found.draw(one.target)
                        print(f"{path}: {len(found)} objects{_why_none(found, detected)}, {one.target}")
            finally:
                if video:
                    video.close()
            if video:
                print(f"{path}: {video.frames} frames, {one.target}")
    print(f"{results.path}: COCO results of {image_id} images")
    return 0


def lowest_score(args: argparse.Namespace) -> float:
    """From which score on objects are drawn: as asked for, or as the run recommends, which is told."""
    if args.confidence_threshold is not None:
        return float(args.confidence_threshold)
    # The recommendation is for the run's result, not for any of its checkpoints.
    if args.run is not None and Path(args.run).is_dir() and "MODEL.WEIGHTS" not in args.opts:
        with contextlib.suppress(UserError):  # not evaluated, or its validation set is elsewhere
            if recommended := recommended_score(Path(args.run)):
                print(
                    f"drawn from a score of {recommended.score:.3g} on, which had the highest F1 when the run was "
                    "evaluated (--confidence-threshold sets another)"
                )
                return recommended.score
    return DEFAULT_SCORE


def make_folder(path: Path) -> None:
    """A folder of the pictures, if it isn't there yet.

    Raises:
        UserError: it can't be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}") from error


def targets(found: Sequence[tuple[Path, Path]], output: Path) -> list[Input]:
    """Each input with the picture or video to be made of it, no two of them the same.

    Raises:
        UserError: one would be written over an input.
    """
    inputs = {path.resolve() for path, _ in found}
    names = Counter(below for _, below in found)
    taken: set[str] = set()
    planned = []
    for path, below in found:
        suffix = ".mp4" if is_video(path) else ".png"
        target, number = output / below.with_suffix(suffix), 1
        # In lower case: on many disks A.png and a.png are one file.
        while str(target).lower() in taken:
            number += 1
            target = output / below.with_name(f"{below.stem}-{number}{suffix}")
        if target.resolve() in inputs:
            raise UserError(f"--output {output}: {target} is an input and would be lost: name another folder")
        taken.add(str(target).lower())
        planned.append(Input(path, (below if names[below] == 1 else path).as_posix(), target))
    return planned


def _results(found: Prediction, image_id: int, name: str) -> Iterator[dict[str, Any]]:
    """COCO results with what they are of: the ids number the images of this command alone."""
    frame = {} if found.frame is None else {"frame": found.frame}
    for result, category in zip(found.to_coco(image_id), found.class_names):
        yield {**result, "category_name": category, "file_name": name, **frame}


def _write_crops(found: Prediction, one: Input, output: Path) -> None:
    folder = output / CROPS_FOLDER / one.target.relative_to(output).parent
    frame = "" if found.frame is None else f"-{found.frame:06d}"
    for number, (pixels, name) in enumerate(zip(found.crops(), found.class_names), 1):
        # A class may be called anything; a file may not.
        safe = re.sub(r"[^\w-]+", "_", name)[:40]
        save_picture(
            Image.fromarray(np.ascontiguousarray(pixels[:, :, ::-1])),
            folder / f"{one.target.stem}{frame}-{number}-{safe}.png",
        )


def _why_none(found: Prediction, detected: Prediction) -> str:
    """What there was below the threshold."""
    if len(found):
        return ""
    if not len(detected):
        return " (no detection at all)"
    return f" (highest score {float(detected.scores.max()):.2f}; lower --confidence-threshold)"


class _Video:
    """The drawn frames of a video, as an mp4."""

    def __init__(self, one: Input) -> None:
        self.one = one
        self.frames = 0
        self._writer: Any = None

    def add(self, picture: Image.Image) -> None:
        if self._writer is None:
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            rate = frames_per_second(self.one.path)
            self._writer = cv2.VideoWriter(str(self.one.target), codec, rate, picture.size)
            if not self._writer.isOpened():
                raise UserError(f"{self.one.target}: can't be written")
        self._writer.write(np.ascontiguousarray(np.asarray(picture)[:, :, ::-1]))
        self.frames += 1

    def close(self) -> None:
        if self._writer is not None:
            self._writer.release()
