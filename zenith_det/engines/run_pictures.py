"""The pictures that a run begins and ends with, whichever engine it ran on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from zenith_det.config import CfgNode
from zenith_det.data import CocoDataset, DatasetMetadata, read_image
from zenith_det.engines.engine import Batch, Engine, Sample
from zenith_det.errors import MissingLibraryError, one_line
from zenith_det.evaluation.recommended import DEFAULT_SCORE

logger = logging.getLogger(__name__)

PICTURED_IMAGES = 6
BATCH_FILE = "train_batch.png"
PICTURED_SAMPLES = 9
_CELL = 480  # pixels that a sample's longer side gets


def pictured(
    batches: Iterator[Batch],
    engine: Engine,
    cfg: CfgNode,
    metadata: DatasetMetadata | None,
    output_dir: Path,
) -> Iterator[Batch]:
    """The batches as they are; of the first of them ``train_batch.png`` is drawn on the way.

    Nothing is drawn at random and nothing in a batch is changed. A picture that can't be drawn is told and done
    without.
    """
    first: list[tuple[int, Sample]] | None = []
    for number, batch in enumerate(batches, 1):
        if first is not None:
            first += [(number, sample) for sample in batch]
            if len(first) >= PICTURED_SAMPLES or number == cfg.SOLVER.MAX_ITER:
                try:
                    _draw_samples(first[:PICTURED_SAMPLES], engine, cfg, metadata, output_dir / BATCH_FILE)
                except Exception as error:  # whatever it is: a run is worth more than its picture
                    logger.warning("%s isn't drawn: %s", BATCH_FILE, one_line(str(error)))
                first = None
        yield batch


def _draw_samples(
    samples: Sequence[tuple[int, Sample]],
    engine: Engine,
    cfg: CfgNode,
    metadata: DatasetMetadata | None,
    path: Path,
) -> None:
    from zenith_det.report.pictures import draw_instances, labelled_sheet, titled

    cells = []
    for number, sample in samples:
        pixels, targets = engine.shown(cfg, sample)
        height, width = pixels.shape[:2]
        drawn = draw_instances(
            pixels, targets["boxes"], targets["classes"], None, targets.get("masks"), targets.get("keypoints"),
            metadata, scale=_CELL / max(height, width),
        )  # fmt: skip
        name = os.path.basename(str(sample.get("file_name", "")))
        cells.append((drawn, f"batch {number}: {width}x{height} {name}"))
    labelled_sheet(cells, titled("The first training batches, as the network gets them", metadata), path)
    logger.info("the first training batches: %s", path)


def draw_run(
    output_dir: Path,
    dataset: CocoDataset | None,
    results: Sequence[Mapping[str, Any]],
    max_images: int = 0,
    score: float = DEFAULT_SCORE,
) -> list[Path]:
    """Draw ``curves.png``, where there are metrics, and ``predictions.png``, where there is a dataset.

    Args:
        output_dir: of the run.
        dataset: the checked set that was evaluated on.
        results: the detections in COCO's result format, with the file's own category ids.
        max_images: how many images, from the first on, were evaluated; 0: all.
        score: the least of a detection that is drawn, 0..1.

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
        rows = (
            SheetRow(
                read_image(record["file_name"], value_range=record.get("value_range")),
                Instances.from_record(record),
                Instances.from_results(by_image.get(record["image_id"], []), dataset.metadata),
                os.path.basename(record["file_name"]),
            )
            for record in with_objects[::step][:PICTURED_IMAGES]
        )
        try:
            path = output_dir / "predictions.png"
            pictures.append(prediction_sheet(rows, dataset.metadata, path, score))
        except MissingLibraryError as error:
            logger.warning("predictions.png isn't drawn: %s", error)
    if pictures:
        logger.info("pictures: %s", ", ".join(str(picture) for picture in pictures))
    return pictures
