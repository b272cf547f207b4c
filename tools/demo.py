"""Draw what a trained model finds in images, folders of images or videos."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from zenith_det import cli
from zenith_det.config import load_config
from zenith_det.data import DatasetMetadata, ImageError, read_image
from zenith_det.engines.selection import select_engine
from zenith_det.errors import UserError
from zenith_det.report.pictures import Instances, draw_instances
from zenith_det.training.logging_setup import setup_logging

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm"}

Detect = Callable[[np.ndarray], Instances]


def argument_parser() -> argparse.ArgumentParser:
    """The flags of Detectron2's demo that make sense without a screen, with their meanings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config.yaml of the run")
    parser.add_argument("--engine", choices=("auto", "detectron2", "torchvision"), default="torchvision")
    parser.add_argument(
        "--input", required=True, nargs="+", type=Path, metavar="PATH", help="images, folders or videos"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where the pictures go")
    parser.add_argument(
        "--confidence-threshold", type=float, default=0.5, metavar="P", help="lowest score that is drawn"
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config keys to override"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Find the inputs, build the model once, draw one after the other."""
    args = argument_parser().parse_args(argv)
    setup_logging()
    inputs = collect(args.input)
    loaded = load_config(args.config_file, args.opts)
    if "MODEL.WEIGHTS" not in args.opts:
        # The result of the run that the config is of, not what the run started from.
        folder = Path(args.config_file).parent
        averaged = folder / "model_final_averaged.pth"
        trained = averaged if averaged.exists() else folder / "model_final.pth"
        if trained.exists():
            loaded.override("MODEL.WEIGHTS", str(trained), "beside the config")
    engine = select_engine(args.engine).name
    module = importlib.import_module(f"zenith_det.engines.{engine}_engine.predictor")
    detect = module.Predictor(loaded)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {args.output}: {error.strerror}") from error
    for path in inputs:
        show = draw_video if path.suffix.lower() in VIDEOS else draw_image
        show(detect, detect.metadata, path, args.output, args.confidence_threshold)
    return 0


def collect(paths: list[Path]) -> list[Path]:
    """The images and videos that ``paths`` name, folders opened.

    Raises:
        UserError: a path that isn't there or is neither, or nothing at all.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES | VIDEOS)
        elif not path.exists():
            raise UserError(f"--input {path}: no such file or folder")
        elif path.suffix.lower() not in IMAGES | VIDEOS:
            raise UserError(
                f"--input {path}: neither an image nor a video ({', '.join(sorted(IMAGES | VIDEOS))})"
            )
        else:
            found.append(path)
    if not found:
        raise UserError(f"--input {' '.join(map(str, paths))}: no images or videos there")
    return found


def draw_image(detect: Detect, metadata: DatasetMetadata, path: Path, output: Path, threshold: float) -> None:
    """One picture; an image that can't be read is told and passed over."""
    try:
        image = read_image(path)
    except ImageError as error:
        print(f"passed over: {error}")
        return
    found = above(detect(image), threshold)
    target = output / f"{path.stem}.png"
    if not cv2.imwrite(str(target), draw(image, found, metadata)):
        raise UserError(f"{target}: can't be written")
    print(f"{path}: {len(found)} objects, {target}")


def draw_video(detect: Detect, metadata: DatasetMetadata, path: Path, output: Path, threshold: float) -> None:
    """The same for each frame, as an mp4."""
    reader = cv2.VideoCapture(str(path))
    writer: cv2.VideoWriter | None = None
    frames, target = 0, output / f"{path.stem}.mp4"
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


if __name__ == "__main__":
    cli.run(main)
