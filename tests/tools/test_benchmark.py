"""``zenith-det benchmark``: every subcommand, in a small setting."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import image

from tests.benchmarking.test_measuring import check
from tests.engines.torchvision_engine.small_models import SMALL
from tests.tools.called import called
from zenith_det.benchmarking.detections import coco_like
from zenith_det.commands import benchmark as benchmark_command

SMALL_OPTS = [str(item) for pair in SMALL.items() for item in pair]


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """A measurement sets torch's threads for its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def benchmark(*args: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = called(benchmark_command.main, *args)
    assert (done.returncode == 0) is ok, done.stdout + done.stderr
    return done


def report(folder: Path, command: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{command}.json").read_text())
    check(found)
    picture = image.imread(folder / f"{command}.png")
    assert picture.std() > 0.01, "an empty plot"
    assert found["machine"]["cores"] == os.cpu_count()
    return found


def test_optimizer(tmp_path: Path) -> None:
    config = "configs/quickstart/mask_rcnn_zenith.yaml"
    done = benchmark(
        "optimizer", "--config-file", config, "--rounds", "2", "--warmup", "1", "--threads", "1",
        "--device", "cpu", "--output", str(tmp_path), *SMALL_OPTS,
    )  # fmt: skip
    found = report(tmp_path, "optimizer")
    (comparison,) = found["comparisons"]
    cases = {case["name"]: case for case in comparison["cases"]}
    assert "left out" not in comparison["facts"]
    expected = {
        "ZENITH",
        "SGD, fused",
        "SGD, foreach",
        "AdamW, fused",
        "ZENITHAdamW",
        "Prodigy",
        "Schedule-Free SGD",
    }
    assert expected <= set(cases)
    for name in ("SGD, foreach", "SGD, fused + clip_grad_norm_"):
        assert cases[name]["state bytes"] == cases["SGD, fused"]["state bytes"]
    # The norms, and a few scalars that don't grow.
    extra = cases["ZENITH"]["state bytes"] - cases["SGD, fused"]["state bytes"]
    assert 800 <= extra <= 900
    # two moments a parameter, and a float32 step count a tensor
    tensors = (cases["AdamW, fused"]["state bytes"] - 2 * cases["SGD, fused"]["state bytes"]) / 4
    assert f"{tensors:.0f} tensors" in comparison["title"]
    assert [r["at_most"] for r in comparison["ratios"][:3]] == [1.25, 0.90, 0.85]
    assert found["machine"]["torch_threads"] == 1
    assert "ZENITH / SGD, fused" in done.stdout


def test_evaluation(tmp_path: Path) -> None:
    benchmark(
        "eval",
        "--images",
        "6",
        "--detections",
        "20",
        "--rounds",
        "1",
        "--device",
        "cpu",
        "--output",
        str(tmp_path),
    )
    found = report(tmp_path, "eval")
    both, *tasks = found["comparisons"]
    assert [c["facts"]["agrees"] for c in tasks] == [True] * 3
    parts = [c["cases"][0]["seconds"] for c in tasks if "keypoints" not in c["title"]]
    assert both["cases"][0]["seconds"] == [sum(times) for times in zip(*parts)]
    for comparison in tasks:
        cases = {case["name"]: case for case in comparison["cases"]}
        assert 1 < float(cases["zenith_det"]["AP"]) < 99, "nothing that could differ"
        assert float(cases["zenith_det"]["AP"]) == pytest.approx(float(cases["pycocotools"]["AP"]), abs=2e-9)


LOOP = ["--config-file", "configs/quickstart/mask_rcnn_zenith.yaml", "--device", "cpu", "--threads", "1"]
TINY = ["--size", "64", "--rounds", "2", "--warmup", "1"]


def test_iteration(tmp_path: Path) -> None:
    benchmark("iteration", *LOOP, *TINY, "--output", str(tmp_path), *SMALL_OPTS)
    (comparison,) = report(tmp_path, "iteration")["comparisons"]
    names = {case["name"] for case in comparison["cases"]}
    assert {"built-in, ZENITH", "built-in, SGD"} <= names
    assert ("Detectron2, ZENITH" in names) != ("without Detectron2" in comparison["facts"])
    for case in comparison["cases"]:
        assert case["images/s"] == pytest.approx(2 / case["median_s"])


def test_train(tmp_path: Path) -> None:
    kinds = ["fp32", "fp32 channels_last"]
    benchmark(
        "train", *LOOP, *TINY, "--batch-sizes", "2", "--kinds", *kinds, "--output", str(tmp_path), *SMALL_OPTS
    )
    (comparison,) = report(tmp_path, "train")["comparisons"]
    cases = {case["name"]: case for case in comparison["cases"]}
    for kind in kinds:
        case = cases[f"built-in, {kind}"]
        assert case["images/s"] == pytest.approx(2 / case["median_s"])
        # A process with torch in it, and not the whole machine.
        assert 100 < case["peak memory, MB"] < 10_000
    expected = {"of": "built-in, fp32 channels_last", "to": "built-in, fp32"}
    assert expected in [{key: ratio[key] for key in ("of", "to")} for ratio in comparison["ratios"]]


def test_data(tmp_path: Path) -> None:
    benchmark("data", *LOOP, *TINY, "--workers", "0", "1", "--output", str(tmp_path), *SMALL_OPTS)
    (comparison,) = report(tmp_path, "data")["comparisons"]
    cases = {case["name"]: case for case in comparison["cases"]}
    assert len(cases) == 4
    # Without workers training waits for all that loading takes.
    assert 0 < float(cases["training, 0 workers"]["waiting"].rstrip("%")) < 100


def test_scale(tmp_path: Path) -> None:
    benchmark(
        "scale", "--rounds", "1", "--warmup", "0", "--parameters", "1000", "10000", "--windows", "10", "1000",
        "--images", "2", "400", "--processes", "2", "--device", "cpu", "--threads", "1", "--output", str(tmp_path),
    )  # fmt: skip
    comparisons = report(tmp_path, "scale")["comparisons"]
    assert [c["x"] for c in comparisons] == [1000, 10000, 10, 1000, 2, 400, 2]
    assert comparisons[5]["facts"]["annotation file, MB"] > comparisons[4]["facts"]["annotation file, MB"]
    kept = [
        [case["name"].startswith("the same, kept") for case in c["cases"]].count(True)
        for c in comparisons[4:6]
    ]
    assert kept == [0, 1]  # a file of less than a megabyte is read each time


def test_import(tmp_path: Path) -> None:
    benchmark("import", "--rounds", "1", "--warmup", "0", "--output", str(tmp_path))
    (comparison,) = report(tmp_path, "import")["comparisons"]
    assert [ratio["of"] for ratio in comparison["ratios"]] == ["import zenith_det", "import zenith_det.optim"]


def test_detections_are_the_same_each_time() -> None:
    ground_truth, results = coco_like("segm", 2, 30)
    assert coco_like("segm", 2, 30) == (ground_truth, results)
    assert [sum(r["image_id"] == i for r in results) for i in (1, 2)] == [30, 30]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["optimizer", "--config-file", "no.yaml"], "no.yaml"),
        (["optimizer", "--rounds", "0"], "--rounds"),
        (["eval", "--tasks", "panoptic"], "panoptic"),
        (["train", "--kinds", "fp8"], "--kinds 'fp8'"),
    ],
)
def test_a_mistake_is_one_line(args: list[str], message: str, tmp_path: Path) -> None:
    done = benchmark(*args, "--output", str(tmp_path), ok=False)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
