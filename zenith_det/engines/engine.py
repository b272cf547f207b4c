"""What a run asks of an engine; all else of a run is the same on every engine."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import nn

from zenith_det.config import CfgNode, LoadedConfig
from zenith_det.data import CocoDataset, DatasetMetadata
from zenith_det.engines.data_description import DataDescription
from zenith_det.training.logs.events import EventStorage

#: A dataset's entry for one image; the fields of those that this toolkit reads are Detectron2's.
Record = dict[str, Any]
#: What a model takes for one image.
Sample = dict[str, Any]
Batch = list[Sample]
#: Detections in one image, at its original size, best first: ``boxes`` ``(N, 4)`` xyxy, ``scores`` and ``classes``
#: ``(N,)``, and where the model has them ``masks`` ``(N, H, W)`` and ``keypoints`` ``(N, K, 3)``.
Detections = dict[str, np.ndarray]


@dataclass(frozen=True)
class TrainingSet:
    """What is trained on.

    Attributes:
        names: of ``DATASETS.TRAIN``.
        records: of the images that are left to train on.
        metadata: classes and keypoints; ``None`` for sets that only the engine's library knows.
        repeats: how often each image comes in an epoch, on average; ``None``: once.
        subset: train on so many of the images, chosen by the run's seed; 0: on all.
    """

    names: tuple[str, ...]
    records: Sequence[Record]
    metadata: DatasetMetadata | None
    repeats: np.ndarray | None = None
    subset: int = 0


@dataclass(frozen=True)
class TestSet:
    """One of ``DATASETS.TEST``.

    Attributes:
        name: as in ``DATASETS.TEST``; for a set given by its files, the annotation file.
        dataset: the checked set, its categories matched to the model's classes; ``None`` for one that only the
            engine's library knows.
        other: gives the records where ``dataset`` is ``None``.
    """

    __test__ = False

    name: str
    dataset: CocoDataset | None
    other: Callable[[], Sequence[Record]] = list

    @property
    def label(self) -> str:
        """For messages, scalars and folders."""
        return self.dataset.metadata.name if self.dataset else self.name

    @property
    def metadata(self) -> DatasetMetadata | None:
        return self.dataset.metadata if self.dataset else None

    def records(self, most: int) -> Sequence[Record]:
        """The first ``most`` records (0: all)."""
        records = self.dataset.records if self.dataset else self.other()
        return records[: most or len(records)]


class Engine(Protocol):
    """A library that trains detectors. Configurations are this toolkit's.

    Attributes:
        name: as in ``--engine``.
        loggers: of the library, whose lines belong into the run's log.
    """

    name: str
    loggers: tuple[str, ...]

    def prepare(self, loaded: LoadedConfig) -> None:
        """Refuse what the engine can't do, and set up its library, with ``MODEL.DEVICE`` resolved.

        Raises:
            ConfigError: a key that the engine can't honour.
        """

    def training_set(self, loaded: LoadedConfig, description: DataDescription | None = None) -> TrainingSet:
        """Read and check what ``DATASETS.TRAIN`` names; keys that depend on it follow it.

        Args:
            description: is given each set as read.

        Raises:
            ConfigError, DatasetError: it can't be trained on.
        """

    def test_sets(self, loaded: LoadedConfig, classes: Sequence[str] | None) -> list[TestSet]:
        """Read and check what ``DATASETS.TEST`` names.

        Args:
            classes: the model's; default: the first set's.

        Raises:
            ConfigError, DatasetError: one can't be evaluated on.
        """

    def build_model(self, cfg: CfgNode) -> nn.Module:
        """The model on its device, at random weights.

        In training it takes a :data:`Batch` and returns a dict of scalar losses, otherwise an output per image.
        """

    def load_weights(
        self, cfg: CfgNode, model: nn.Module, *, require_all: bool = False
    ) -> tuple[int, int] | None:
        """Load ``MODEL.WEIGHTS``; (tensors loaded, tensors of the model), or ``None`` where none are named.

        Args:
            require_all: every tensor must be in the file, as evaluation needs.

        Raises:
            CheckpointError: they can't be read, or are another model's.
        """

    def training_mapper(
        self, cfg: CfgNode, names: Sequence[str], metadata: DatasetMetadata | None
    ) -> Callable[[Record, np.random.Generator], Sample]:
        """Makes a sample with targets of a record; what it draws at random comes from the generator alone.

        Args:
            names: of the sets that the records are of.
            metadata: of the training set.
        """

    def shown(self, cfg: CfgNode, sample: Sample) -> tuple[np.ndarray, Detections]:
        """What a training sample shows: its pixels, BGR uint8 ``(H, W, 3)``, and its targets.

        The targets are as :data:`Detections`, in pixels of that image and without scores; the third number of a
        keypoint is its visibility.
        """

    def test_mapper(self, cfg: CfgNode, names: Sequence[str]) -> Callable[[Record], Sample]:
        """Makes a sample to detect in of a record."""

    def image_mapper(self, cfg: CfgNode) -> Callable[[np.ndarray], Sample]:
        """The same of pixels, ``(H, W, C)`` in ``INPUT.FORMAT``."""

    def detections(self, output: Any) -> Detections:
        """The detections in what a model gave for one image, on the host."""

    def evaluate_other(
        self, cfg: CfgNode, model: nn.Module, test_set: TestSet, folder: Path
    ) -> dict[str, float]:
        """Scalars (percent) of a test set without a checked dataset; files go into ``folder``.

        Raises:
            EvaluationStopped: the run has to end.
        """

    def recording(self, storage: EventStorage) -> AbstractContextManager[Any]:
        """Around training: what a model logs by itself goes into ``storage``."""

    def before_evaluation(
        self, cfg: CfgNode, model: nn.Module, batches: Callable[[], Iterator[Batch]]
    ) -> None:
        """Called where an evaluation is due, before the checkpoint is saved.

        Args:
            batches: begins with the training batches anew.
        """

    def augmented(self, cfg: CfgNode, model: nn.Module, metadata: DatasetMetadata | None) -> nn.Module:
        """The model under test-time augmentation, ``TEST.AUG``; takes and gives what ``model`` does in evaluation.

        Args:
            metadata: of what the model was trained on, else of the test set: which keypoints a mirror image exchanges.
        """


def load_engine(name: str) -> Engine:
    """The engine that ``--engine`` calls ``name``; its library is imported."""
    engine: Engine = importlib.import_module(f"zenith_det.engines.{name}_engine.engine").ENGINE
    return engine
