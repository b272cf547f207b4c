"""The pictures that a run ends with, whichever engine it ran on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zenith_det.data import CocoDataset, read_image
from zenith_det.errors import MissingLibraryError

logger = logging.getLogger(__name__)

PICTURED_IMAGES = 6


def draw_run(
    output_dir: Path,
    dataset: CocoDataset | None,
    results: Sequence[Mapping[str, Any]],
    max_images: int = 0,
) -> list[Path]:
    """Draw ``curves.png``, where there are metrics, and ``predictions.png``, where there is a dataset.

    Args:
        output_dir: of the run.
        dataset: the checked set that was evaluated on.
        results: the detections in COCO's result format, with the file's own category ids.
        max_images: how many images, from the first on, were evaluated; 0: all.

    Returns:
        The pictures made; a line in the log names them.
    """
    # Here and not above: it imports matplotlib, for which a run that draws nothing need not wait.
    from zenith_det.report.curves import plot_curves
    from zenith_det.report.pictures import Instances, SheetRow, prediction_sheet

    pictures = []
    if (output_dir / "metrics.json").exists():
        pictures.append(plot_curves(output_dir))
    if dataset is not None:
        used = dataset.records[: max_images or len(dataset.records)]
        by_image: dict[int, list[Mapping[str, Any]]] = {}
        for result in results:
            by_image.setdefault(result["image_id"], []).append(result)
        with_objects = [record for record in used if record["annotations"]] or used
        step = max(1, len(with_objects) // PICTURED_IMAGES)
        rows = [
            SheetRow(
                read_image(record["file_name"]),
                Instances.from_record(record),
                Instances.from_results(by_image.get(record["image_id"], []), dataset.metadata),
            )
            for record in with_objects[::step][:PICTURED_IMAGES]
        ]
        try:
            pictures.append(prediction_sheet(rows, dataset.metadata, output_dir / "predictions.png"))
        except MissingLibraryError as error:
            logger.warning("predictions.png isn't drawn: %s", error)
    if pictures:
        logger.info("pictures: %s", ", ".join(str(picture) for picture in pictures))
    return pictures
