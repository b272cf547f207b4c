"""tools/gradient_noise.py on a real model: what it splits, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zenith_det.commands import gradient_noise
from zenith_det.data.synthetic import generate, split_files
from zenith_det.errors import ConfigError

CONFIG = "configs/quickstart/mask_rcnn_small.yaml"


def shares(tmp_path: Path, images: int) -> list[float]:
    generate(tmp_path / "set", train=images, val=0, size=64, seed=3)
    json_file, pictures = map(str, split_files(tmp_path / "set", "train", "instances"))
    gradient_noise.main(
        ["--config-file", CONFIG, "--batches", "16", "--batch-sizes", "1", "4", "--train-json", json_file,
         "--train-images", pictures, "--output", str(tmp_path / "noise.json")]
    )  # fmt: skip
    return [row["share"] for row in json.loads((tmp_path / "noise.json").read_text())]


def test_what_differs_between_batches_is_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, four = shares(tmp_path / "many", 32)
    assert 0 < four < one < 1  # four images have less of it than one
    # Of one image there is but the choice of regions and the flip.
    assert shares(tmp_path / "single", 1)[0] < one
    assert "before training" in capsys.readouterr().out


def test_too_few_batches_are_refused() -> None:
    with pytest.raises(ConfigError, match="--batches 7: a multiple of 4, 8 or more"):
        gradient_noise.main(["--config-file", CONFIG, "--batches", "7"])
