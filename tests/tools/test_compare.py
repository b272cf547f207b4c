"""tools/compare.py and tools/report.py on real, tiny training runs, and their pages in a real browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, SmallSet
from tests.reliability.kill_runs import KEYS
from tests.reliability.runs import arguments, environment, need
from tests.reliability.runs import run as train
from tests.report.browser import BROWSER, Browser
from tests.tools.called import called
from zenith_det.commands import report as report_command

ARMS = """
broken:
  label: Broken on purpose
  overrides: {SOLVER.OPTIMIZER: SGD, SOLVER.GRADIENT_ACCUMULATION: 3}
"""
#: The small model of the tests of reliability, shorter.
OPTS = [
    str(word)
    for key, value in {
        **KEYS, "SOLVER.MAX_ITER": 6, "DATALOADER.NUM_WORKERS": 0, "CHECKPOINT.BEST": "", "TEST.MAX_IMAGES": 4,
    }.items()
    if key not in ("TEST.EVAL_PERIOD", "SEED", "SOLVER.BASE_LR", "SOLVER.AVERAGE.KIND", "SOLVER.AVERAGE.DECAY")
    for word in (key, value)
]  # fmt: skip


class Compared:
    """A comparison that was interrupted and then finished."""

    def __init__(self, data: SmallSet, root: Path) -> None:
        self.output = root / "out <&> ü"  # escaped wherever it is shown
        arms = root / "arms.yaml"
        arms.write_text(ARMS)
        self.command = [
            sys.executable, str(ROOT / "tools" / "compare.py"),
            "--config-file", str(ROOT / "configs" / "quickstart" / "mask_rcnn_zenith.yaml"),
            "--engine", "torchvision", "--num-gpus", "0", *data.flags, "--arms-file", str(arms),
            "--evaluations", "2", "--jobs", "2", "--threads", "1", "--output", str(self.output),
        ]  # fmt: skip

    def start(self, *arms: str, seeds: str = "0 1") -> subprocess.Popen[str]:
        words = ["--arms", *arms, "--seeds", *seeds.split(), *OPTS]
        return subprocess.Popen(
            [*self.command, *words],
            cwd=ROOT,
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def folder(self, arm: str, seed: int) -> Path:
        (found,) = (self.output / "runs" / arm).glob(f"lr*/seed{seed}")
        return found

    def result(self, arm: str, seed: int) -> dict[str, Any]:
        result: dict[str, Any] = json.loads((self.folder(arm, seed) / "result.json").read_text())
        return result


@pytest.fixture(scope="module")
def compared(shapes: SmallSet, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    made = Compared(shapes, tmp_path_factory.mktemp("compare"))
    process = made.start("zenith", seeds="0")
    deadline = time.monotonic() + 200
    # Interrupted while the first runs train; then the whole, with what is there already.
    while not list(made.output.glob("runs/zenith/*/seed0/metrics.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=200)
    made.interrupted = (process.returncode, printed)  # type: ignore[attr-defined]
    process = made.start("zenith", "sgd_step", "broken")
    printed, _ = process.communicate(timeout=400)
    made.finished = (process.returncode, printed)  # type: ignore[attr-defined]
    return made


def test_an_interrupted_comparison_goes_on_to_its_end(compared: Any) -> None:
    code, printed = compared.interrupted
    assert code == 75, printed
    assert "the same command goes on with them" in printed
    code, printed = compared.finished
    assert code == 0, printed
    for arm in ("zenith", "sgd_step"):
        for seed in (0, 1):
            assert compared.result(arm, seed)["status"] == "ok", printed
            assert "bbox/AP" in compared.result(arm, seed)["final"]
    assert compared.result("zenith", 0)["attempts"] == 2


def test_a_failed_arm_is_a_row(compared: Any) -> None:
    result = compared.result("broken", 0)
    assert (result["status"], result["exit_code"]) == ("failed", 2)
    assert "doesn't divide by 3" in result["reason"]
    with (compared.output / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["seed"], row["status"]) for row in rows] == [
        ("zenith", "0", "ok"), ("zenith", "1", "ok"), ("sgd_step", "0", "ok"), ("sgd_step", "1", "ok"),
        ("broken", "0", "failed"), ("broken", "1", "failed"),
    ]  # fmt: skip
    ok = [row for row in rows if row["status"] == "ok"]
    assert all(float(row["seconds_per_iteration"]) > 0 and row["bbox/AP"] and row["segm/AP"] for row in ok)
    table = compared.finished[1]
    assert re.search(r"^zenith +0\.02 +2/2 ", table, re.MULTILINE)  # the config's BASE_LR
    assert re.search(r"^sgd_step +0\.02 +2/2 .*reference", table, re.MULTILINE)


def test_the_json_has_what_the_table_has(compared: Any) -> None:
    content = json.loads((compared.output / "compare.json").read_text())
    assert content["reference"] == "sgd_step"
    assert content["command"].startswith(f"python {ROOT}/tools/compare.py --config-file")
    assert content["machine"]["torch"]
    zenith = next(arm for arm in content["arms"] if arm["arm"] == "zenith")
    finals = [run["bbox/AP"] for run in content["runs"] if run["arm"] == "zenith"]
    assert zenith["tasks"]["bbox"]["final"]["mean"] == pytest.approx(sum(finals) / 2)
    assert zenith["tasks"]["bbox"]["difference"]["n"] == 2


def assert_self_contained(page: str) -> None:
    """Nothing that a browser would fetch."""
    for attribute in re.findall(
        r"""\b(?:src|href|xlink:href|srcset|action|poster)\s*=\s*["']([^"']*)""", page
    ):
        assert attribute.startswith(("data:", "#")), attribute
    assert not re.search(r"@import|url\((?!#)|<script|<iframe|<link(?![^>]*data:)", page)


