"""The notebook of examples/predicting, cell after cell, with a run and images of the test's."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from tests.conftest import ROOT, SmallSet
from tests.predicting.trained_run import write_run
from zenith_det.data import load_coco_dataset

NOTEBOOK = ROOT / "examples" / "predicting" / "predicting.ipynb"


def test_the_notebook_runs(shapes: SmallSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", "mask", load_coco_dataset(shapes.train))
    names: dict[str, object] = {}
    last: list[object] = []
    given = {"RUN": str(tmp_path / "run"), "IMAGES": shapes.val[1]}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs")  # which would be somebody's data
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", ()):
            exec(source, names)
            assert given.keys() <= names.keys()
            names |= given
        else:
            # The model has random weights, whose scores are low.
            tree = ast.parse(source.replace("threshold=0.3", "threshold=0"))
            shown = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, str(NOTEBOOK), "exec"), names)
            if isinstance(shown, ast.Expr):
                last.append(eval(compile(ast.Expression(shown.value), str(NOTEBOOK), "eval"), names))
    classes, picture, lengths, counts, results = last
    assert classes == load_coco_dataset(shapes.train).metadata.thing_classes
    assert picture.size[0] >= 640  # type: ignore[attr-defined]
    assert lengths[0] == len(results) > lengths[3] == 1  # type: ignore[arg-type, index]
    assert sum(counts.values()) > lengths[0]  # type: ignore[attr-defined, index]
    assert "%" in capsys.readouterr().out
