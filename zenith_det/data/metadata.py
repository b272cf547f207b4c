"""What a dataset's classes and keypoints are called and how they hang together."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

from zenith_det.data.sides import has_side
from zenith_det.errors import DatasetError, is_printable, one_line, quote

COCO_KEYPOINT_NAMES = (
    "nose",
    "left_eye",
    "right_eye",
    "left_ear",
    "right_ear",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_wrist",
    "right_wrist",
    "left_hip",
    "right_hip",
    "left_knee",
    "right_knee",
    "left_ankle",
    "right_ankle",
)
#: COCO's person skeleton, 1-based as in COCO's files.
COCO_SKELETON = (
    (16, 14), (14, 12), (17, 15), (15, 13), (12, 13), (6, 12), (7, 13), (6, 7), (6, 8), (7, 9),
    (8, 10), (9, 11), (2, 3), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7),
)  # fmt: skip
#: How far annotators differ per keypoint, relative to the object's size
#: (cocodataset.org/#keypoints-eval; the values of pycocotools' ``Params.kpt_oks_sigmas``).
COCO_OKS_SIGMAS = (
    0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062,
    0.107, 0.107, 0.087, 0.087, 0.089, 0.089,
)  # fmt: skip


@dataclass(frozen=True)
class DatasetMetadata:
    """Names, ids and keypoint structure of a dataset.

    Attributes:
        name: the dataset's name, or its annotation file's stem.
        json_file: absolute path of the annotation file.
        image_root: absolute path of the folder that ``file_name`` is relative to.
        thing_classes: class names; a record's ``category_id`` indexes them.
        thing_dataset_id_to_contiguous_id: category id in the file -> index into ``thing_classes``.
        keypoint_names: in the order of the annotations; empty when the file declares none.
        keypoint_flip_map: pairs of names that change places in a mirrored image.
        keypoint_connections: pairs of 0-based keypoint indices to draw bones between.
        keypoint_oks_sigmas: per keypoint, for keypoint AP; empty when neither COCO's nor given.
        flip_pairs_given: ``keypoint_flip_map`` is the file's own ``flip_pairs``, and not found by the names.
        keypoint_fault: why keypoints can't be trained although the file has some; "" otherwise.
    """

    name: str
    json_file: str
    image_root: str
    thing_classes: tuple[str, ...]
    thing_dataset_id_to_contiguous_id: dict[int, int]
    keypoint_names: tuple[str, ...] = ()
    keypoint_flip_map: tuple[tuple[str, str], ...] = ()
    keypoint_connections: tuple[tuple[int, int], ...] = ()
    keypoint_oks_sigmas: tuple[float, ...] = ()
    flip_pairs_given: bool = False
    keypoint_fault: str = ""

    @property
    def num_classes(self) -> int:
        return len(self.thing_classes)

    @property
    def num_keypoints(self) -> int:
        return len(self.keypoint_names)

    @property
    def keypoint_flip_indices(self) -> list[int]:
        """Per keypoint, the index of the one that takes its place in a mirrored image."""
        partner = {name: name for name in self.keypoint_names}
        for first, second in self.keypoint_flip_map:
            partner[first], partner[second] = second, first
        index = {name: number for number, name in enumerate(self.keypoint_names)}
        return [index[partner[name]] for name in self.keypoint_names]

    @property
    def lacks_flip_pairs(self) -> bool:
        """Whether there are keypoints that may have sides, and nothing tells which of them a mirror swaps."""
        return self.num_keypoints > 1 and not self.keypoint_flip_map and not self.flip_pairs_given

    @property
    def unpaired_sides(self) -> tuple[str, ...]:
        """Keypoints whose names say a side, and that no mirror swaps: nothing has the name of the other side."""
        paired = {name for pair in self.keypoint_flip_map for name in pair}
        if self.flip_pairs_given:
            return ()
        return tuple(name for name in self.keypoint_names if name not in paired and has_side(name))

    @property
    def sided_classes(self) -> tuple[str, ...]:
        """Classes that a mirror would turn into another: their names say a side."""
        return tuple(name for name in self.thing_classes if has_side(name))

    @property
    def contiguous_id_to_thing_dataset_id(self) -> dict[int, int]:
        """Index into ``thing_classes`` -> category id in the file, for results in the file's own ids."""
        return {index: original for original, index in self.thing_dataset_id_to_contiguous_id.items()}

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint remembers: enough to use a model without its training set. Plain lists and strings."""
        own = self.contiguous_id_to_thing_dataset_id
        return {
            "name": self.name,
            "thing_classes": list(self.thing_classes),
            "category_ids": [own[index] for index in range(self.num_classes)],
            "keypoint_names": list(self.keypoint_names),
            "keypoint_flip_map": [list(pair) for pair in self.keypoint_flip_map],
            "keypoint_connections": [list(pair) for pair in self.keypoint_connections],
        }

    @classmethod
    def from_dict(cls, facts: Any) -> DatasetMetadata | None:
        """The inverse of :meth:`to_dict`; ``None`` for anything else.

        Category ids count from 0 in a checkpoint of before they were kept.

        Raises:
            DatasetError: it is a dataset's, and broken; a checkpoint may come from anywhere.
        """
        if not isinstance(facts, Mapping) or "thing_classes" not in facts:
            return None

        def checked(key: str, is_right: Callable[[Any], bool]) -> list[Any]:
            value = facts.get(key, [])
            if not isinstance(value, list | tuple) or not all(map(is_right, value)):
                raise DatasetError(
                    f"the dataset that a checkpoint remembers is broken: {key} is {quote(value)}"
                )
            return list(value)

        def is_name(value: Any) -> bool:
            return isinstance(value, str) and is_printable(value)

        def pair_of(value: Any, choices: Container[Any]) -> bool:
            return (
                isinstance(value, list | tuple)
                and len(value) == 2
                and all(isinstance(end, str | int) and end in choices for end in value)
            )

        names = checked("thing_classes", is_name)
        keypoints = checked("keypoint_names", is_name)
        known = set(keypoints)
        ids = checked("category_ids", lambda value: type(value) is int) or list(range(len(names)))
        if len(set(ids)) != len(names):
            raise DatasetError(
                f"the dataset that a checkpoint remembers is broken: category_ids is {quote(ids)} for "
                f"{len(names)} classes"
            )
        return cls(
            name=one_line(str(facts.get("name", ""))),
            json_file="",
            image_root="",
            thing_classes=tuple(names),
            thing_dataset_id_to_contiguous_id={own: index for index, own in enumerate(ids)},
            keypoint_names=tuple(keypoints),
            keypoint_flip_map=tuple(
                (a, b) for a, b in checked("keypoint_flip_map", lambda pair: pair_of(pair, known))
            ),
            keypoint_connections=tuple(
                (a, b)
                for a, b in checked("keypoint_connections", lambda pair: pair_of(pair, range(len(keypoints))))
            ),
        )
