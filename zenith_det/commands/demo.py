"""Draw what a trained model finds in images, folders of images or videos.

    %(prog)s --config-file output/config.yaml --input photo.jpg --output found/
    %(prog)s --config-file output/config.yaml --input cameras/ --output found/ MODEL.WEIGHTS output/model_best.pth

A folder is searched with its subfolders, which are kept below --output. Names that meet there are numbered.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from zenith_det import cli
from zenith_det import opencv as cv2
from zenith_det.config import get_cfg, load_config
from zenith_det.data import DatasetMetadata, ImageError, read_image
from zenith_det.engines.predictor import Predictor
from zenith_det.engines.selection import select_engine
from zenith_det.errors import UserError
from zenith_det.report.pictures import Instances, draw_instances
from zenith_det.training.checkpoints import averaging
from zenith_det.training.logs.logging_setup import setup_logging

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm"}

Detect = Callable[[np.ndarray], Instances]


def argument_parser() -> argparse.ArgumentParser:
    """The flags of Detectron2's demo that make sense without a screen, with their meanings."""
    parser = cli.parser("demo", __doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config.yaml of the run")
    parser.add_argument("--engine", choices=("auto", "detectron2", "torchvision"), default="torchvision")
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
        default=0.5,
        metavar="P",
        help="lowest score that is drawn (default %(default)s)",
    )
    parser.add_argument(
        "--opts",
        dest="more",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="the same, as Detectron2's demo takes it",
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys to override, at the end"
    )
    return parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """As argparse does, but what follows ``--input a.jpg b.jpg`` may be the first KEY."""
    cfg = get_cfg()
    key = re.compile(r"([A-Z][A-Z0-9_]*)(\.[A-Z0-9_]+)+")
    # Files of a camera look like keys, too (DSC_0001.JPG): the section must be one of the config's.
    first = next(
        (n for n, word in enumerate(argv) if (match := key.fullmatch(word)) and match[1] in cfg), len(argv)
    )
    args = argument_parser().parse_args(argv[:first])
    args.opts = [*args.opts, *args.more, *argv[first:]]
    return args


def main(argv: list[str] | None = None) -> int:
    """Find the inputs, build the model once, draw one after the other."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    setup_logging()
    inputs = targets(collect(args.input, args.output), args.output)
    loaded = load_config(args.config_file, args.opts)
    if "MODEL.WEIGHTS" not in args.opts:
        # The result of the run that the config is of, not what the run started from.
        folder = Path(args.config_file).parent
        averaged = folder / averaging.AVERAGED_FILE
        trained = averaged if averaged.exists() else folder / averaging.TRAINED_FILE
        if trained.exists():
            loaded.override("MODEL.WEIGHTS", str(trained), "beside the config")
    engine = select_engine(args.engine).name
    detect = Predictor(engine, loaded)
    make_folder(args.output)
    for path, target in inputs:
        make_folder(target.parent)
        show = draw_video if path.suffix.lower() in VIDEOS else draw_image
        show(detect, detect.metadata, path, target, args.confidence_threshold)
    return 0


def make_folder(path: Path) -> None:
    """A folder of the pictures, if it isn't there yet.

    Raises:
        UserError: it can't be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}") from error


def collect(paths: Sequence[Path], output: Path) -> list[tuple[Path, Path]]:
    """The images and videos that ``paths`` name, folders and their subfolders opened.

    Args:
        paths: files and folders.
        output: is not searched where it lies within one of them: it holds what an earlier command drew.

    Returns:
        Each with its path below the folder that was named, or its name alone.

    Raises:
        UserError: a path that isn't there or is neither, or nothing at all.
    """
    found: list[tuple[Path, Path]] = []
    for path in paths:
        if path.is_dir():
            found += [(file, file.relative_to(path)) for file in _below(path, output)]
        elif not path.exists():
            raise UserError(f"--input {path}: no such file or folder")
        elif path.suffix.lower() not in IMAGES | VIDEOS:
            raise UserError(
                f"--input {path}: neither an image nor a video ({', '.join(sorted(IMAGES | VIDEOS))})"
            )
        else:
            found.append((path, Path(path.name)))
    if not found:
        raise UserError(f"--input {' '.join(map(str, paths))}: no images or videos there")
    return found


def _below(folder: Path, output: Path) -> list[Path]:
    """The images and videos in a folder and its subfolders, linked ones too."""
    files: list[Path] = []
    opened = {output.resolve()} - {folder.resolve()}
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        real = Path(parent).resolve()
        if real in opened:  # a link may lead back
            subfolders.clear()
            continue
        opened.add(real)
        files += [Path(parent, name) for name in names if Path(name).suffix.lower() in IMAGES | VIDEOS]
    return sorted(files)


def targets(found: Sequence[tuple[Path, Path]], output: Path) -> list[tuple[Path, Path]]:
    """Each input with the picture or video to be made of it, no two of them the same.

    Raises:
        UserError: one would be written over an input.
    """
    inputs = {path.resolve() for path, _ in found}
    taken: set[str] = set()
    planned = []
    for path, below in found:
        suffix = ".mp4" if path.suffix.lower() in VIDEOS else ".png"
        target, number = output / below.with_suffix(suffix), 1
        # In lower case: on many disks A.png and a.png are one file.
        while str(target).lower() in taken:
            number += 1
            target = output / below.with_name(f"{below.stem}-{number}{suffix}")
        if target.resolve() in inputs:
            raise UserError(f"--output {output}: {target} is an input and would be lost: name another folder")
        taken.add(str(target).lower())
        planned.append((path, target))
    return planned


def draw_image(detect: Detect, metadata: DatasetMetadata, path: Path, target: Path, threshold: float) -> None:
    """One picture; an image that can't be read is told and passed over."""
    try:
        image = read_image(path)
    except ImageError as error:
        print(f"passed over: {error}")
        return
    detected = detect(image)
    found = above(detected, threshold)
    if not cv2.imwrite(str(target), draw(image, found, metadata)):
        raise UserError(f"{target}: can't be written")
    print(f"{path}: {len(found)} objects{'' if len(found) else why_none(detected)}, {target}")


def why_none(detected: Instances) -> str:
    """What there was below the threshold."""
    if not len(detected):
        return " (no detection at all)"
    assert detected.scores is not None
    return f" (highest score {float(detected.scores.max()):.2f}; lower --confidence-threshold)"


def draw_video(detect: Detect, metadata: DatasetMetadata, path: Path, target: Path, threshold: float) -> None:
    """The same for each frame, as an mp4."""
    reader = cv2.VideoCapture(str(path))
    writer: cv2.VideoWriter | None = None
    frames = 0
    while True:
        there, frame = reader.read()
        if not there:
            break
        picture = draw(frame, above(detect(frame), threshold), metadata)
        if writer is None:
            size = (picture.shape[1], picture.shape[0])
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            writer = cv2.VideoWriter(str(target), codec, reader.get(cv2.CAP_PROP_FPS) or 25.0, size)
        writer.write(picture)
        frames += 1
    reader.release()
    if writer is None:
        print(f"passed over: {path}: no frame can be read")
        return
    writer.release()
    print(f"{path}: {frames} frames, {target}")


def draw(image: np.ndarray, found: Instances, metadata: DatasetMetadata) -> np.ndarray:
    """``image`` with everything of ``found`` on it."""
    return draw_instances(
        image, found.boxes, found.classes, found.scores, found.masks, found.keypoints, metadata
    )


def above(found: Instances, threshold: float) -> Instances:
    """The detections with at least this score."""
    assert found.scores is not None
    return found.pick(found.scores >= threshold)
