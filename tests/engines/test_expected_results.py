"""Runs with ``TEST.EXPECTED_RESULTS``: trained, resumed, evaluated alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import SmallSet
from tests.reliability import runs


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_results_that_are_off_end_with_1_and_a_line(engine: str, shapes: SmallSet, tmp_path: Path) -> None:
    runs.need(engine)
    output = tmp_path / "run"

    def expecting(ap: float, *flags: str, **keys: object) -> tuple[int, list[str]]:
        words = runs.arguments(
            engine, shapes.root, output, *flags, TEST__EXPECTED_RESULTS=[["bbox", "AP", ap, 0.01]],
            SOLVER__MAX_ITER=1, **keys,
        )  # fmt: skip
        code, printed = runs.run(words)
        assert "Traceback" not in printed
        return code, [line for line in printed.splitlines() if line.startswith("error: ")]

    def is_off(code: int, lines: list[str]) -> bool:
        return code == 1 and len(lines) == 1 and "TEST.EXPECTED_RESULTS: bbox/AP is " in lines[0]

    assert is_off(*expecting(90.0))
    lines = (output / "metrics.json").read_text().splitlines()
    found = next(record["bbox/AP"] for record in map(json.loads, lines) if "bbox/AP" in record)
    # The run has ended, and is compared again all the same.
    assert is_off(*expecting(90.0, "--resume"))
    assert expecting(found, "--resume") == (0, [])
    alone = {"MODEL__WEIGHTS": output / "model_final.pth", "OUTPUT_DIR": tmp_path / "alone"}
    assert is_off(*expecting(90.0, "--eval-only", **alone))
    assert expecting(found, "--eval-only", **alone) == (0, [])
