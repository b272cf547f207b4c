"""The example of ZENITH in a plain PyTorch loop runs, learns, and shows a learning rate that falls."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_spirals() -> None:
    command = [sys.executable, str(ROOT / "examples/pytorch_loop/train_spirals.py"), "--steps", "600"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r" +\d+ ", line)]
    lrs, ratios = [float(row[2]) for row in rows], [float(row[3]) for row in rows]
    assert [int(row[0]) for row in rows] == [1, 100, 200, 300, 400, 500, 600]
    assert lrs[0] == 0.3
    assert lrs[-1] < 0.15
    for lr, ratio in zip(lrs, ratios):
        assert abs(lr - 0.3 * ratio) < 1e-4
    accuracy = re.search(r"accuracy on new points: ([\d.]+)%", done.stdout)
    assert accuracy is not None
    assert float(accuracy[1]) > 95
