"""``TEST.EXPECTED_RESULTS``: what passes, what is told, and that Detectron2 judges the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from zenith_det.errors import UnexpectedResultsError
from zenith_det.evaluation import check_expected

SCALARS = {"bbox/AP": 38.5, "bbox/AP50": 60.0, "segm/AP": 35.0, "segm/APs": float("nan")}
CASES: list[tuple[list[list[Any]], bool]] = [
    ([], True),
    ([["bbox", "AP", 38.5, 0.0]], True),
    ([["bbox", "AP", 38.4, 0.2], ["segm", "AP", 35.2, 0.3]], True),
    ([["bbox", "AP", 38.2, 0.2]], False),
    ([["bbox", "AP", 38.5, 0.2], ["segm", "AP", 36, 0.5]], False),
    ([["segm", "APs", 20.0, 99.0]], False),
    ([["bbox", "AP75", 40.0, 99.0]], False),
]


@pytest.mark.parametrize(("expected", "passes"), CASES)
def test_a_metric_that_is_off_or_not_there_is_refused(expected: list[list[Any]], passes: bool) -> None:
    if passes:
        check_expected(expected, SCALARS)
    else:
        with pytest.raises(UnexpectedResultsError):
            check_expected(expected, SCALARS)


def test_the_line_names_each_that_is_off_and_no_other() -> None:
    expected = [["bbox", "AP", 40, 0.5], ["bbox", "AP50", 60, 0.5], ["keypoints", "AP", 50, 1]]
    with pytest.raises(UnexpectedResultsError) as caught:
        check_expected(expected, SCALARS)
    assert str(caught.value) == (
        "TEST.EXPECTED_RESULTS: bbox/AP is 38.5000, not 40 ± 0.5; "
        "keypoints/AP is not among the results, not 50 ± 1"
    )


@pytest.mark.detectron2
@pytest.mark.parametrize(("expected", "passes"), CASES)
def test_detectron2_judges_the_same(expected: list[list[Any]], passes: bool) -> None:
    theirs = pytest.importorskip("detectron2.evaluation", reason="needs the real Detectron2")
    results: dict[str, dict[str, float]] = {}
    for name, value in SCALARS.items():
        task, metric = name.split("/")
        results.setdefault(task, {})[metric] = value
    cfg = SimpleNamespace(TEST=SimpleNamespace(EXPECTED_RESULTS=expected))
    if passes:
        assert theirs.verify_results(cfg, results)
    else:
        with pytest.raises(SystemExit) as ended:
            theirs.verify_results(cfg, results)
        assert ended.value.code == UnexpectedResultsError.exit_code
