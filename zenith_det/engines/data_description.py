"""What a run's sets hold, told at its start and kept in its folder, for either engine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from zenith_det.data import CocoDataset, filter_empty, filter_few_keypoints
from zenith_det.data.overview import notes, overview_table
from zenith_det.data.statistics import STATISTICS_FILE, InputSize, SetStatistics, count_set, to_json
from zenith_det.files import write_whole
from zenith_det.training.processes.distributed import is_main_process

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
        if not is_main_process():
            return
        report = dataset.report
        found = [
            report.summary(),
            *(f"{report.name}: {line}" for line in (*report.remarks(), *report.suspicions())),
        ]
        left_out = self._left_out(dataset) if training else []
        for line in left_out:
            logger.info(line)
        self._sets.append(
            count_set(
                dataset.metadata,
                dataset.records,
                InputSize.of(self._cfg, training=training),
                role="training" if training else "validation",
                found=[*found, *left_out],
                problems=report.table() if report.count("stops", "dropped") else "",
            )
        )

    def _left_out(self, dataset: CocoDataset) -> list[str]:
        """Of which images training does without."""
        lines = []
        records = dataset.records
        if self._cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS and (
            left := len(records) - len(filter_empty(records))
        ):
            lines.append(
                f"{dataset.metadata.name}: {left} images without objects left out of training "
                "(DATALOADER.FILTER_EMPTY_ANNOTATIONS False keeps them)"
            )
        if self._cfg.MODEL.KEYPOINT_ON:
            least = self._cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
            if left := len(records) - len(filter_few_keypoints(records, least)):
                lines.append(
                    f"{dataset.metadata.name}: {left} images with fewer than {least} labelled keypoints left out of "
                    "training (MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE 0 keeps them)"
                )
        return lines

    def tell(self) -> None:
        """Log the table and what is worth knowing."""
        if not self._sets:
            return
        lines = notes(self._sets)
        logger.info("Data:\n%s", overview_table(self._sets, short=True))
        for line in lines:
            logger.log(logging.WARNING if line.warning else logging.INFO, "%s", line.text)

    def keep(self, output_dir: Path) -> None:
        """Write both to ``OUTPUT_DIR/datasets.json``.

        Raises:
            UserError: it can't be written.
        """
        if self._sets:
            lines = [line.text for line in notes(self._sets)]
            write_whole(output_dir / STATISTICS_FILE, to_json(self._sets, lines))
