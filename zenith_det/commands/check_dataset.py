"""Check COCO-format datasets: the check that runs before training, and each image decoded.

    %(prog)s --train-json train.json --train-images images --val-json val.json --val-images images
    %(prog)s --train-json train.json --train-images images --config-file my.yaml --pictures found
    %(prog)s FOLDER
    %(prog)s coco_2017_train coco_2017_val
    %(prog)s --json my/train.json --images my/images

Prints what was found and what training would do about it: "stops" (the set can't be used), "dropped" (left
out), "filled" (worked out), "kept" (worth knowing). Then what the sets hold, side by side: images, objects and their
sizes at the network's input by class, and what will go wrong with them. Exit code 0: the sets can be used; 2: one
can't, or --strict was given and something would be dropped or the boxes look suspicious.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zenith_det import cli
from zenith_det.commands.data_folders import CONVERTED, data_overrides
from zenith_det.config import LoadedConfig, files_of, get_cfg, name_of_files, validate_config
from zenith_det.data import CocoDataset, DatasetMetadata, examine_coco_dataset
from zenith_det.data.converting.folders import find_sets, is_folder_of_sets
from zenith_det.data.converting.found import WHOLE
from zenith_det.data.overview import notes, overview_table
from zenith_det.data.splitting import origin_of, split_file, told
from zenith_det.data.statistics import InputSize, SetStatistics, count_set
from zenith_det.engines.detectron2_engine.zoo import load_config_file
from zenith_det.engines.val_share import hold_out
from zenith_det.errors import MAX_MESSAGE, ConfigError, UserError, one_line


def argument_parser() -> argparse.ArgumentParser:
    parser = cli.parser("check-dataset", __doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="FOLDER",
        help="of an export, whose parts are all checked (YOLO, Pascal VOC and labelme are converted for it); or the "
        "name of a built-in dataset, under $DETECTRON2_DATASETS",
    )
    cli.add_data_flags(parser)
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="annotation file of a set that is neither for training nor for validation",
    )
    parser.add_argument("--images", metavar="FOLDER", help="its image folder")
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help="a config: its INPUT gives the size of objects at the network; its DATASETS are checked if you name none",
    )
    parser.add_argument(
        "--pictures",
        type=Path,
        metavar="FOLDER",
        help="folder for labelled images, histograms of classes and sizes, and a page of them all",
    )
    parser.add_argument(
        "--split",
        type=float,
        metavar="SHARE",
        help="split the file of --train-json: write two files beside it, with SHARE of its images to evaluate on and "
        "the others to train on, the classes in proportion; then check these",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="refuse a set if anything would be dropped or its boxes look suspicious",
    )
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--full", action="store_true", help="decode each image (the default)")
    depth.add_argument(
        "--fast", action="store_true", help="read image headers only, as at the start of training"
    )
    cli.add_max_bad_images(parser)
    cli.add_crowds(parser)
    parser.add_argument(
        "--examples", type=int, default=3, metavar="N", help="how many examples of each problem to show"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Check one after the other; the exit code says whether all can be used."""
    parser = argument_parser()
    args = parser.parse_args(argv)
    if bool(args.json) != bool(args.images):
        parser.error("--json and --images go together")
    if args.examples < 1:
        parser.error("--examples must be 1 or more")
    loaded = load_config_file(args.config_file, []) if args.config_file else LoadedConfig(get_cfg())
    cfg = loaded.cfg
    named_here = bool(args.names or args.json)
    with tempfile.TemporaryDirectory() as scratch:
        for key, value, flag in data_overrides(args, args.pictures or scratch):
            named_here = True
            loaded.override(key, value, flag)
        if args.split is not None:
            _split(cfg, args.split)
        validate_config(cfg, loaded.sources)
        hold_out(loaded, args.pictures or scratch, say=print)
        if args.max_bad_images is not None:
            cfg.DATASETS.MAX_BAD_IMAGES = args.max_bad_images
        if args.crowds:
            cfg.DATASETS.CROWDS = args.crowds
        converted = (args.pictures or Path(scratch)) / CONVERTED
        sources = list(_sources(args, cfg, converted, of_config=not named_here))
        if not sources:
            parser.error(
                "name a dataset or a folder, or give --train-json and --train-images, or --json and --images"
            )
        return _check(args, cfg, sources)


