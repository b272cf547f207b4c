"""Make COCO-format annotation files from a dataset in another format: YOLO, Pascal VOC or labelme.

    %(prog)s DATASET --output annotations

It writes a file for each part that the dataset's folders or lists name (train.json, val.json, test.json), or all.json
if they name none. The images stay where they are. Exit code 0: done; 2: nothing could be written, or --strict was
given and something would be left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from zenith_det import cli
from zenith_det.data.converting import FORMATS, Conversion, convert_folder
from zenith_det.data.converting.found import WHOLE, read_text
from zenith_det.errors import UserError


def argument_parser() -> argparse.ArgumentParser:
    parser = cli.parser("convert-dataset", __doc__)
    parser.add_argument("dataset", metavar="DATASET", help="the folder that holds images and labels")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the annotation files go")
    parser.add_argument("--format", choices=tuple(FORMATS), help="default: recognized by the files")
    parser.add_argument(
        "--classes",
        metavar="FILE",
        help="a file with one class name a line, in the order of their numbers; replaces the dataset's own names",
    )
    parser.add_argument("--strict", action="store_true", help="write nothing if something would be left out")
    parser.add_argument(
        "--examples", type=int, default=3, metavar="N", help="how many examples of each problem to show"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Convert, and print what was found and left out."""
    args = argument_parser().parse_args(argv)
    classes = None
    if args.classes:
        classes = [line.strip() for line in read_text(Path(args.classes)).splitlines() if line.strip()]
    conversion = convert_folder(args.dataset, args.output, args.format, classes, strict=args.strict)
    print(f"{args.dataset}: {FORMATS[conversion.format].title}")
    for note in conversion.notes:
        print(note)
    for split, report in conversion.reports.items():
        print(report.summary())
        if report.problems:
            print(report.table(args.examples))
        if split in conversion.files:
            print(f"written: {conversion.files[split]}")
    if not conversion.files:
        print("result: nothing written, as --strict was given")
        return UserError.exit_code
    print(f"train on it with\n    {cli.command('train')} --config-file CONFIG {training_flags(conversion)}")
    return 0


def training_flags(conversion: Conversion) -> str:
    """The flags that train on what was written."""
    files, images = conversion.files, conversion.images
    train = files.get("train") or files.get(WHOLE) or next(iter(files.values()))
    text = f"--train-json {train} --train-images {images}"
    held_out = files.get("val") or files.get("test")
    return text + (f" --val-json {held_out} --val-images {images}" if held_out and held_out != train else "")
