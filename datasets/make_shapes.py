#!/usr/bin/env python
"""Write a synthetic COCO-format set; see datasets/README.md."""

from __future__ import annotations

import argparse
import time

from zenith_det.cli import run
from zenith_det.data.synthetic import TASKS, generate


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--output", help="folder; default: datasets/shapes, or datasets/figures for keypoints"
    )
    parser.add_argument("--task", choices=TASKS, default="instances", help="what to draw")
    parser.add_argument("--train", type=int, default=1000, help="number of training images")
    parser.add_argument("--val", type=int, default=200, help="number of validation images")
    parser.add_argument("--size", type=int, default=160, help="longer side of the images, pixels")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another set")
    args = parser.parse_args()
    output = args.output or ("datasets/shapes" if args.task == "instances" else "datasets/figures")
    start = time.perf_counter()
    splits = generate(output, train=args.train, val=args.val, size=args.size, seed=args.seed, task=args.task)
    for name, split in splits.items():
        print(f"{name}: {split.num_images} images, {split.num_annotations} annotations: {split.json_file}")
    print(f"done in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run(main)
