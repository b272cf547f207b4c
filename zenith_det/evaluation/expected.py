"""Results that a config says in advance, for runs that are tests of accuracy."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from zenith_det.errors import UnexpectedResultsError

logger = logging.getLogger(__name__)


def check_expected(expected: Sequence[Sequence[Any]], scalars: Mapping[str, float]) -> None:
    """Compare an evaluation with ``TEST.EXPECTED_RESULTS``, as Detectron2's ``verify_results`` does.

    Args:
        expected: (task, metric, value, tolerance) each, in percent; empty: nothing is compared.
        scalars: of the evaluation, such as ``bbox/AP``; with several test sets ``<set>/bbox/AP``, whose task is
            ``<set>/bbox``.

    Raises:
        UnexpectedResultsError: a metric is further off than its tolerance, not finite, or not there.
    """
    off = []
    for task, metric, value, tolerance in expected:
        name = f"{task}/{metric}"
        found = scalars.get(name, math.nan)
        if not (math.isfinite(found) and abs(found - value) <= tolerance):
            told = f"{found:.4f}" if name in scalars else "not among the results"
            off.append(f"{name} is {told}, not {value} ± {tolerance}")
    if off:
        raise UnexpectedResultsError(f"TEST.EXPECTED_RESULTS: {'; '.join(off)}")
    if expected:
        logger.info("the results are those of TEST.EXPECTED_RESULTS")
