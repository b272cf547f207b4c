"""Check COCO-format datasets: the check that runs before training, and each image decoded.

    %(prog)s coco_2017_train coco_2017_val
    %(prog)s --json my/train.json --images my/images

Prints what was found and what training would do about it: "stops" (the set can't be used), "dropped" (left
out), "filled" (worked out), "kept" (worth knowing). Exit code 0: the set can be used; 2: it can't, or
--strict was given and something would be dropped or the boxes look suspicious.
"""

from __future__ import annotations

import argparse

from zenith_det import cli
from zenith_det.data import DatasetMetadata, examine_coco_dataset
from zenith_det.errors import MAX_MESSAGE, UserError, one_line


def argument_parser() -> argparse.ArgumentParser:
    parser = cli.parser("check-dataset", __doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="built-in datasets, under $DETECTRON2_DATASETS"
    )
    parser.add_argument("--json", metavar="FILE", help="annotation file of another dataset")
    parser.add_argument("--images", metavar="FOLDER", help="its image folder")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="refuse a set of which anything would be dropped, or whose boxes look suspicious",
    )
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--full", action="store_true", help="decode each image (the default)")
    depth.add_argument(
        "--fast", action="store_true", help="read image headers only, as at the start of training"
    )
    parser.add_argument(
        "--max-bad-images", type=int, default=0, metavar="N", help="unusable images to put up with"
    )
    parser.add_argument("--examples", type=int, default=3, metavar="N", help="examples shown per problem")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Check one after the other; the exit code says whether all can be used."""
    parser = argument_parser()
    args = parser.parse_args(argv)
    if bool(args.json) != bool(args.images):
        parser.error("--json and --images go together")
    if not args.names and not args.json:
        parser.error("name a dataset, or give --json and --images")
    if args.examples < 1:
        parser.error("--examples must be 1 or more")

    sources: list[str | tuple[str, str]] = list(args.names)
    if args.json:
        sources.append((args.json, args.images))
    usable = True
    for source in sources:
        dataset = examine_coco_dataset(
            source, check_images="header" if args.fast else "full", max_bad_images=args.max_bad_images
        )
        report = dataset.report
        print(report.summary())
        if dataset.metadata.num_keypoints:
            print(flip_pairs_line(dataset.metadata))
        if report.problems:
            print(report.table(args.examples))
        if report.count("stops"):
            print("result: can't be used" + (f": {report.hint}" if report.hint else ""))
            usable = False
        elif args.strict and (report.count("dropped") or report.suspicions()):
            print("result: refused, as --strict was given")
            usable = False
        else:
            print("result: usable")
    return 0 if usable else UserError.exit_code


def flip_pairs_line(metadata: DatasetMetadata) -> str:
    """Which keypoints a mirror swaps, as training does it under INPUT.RANDOM_FLIP horizontal."""
    pairs = ", ".join(f"{first} and {second}" for first, second in metadata.keypoint_flip_map) or "none"
    hint = " (if it swaps any, give the category flip_pairs)" if metadata.lacks_flip_pairs else ""
    return one_line(f"{metadata.num_keypoints} keypoints; a mirror swaps {pairs}{hint}", MAX_MESSAGE)
