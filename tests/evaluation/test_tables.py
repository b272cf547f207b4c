"""Tables for people; copypaste lines as Detectron2 prints them."""

from __future__ import annotations

import logging
import re

import pytest

from zenith_det.evaluation import copypaste_lines, log_results, results_table
from zenith_det.evaluation.explain import NO_GROUND_TRUTH

NAN = float("nan")
BOX = {
    "AP": 41.23456,
    "AP50": 60.0,
    "AP75": 44.4,
    "APs": NAN,
    "APm": 1.5,
    "APl": 50.25,
    "AP-cat": 10.0,
    "AP-hot-dog": NAN,
}
KEYPOINTS = {"AP": 7.0, "AP50": 8.0, "AP75": 6.0, "APm": 5.0, "APl": 4.0}


def test_copypaste_lines_are_exact() -> None:
    assert copypaste_lines({"bbox": BOX, "keypoints": KEYPOINTS}) == [
        "copypaste: Task: bbox",
        "copypaste: AP,AP50,AP75,APs,APm,APl",
        "copypaste: 41.2346,60.0000,44.4000,nan,1.5000,50.2500",
        "copypaste: Task: keypoints",
        "copypaste: AP,AP50,AP75,APm,APl",
        "copypaste: 7.0000,8.0000,6.0000,5.0000,4.0000",
    ]


@pytest.mark.detectron2
def test_copypaste_lines_equal_detectron2s(caplog: pytest.LogCaptureFixture) -> None:
    testing = pytest.importorskip("detectron2.evaluation.testing", reason="Detectron2 is not installed")
    with caplog.at_level(logging.INFO):
        testing.print_csv_format({"bbox": BOX, "keypoints": KEYPOINTS})
    assert copypaste_lines({"bbox": BOX, "keypoints": KEYPOINTS}) == caplog.messages


def test_table_shows_each_number_under_its_head() -> None:
    lines = results_table({"bbox": BOX, "keypoints": KEYPOINTS}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["", "AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert cells[2] == ["box", "41.23", "60.00", "44.40", "n/a", "1.50", "50.25"]
    assert cells[3] == ["keypoint", "7.00", "8.00", "6.00", "-", "5.00", "4.00"]
    assert cells[5] == ["class", "box AP", "keypoint AP"]
    assert cells[7:] == [["cat", "10.00", "-"], ["hot-dog", "n/a", "-"]]
    assert len({len(line) for line in lines[:4]}) == 1


def test_eighty_classes_fill_columns_and_each_is_there_once() -> None:
    results = {"bbox": {"AP": 1.0, **{f"AP-class{n}": float(n) for n in range(80)}}}
    table = results_table(results).split("\n\n")[1]
    assert max(map(len, table.splitlines())) <= 120
    assert len(table.splitlines()) < 30
    found = re.findall(r"class(\d+) +\| +([\d.]+)", table)
    assert sorted((int(n), float(v)) for n, v in found) == [(n, float(n)) for n in range(80)]


def test_one_class_needs_no_second_table() -> None:
    assert "class" not in results_table({"bbox": {"AP": 1.0, "AP-only": 1.0}})


def test_log_has_tables_reasons_and_copypaste_last(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="zenith_det"):
        log_results(
            {"bbox": BOX}, ["bbox AP75 is 0: no detection of this class", f"{NO_GROUND_TRUTH}bbox APs"]
        )
    assert caplog.messages[-3:] == copypaste_lines({"bbox": BOX})
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        "bbox AP75 is 0: no detection of this class"
    ]
    assert f"{NO_GROUND_TRUTH}bbox APs" in caplog.messages  # what a set merely lacks is no warning
    assert all(r.name.startswith("zenith_det") for r in caplog.records)
