"""What a run's sets hold, told at its start and kept in its folder, for either engine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from zenith_det.data import CocoDataset
from zenith_det.data.overview import notes, overview_table
from zenith_det.data.statistics import STATISTICS_FILE, InputSize, SetStatistics, count_set, to_json
from zenith_det.errors import UserError
from zenith_det.training.distributed import is_main_process
from zenith_det.training.run_record import replace_file

logger = logging.getLogger(__name__)


class DataDescription:
    """Counts sets as they are read; the main process alone.

    Args:
        cfg: ``INPUT`` counts.
    """

    def __init__(self, cfg: Any) -> None:
        self._cfg = cfg
        self._sets: list[SetStatistics] = []

    def add(self, dataset: CocoDataset, *, training: bool) -> None:
        """Count a set as it was read, before any image is left out of training."""
        if is_main_process():
            report = dataset.report
            self._sets.append(
                count_set(
                    dataset.metadata,
                    dataset.records,
                    InputSize.of(self._cfg, training=training),
                    role="training" if training else "validation",
                    found=(report.summary(), report.table() if report.count("stops", "dropped") else ""),
                )
            )

    def tell(self, output_dir: Path) -> None:
        """Log the table and what is worth knowing; keep both in ``OUTPUT_DIR/datasets.json``.

        Raises:
            UserError: that can't be written.
        """
        if not self._sets:
            return
        lines = notes(self._sets)
        logger.info("Data:\n%s", overview_table(self._sets, short=True))
        for line in lines:
            logger.log(logging.WARNING if line.warning else logging.INFO, "%s", line.text)
        path = output_dir / STATISTICS_FILE
        try:
            replace_file(path, to_json(self._sets, [line.text for line in lines]).encode())
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
