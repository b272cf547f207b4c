"""How long Python takes to import the package, beside torch alone."""

from __future__ import annotations

import subprocess
import sys

from zenith_det.benchmarking.measuring import Case, interleave
from zenith_det.benchmarking.reporting import Comparison, Ratio

__all__ = ["compare_imports"]


def compare_imports(*, rounds: int, warmup: int) -> Comparison:
    """``python -c "import zenith_det"`` beside ``python -c "import torch"``, each a process of its own."""

    def case(module: str) -> Case:
        command = [sys.executable, "-c", f"import {module}"]
        return Case(f"import {module}", lambda: subprocess.run(command, check=True))

    cases = [case(module) for module in ("zenith_det", "zenith_det.optim", "torch")]
    samples = interleave(cases, rounds=rounds, warmup=warmup)
    ratios = [Ratio(one.name, "import torch", 1.10) for one in cases[:2]]
    return Comparison("start of Python", samples, ratios)
