"""How the step, the history, the evaluation and the start of a run grow with what they work on, and on how many."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn import Parameter

from zenith_det.benchmarking.detections import coco_like
from zenith_det.benchmarking.measuring import Case, interleave
from zenith_det.benchmarking.reporting import Comparison, Ratio
from zenith_det.data import annotation_cache, load_coco_dataset
from zenith_det.data.synthetic import generate, split_files
from zenith_det.errors import UserError
from zenith_det.evaluation import evaluate_coco
from zenith_det.optim import ZENITH

__all__ = ["scale_images", "scale_parameters", "scale_processes", "scale_window"]

TENSORS = 80  # as many as a Mask R-CNN R50-FPN has
KEPT = "the same, kept from the last time (DATASETS.CACHE)"
SETTINGS: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4}


def scale_parameters(
    counts: Sequence[int], *, rounds: int, warmup: int, device: torch.device
) -> list[Comparison]:
    """A step of ZENITH and of torch's fused SGD on 80 tensors of so many elements together."""
    comparisons = []
    for count in counts:
        zenith, sgd = _parameters(count, device), _parameters(count, device)
        cases = [
            Case("ZENITH", ZENITH(zenith, **SETTINGS).step),
            Case("SGD, fused", torch.optim.SGD(sgd, fused=True, **SETTINGS).step),
        ]
        samples = interleave(cases, rounds=rounds, warmup=max(warmup, 1), device=device)
        comparisons.append(
            Comparison(
                f"step: {count:,} parameters",
                samples,
                [Ratio("ZENITH", "SGD, fused")],
                facts={"x": "parameters"},
                x=count,
            )
        )
    return comparisons


def scale_window(
    windows: Sequence[int], *, rounds: int, warmup: int, device: torch.device
) -> list[Comparison]:
    """A step of ZENITH on next to no parameters: what is left is the history of W norms."""
    comparisons = []
    for window in windows:
        step = ZENITH(_parameters(TENSORS, device), window=window, **SETTINGS).step
        samples = interleave([Case("ZENITH", step)], rounds=rounds, warmup=max(warmup, 1), device=device)
        comparisons.append(Comparison(f"history: W {window:,}", samples, facts={"x": "W"}, x=window))
    return comparisons


def scale_images(counts: Sequence[int], *, rounds: int, warmup: int) -> list[Comparison]:
    """Reading and checking an annotation file of so many images, and evaluating 100 boxes on each."""
    logger = logging.getLogger("zenith_det.data")
    before = logger.level
    logger.setLevel(logging.ERROR)  # it would report on every set
    try:
        return [_scale_images(count, rounds, warmup) for count in counts]
    finally:
        logger.setLevel(before)


def _scale_images(count: int, rounds: int, warmup: int) -> Comparison:
    ground_truth, results = coco_like("bbox", count, 100)
    with tempfile.TemporaryDirectory(prefix="zenith_det_benchmark_") as folder:
        file = Path(folder) / "instances.json"
        file.write_text(json.dumps(ground_truth))
        source = (str(file), folder)

        def read(cache: bool) -> object:
            return load_coco_dataset(source, check_images="none", cache=cache)

        cases = [
            Case("evaluating boxes", lambda: evaluate_coco(ground_truth, results, ["bbox"])),
            Case("json.loads", lambda: json.loads(file.read_bytes())),
            Case("reading and checking", lambda: read(cache=False)),
        ]
        ratios = [Ratio("reading and checking", "json.loads")]
        if file.stat().st_size >= annotation_cache.SMALLEST:
            cases.append(Case(KEPT, lambda: read(cache=True)))
            ratios.append(Ratio(KEPT, "reading and checking"))
        with mock.patch.dict(os.environ, {annotation_cache.FOLDER_VARIABLE: folder}):
            read(cache=True)
            samples = interleave(cases, rounds=rounds, warmup=warmup)
        facts = {"x": "images", "annotation file, MB": file.stat().st_size / 1e6}
    return Comparison(f"images: {count:,}", samples, ratios, facts=facts, x=count)


def scale_processes(
    counts: Sequence[int], config_file: str, *, images: int, rounds: int, warmup: int
) -> list[Comparison]:
    """An evaluation shared by so many processes, and a run of so many from its start to its first iteration.

    Args:
        config_file: of the run; on the CPU, by the built-in engine.
        images: with 100 boxes each, to evaluate.

    Raises:
        UserError: a run failed; with its last line.
    """
    ground_truth, results = coco_like("bbox", images, 100)
    comparisons = []
    with tempfile.TemporaryDirectory(prefix="zenith_det_benchmark_") as name:
        folder = Path(name)
        batch = math.lcm(*counts)  # so that it divides by each
        generate(folder / "set", train=8 * batch, val=0, size=64)
        json_file, pictures = map(str, split_files(folder / "set", "train", "instances"))
        keys = {
            "MODEL.DEVICE": "cpu", "MODEL.WEIGHTS": "", "DATASETS.TEST": "()", "SOLVER.MAX_ITER": 1,
            "SOLVER.IMS_PER_BATCH": batch, "SOLVER.AVERAGE.KIND": "", "DATALOADER.NUM_WORKERS": 0,
            "CHECKPOINT.BEST": "", "OUTPUT_DIR": folder / "run",
        }  # fmt: skip
        words = [str(word) for pair in keys.items() for word in pair]
        for count in counts:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            command = [
                sys.executable, *(launcher if count > 1 else []), "-m", "zenith_det", "train", "--engine",
                "torchvision", "--config-file", config_file, "--train-json", json_file,
                "--train-images", pictures, *words,
            ]  # fmt: skip
            cases = [
                Case("evaluating boxes", lambda n=count: evaluate_coco(ground_truth, results, ["bbox"], processes=n)),  # type: ignore[misc]
                Case("a run of one iteration", lambda c=command: _run(c)),  # type: ignore[misc]
            ]  # fmt: skip
            samples = interleave(cases, rounds=rounds, warmup=warmup)
            facts = {"x": "processes"}
            comparisons.append(Comparison(f"processes: {count}", samples, facts=facts, x=count))
    return comparisons


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise UserError(f"{' '.join(command[:8])} … failed with exit code {done.returncode}: {lines[-1]}")


def _parameters(count: int, device: torch.device) -> list[Parameter]:
    """80 parameters with gradients, ``count`` elements in all."""
    params = [Parameter(torch.randn(max(count // TENSORS, 1), device=device)) for _ in range(TENSORS)]
    for param in params:
        param.grad = torch.randn_like(param)
    return params