def _split(cfg: Any, share: float) -> None:
    """Write the two parts of the training file beside it, and have the keys name them."""
    files = files_of(cfg, "TRAIN")
    if files is None or files_of(cfg, "TEST"):
        raise ConfigError("--split takes one file, --train-json with --train-images, and no --val-json")
    if not 0 < share < 1:
        raise ConfigError(f"--split {share:g}: give a share between 0 and 1, such as 0.2")
    json_file = Path(files[0]).absolute()
    parts = [json_file.with_name(f"{json_file.stem}_{part}.json") for part in ("train", "val")]
    for part in parts:
        origin = origin_of(part)
        if part.exists() and (origin is None or origin.get("file") != str(json_file)):
            raise ConfigError(f"--split would replace {part}, which is no part of {json_file}: move it")
    print(told(split_file(str(json_file), share, *parts), share, str(json_file), json_file.parent))
    cfg.DATASETS.TRAIN_JSON, cfg.DATASETS.VAL_JSON = map(str, parts)
    cfg.DATASETS.VAL_IMAGES = files[1]


def _check(args: argparse.Namespace, cfg: Any, sources: list[tuple[str, str, Any]]) -> int:
    usable = True
    datasets: list[CocoDataset] = []
    sets: list[SetStatistics] = []
    value_range = cfg.INPUT.VALUE_RANGE
    for role, name, source in sources:
        dataset = examine_coco_dataset(
            source,
            name=name,
            check_images="header" if args.fast else "full",
            max_bad_images=cfg.DATASETS.MAX_BAD_IMAGES,
            crowds=cfg.DATASETS.CROWDS,
            value_range=value_range if role == "validation" else cfg.INPUT.VALUE_RANGE,
        )
        if role == "training" and dataset.records:
            value_range = dataset.records[0].get("value_range", cfg.INPUT.VALUE_RANGE)  # as a run does
        usable &= _tell(dataset, args)
        size = InputSize.of(cfg, training=role != "validation")
        found = [dataset.report.summary(), *dataset.report.remarks(), *dataset.report.suspicions()]
        problems = dataset.report.table() if dataset.report.problems else ""
        datasets.append(dataset)
        sets.append(
            count_set(dataset.metadata, dataset.records, size, role=role, found=found, problems=problems)
        )
    lines = [note.text for note in notes(sets)]
    print(f"\n{overview_table(sets)}")
    if not args.config_file:
        print("these are the defaults of INPUT: --config-file takes a config's own")
    for line in lines:
        print(line)
    if args.pictures:
        from zenith_det.report.dataset_page import write_dataset_page

        written = write_dataset_page(args.pictures, sets, lines, datasets)
        print(f"pictures: {', '.join(map(str, written))}")
    return 0 if usable else UserError.exit_code


def _sources(
    args: argparse.Namespace, cfg: Any, converted: Path, *, of_config: bool
) -> Iterator[tuple[str, str, Any]]:
    """(role, name, source) of each set to check."""
    for kind, role in (("TRAIN", "training"), ("TEST", "validation")):
        if files := files_of(cfg, kind):
            yield role, name_of_files(cfg, kind), files
        elif of_config:
            for name in cfg.DATASETS[kind]:
                yield role, name, name
    for number, name in enumerate(args.names):
        if is_folder_of_sets(name):
            found = find_sets(name, converted / str(number) if number else converted)
            for note in found.notes:
                print(note)
            folder = Path(name).absolute().name
            for part, source in found.sets.items():
                role = "training" if part in ("train", WHOLE) else "validation"
                yield role, folder if part == WHOLE else f"{folder} {part}", source
            continue
        # Among built-in names the part tells what a set is for.
        yield "training" if "train" in name else "validation" if "val" in name else "", name, name
    if args.json:
        yield "", Path(args.json).stem, (args.json, args.images)


def _tell(dataset: CocoDataset, args: argparse.Namespace) -> bool:
    """Print what was found in a set; return whether it can be used."""
    report = dataset.report
    print(report.summary())
    if dataset.metadata.num_keypoints:
        print(flip_pairs_line(dataset.metadata))
    if report.problems:
        print(report.table(args.examples))
    if report.count("stops"):
        print(f"result: can't be used: {report.refusal('stops', dataset.metadata.image_root)}")
        return False
    if args.strict and (report.count("dropped") or report.suspicions()):
        print("result: refused, as --strict was given")
        return False
    print("result: usable")
    return True


def flip_pairs_line(metadata: DatasetMetadata) -> str:
    """Which keypoints a mirror swaps, as training does it under INPUT.RANDOM_FLIP horizontal."""
    pairs = ", ".join(f"{first} and {second}" for first, second in metadata.keypoint_flip_map) or "none"
    hint = " (if it swaps any, give the category flip_pairs)" if metadata.lacks_flip_pairs else ""
    return one_line(f"{metadata.num_keypoints} keypoints; a mirror swaps {pairs}{hint}", MAX_MESSAGE)