def test_the_page_needs_nothing_beside_it(compared: Any) -> None:
    page = (compared.output / "compare.html").read_text()
    assert_self_contained(page)
    assert "Broken on purpose" in page
    assert "doesn&#39;t divide by 3" in page
    assert "out &lt;&amp;&gt; ü" in page
    assert "out <&>" not in page
    assert page.count('role="img"') >= 6
    assert page.count("<img ") == page.count("<img src=") > 0
    assert all(re.findall(r'<img [^>]*alt="([^"]+)"', page))
    assert (compared.output / "figures" / "ap_bbox_iterations.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def report(compared: Any) -> Path:
    """The page of a finished run."""
    return make_report(compared.folder("zenith", 0))[1]


def make_report(folder: Path) -> tuple[str, Path]:
    done = called(report_command.main, str(folder))
    assert done.returncode == 0, done.stderr
    return done.stdout, folder / "report.html"


def test_the_report_of_a_run(report: Path) -> None:
    page = report.read_text()
    assert_self_contained(page)
    for text in ("6 of 6 iterations", "COCO AP in percent", "Largest objects missed", "SOLVER.ZENITH.WINDOW"):
        assert text in page
    assert "What is missing" not in page
    assert page.count("<img ") > 0


def test_the_report_of_what_is_left_of_a_run(compared: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(compared.folder("sgd_step", 0), folder)
    shutil.rmtree(folder / "inference")
    (folder / "log.txt").unlink()
    lines = [line for line in (folder / "metrics.json").read_text().splitlines() if "total_loss" in line]
    record = json.loads(lines[0]) | {"iteration": 3}
    record = {name: value for name, value in record.items() if "/AP" not in name}
    (folder / "metrics.json").write_text(json.dumps(record) + '\n{"iteration": 4, "tot')
    event = {"event": "rolled back", "iteration": 3, "reason": "loss <b>nan</b>", "to": None, "lr_scale": 0.5}
    (folder / "bad_steps.jsonl").write_text(json.dumps(event) + "\n{torn")
    printed, path = make_report(folder)
    page = path.read_text()
    assert "missing: no evaluation yet" in printed
    assert "4 of 6 iterations" in page
    assert "it was interrupted; --resume goes on" in page
    assert "loss &lt;b&gt;nan&lt;/b&gt;; back to the beginning, LR x 0.5" in page
    assert "coco_instances_results.json" in page
    assert_self_contained(page)


def test_a_folder_without_a_run_is_one_line(tmp_path: Path) -> None:
    done = called(report_command.main, str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")
def test_the_pages_in_a_browser(compared: Any, report: Path, tmp_path: Path) -> None:
    with Browser() as browser:
        for page in (compared.output / "compare.html", report):
            for width in (1280, 400):
                for dark in (False, True):
                    browser.open(page, width, dark=dark)
                    assert browser.complaints() == []
                    assert browser.requests() == [page.resolve().as_uri()]
                    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
                    # Every picture is there, and nothing is cut off at the side but what can be scrolled.
                    assert browser.evaluate(
                        "[...document.images].every(i => i.complete && i.naturalWidth > 0)"
                    )
                    assert browser.evaluate("getComputedStyle(document.body).color") == (
                        "rgb(233, 233, 233)" if dark else "rgb(28, 28, 28)"
                    )
            shot = browser.screenshot(tmp_path / "page.png")
            assert shot.stat().st_size > 20_000


@pytest.mark.detectron2
def test_the_report_of_a_detectron2_run(shapes: SmallSet, tmp_path: Path) -> None:
    need("detectron2")
    code, printed = train(
        arguments("detectron2", shapes.root, tmp_path, SOLVER__MAX_ITER=8, TEST__EVAL_PERIOD=4)
    )
    assert code == 0, printed
    printed, path = make_report(tmp_path)
    page = path.read_text()
    assert "missing" not in printed
    assert "8 of 8 iterations" in page
    assert "Largest objects missed" in page
    assert_self_contained(page)
