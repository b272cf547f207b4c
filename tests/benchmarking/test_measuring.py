"""Cases take turns, and the figures made of their times are what they say."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from zenith_det.benchmarking.measuring import Case, Samples, interleave
from zenith_det.benchmarking.reporting import Comparison, Ratio, Report
from zenith_det.errors import UserError


def test_cases_take_turns_and_warmup_does_not_count() -> None:
    order: list[str] = []
    cases = [
        Case(name, lambda name=name: order.append(name), lambda: order.append("before")) for name in "abc"
    ]
    samples = interleave(cases, rounds=3, warmup=2)
    ran = [name for name in order if name != "before"]
    assert order[::2] == ["before"] * 15
    rounds = ["".join(ran[i : i + 3]) for i in range(0, 15, 3)]
    assert {"".join(sorted(one)) for one in rounds} == {"abc"}
    # Each case is first in one of the rounds that count.
    assert {one[0] for one in rounds[2:]} == {"a", "b", "c"}
    assert {len(one.seconds) for one in samples.values()} == {3}


def test_what_before_does_is_not_timed() -> None:
    import time

    samples = interleave([Case("a", lambda: None, lambda: time.sleep(0.2))], rounds=2, warmup=0)
    assert samples["a"].least < 0.2


def test_two_cases_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="must differ"):
        interleave([Case("a", lambda: None), Case("a", lambda: None)], rounds=1, warmup=0)


def test_quartiles_and_median() -> None:
    samples = Samples((5.0, 1.0, 3.0, 2.0, 4.0))
    assert samples.median == 3.0
    assert samples.quartiles == (2.0, 4.0)
    assert samples.least == 1.0
    assert Samples((2.0,)).quartiles == (2.0, 2.0)


def test_ratios_are_of_medians_and_come_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = {"ours": Samples((1.0, 2.0, 9.0)), "theirs": Samples((4.0, 4.5, 3.0))}
    report = Report("x", {"rounds": 3}, [Comparison("both", samples, [Ratio("ours", "theirs", 0.4)])])
    json_file, picture = report.save(tmp_path / "new" / "folder")
    ratio = json.loads(json_file.read_text())["comparisons"][0]["ratios"][0]
    assert ratio == {"of": "ours", "to": "theirs", "ratio": 0.5, "ratio_of_least": 1 / 3, "at_most": 0.4}
    assert picture.read_bytes().startswith(b"\x89PNG")
    report.show()
    shown = capsys.readouterr().out
    assert shown.index("ratio of medians") < shown.index("half of the runs")
    assert "0.500" in shown


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        Report("x", {}, [Comparison("a", {"a": Samples((1.0,))})]).save(tmp_path / "file")


def check(report: dict[str, object]) -> None:
    """What holds for every report that a subcommand leaves."""
    comparisons = report["comparisons"]
    assert isinstance(comparisons, list)
    assert comparisons
    for comparison in comparisons:
        cases = {case["name"]: case for case in comparison["cases"]}
        for case in cases.values():
            assert case["seconds"]
            assert all(seconds > 0 for seconds in case["seconds"])
            assert case["median_s"] == statistics.median(case["seconds"])
            first, third = case["quartiles_s"]
            assert case["least_s"] <= first <= case["median_s"] <= third
        for ratio in comparison["ratios"]:
            wanted = cases[ratio["of"]]["median_s"] / cases[ratio["to"]]["median_s"]
            assert ratio["ratio"] == pytest.approx(wanted, rel=1e-12)
