"""From an annotation file's categories to a dataset's metadata: classes and keypoints."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from zenith_det.data.metadata import COCO_KEYPOINT_NAMES, COCO_OKS_SIGMAS, DatasetMetadata
from zenith_det.data.values import as_id
from zenith_det.errors import DatasetError, is_printable, listed, quote

logger = logging.getLogger(__name__)

#: The longest name of a category or a keypoint, in characters.
MAX_NAME = 500
#: Keypoints of one object; sets of faces have 478.
MAX_KEYPOINTS = 1000
_LEFT_AND_RIGHT = (("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT"))
#: What becomes of a set's objects of classes that are not among those of the training set.
OtherClasses = Literal["refuse", "keep"]
# How a keypoint's name tells its side: by the word anywhere; by the letter where it stands alone (l_hip, "hip L"),
# or is a word of its own in camel case (LHip, hipL).
_SIDE = re.compile(
    r"left|right|Left|Right|LEFT|RIGHT|(?<![^\W_])[lrLR](?=[\W_]|\Z|[A-Z][a-z])|(?<=[a-z])[LR](?=[\W_]|\Z)"
)
_OTHER_SIDE = {a: b for pair in (*_LEFT_AND_RIGHT, ("l", "r"), ("L", "R")) for a, b in (pair, pair[::-1])}


def _is_name(value: object) -> bool:
    """Whether it is a text that tables and log files can hold: JSON may hold halves of characters, too."""
    return (
        isinstance(value, str) and 0 < len(value) <= MAX_NAME and is_printable(value) and bool(value.strip())
    )


def _flip_map(names: Sequence[str], category: dict[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    """Pairs that a mirror swaps: from ``flip_pairs`` if there, else names that differ in their sides."""
    given = category.get("flip_pairs")
    if given is not None:
        pairs, known = [], set(names)
        for pair in given if isinstance(given, list) else [given]:
            if not (
                isinstance(pair, list)
                and len(pair) == 2
                and all(isinstance(name, str) and name in known for name in pair)
            ):
                raise DatasetError(
                    f"{where}: flip_pairs must be a list of pairs of keypoint names, and has {quote(pair)}"
                )
            pairs.append((pair[0], pair[1]))
        flat = [name for pair in pairs for name in pair]
        if len(set(flat)) != len(flat):
            raise DatasetError(f"{where}: flip_pairs names a keypoint twice")
        return tuple(pairs)
    found: list[tuple[str, str]] = []
    unpaired = set(names)
    for attempt in zip(*map(_names_in_a_mirror, names)):
        for name, mirrored in zip(names, attempt):
            if name != mirrored and {name, mirrored} <= unpaired:
                found.append((name, mirrored))
                unpaired -= {name, mirrored}
    return tuple(found)


def _names_in_a_mirror(name: str) -> list[str]:
    """What a keypoint may become in a mirror, the surest first."""
    # All sides at once (left_eye_r is right_eye_l), then one word alone: left_upright is right_upright.
    swapped = _SIDE.sub(lambda side: _OTHER_SIDE[side[0]], name)
    return [swapped, *(name.replace(left, right) for left, right in _LEFT_AND_RIGHT)]


def _keypoints(
    categories: list[dict[str, Any]], json_file: str
) -> tuple[
    tuple[str, ...], tuple[tuple[str, str], ...], tuple[tuple[int, int], ...], tuple[float, ...], bool
]:
    """Of the categories that declare keypoints: names, flip pairs, bones (0-based), sigmas; are the pairs given?"""
    declaring = [c for c in categories if c.get("keypoints")]
    if not declaring:
        return (), (), (), (), False
    category = declaring[0]
    where = f"{json_file}: category {quote(category['name'])}"
    names = category["keypoints"]
    if not isinstance(names, list) or not all(map(_is_name, names)):
        raise DatasetError(f"{where}: keypoints must be a list of names")
    if len(names) > MAX_KEYPOINTS:
        raise DatasetError(f"{where}: {len(names)} keypoints: {MAX_KEYPOINTS} at most")
    if len(set(names)) != len(names):
        raise DatasetError(f"{where}: two keypoints have the same name")
    for other in declaring[1:]:
        if other["keypoints"] != names:
            raise DatasetError(
                f"{where} and category {quote(other['name'])} have different keypoints: "
                "one model has one list of keypoints"
            )
    bones = []
    skeleton = category.get("skeleton") or []
    for bone in skeleton if isinstance(skeleton, list) else [skeleton]:
        ends = [as_id(end) for end in bone] if isinstance(bone, list) else []
        if len(ends) != 2 or not all(end is not None and 1 <= end <= len(names) for end in ends):
            raise DatasetError(
                f"{where}: skeleton has {quote(bone)}, not a pair of keypoint numbers, 1 to {len(names)}"
            )
        bones.append((int(ends[0] or 0) - 1, int(ends[1] or 0) - 1))
    sigmas: tuple[float, ...] = ()
    if category.get("sigmas"):
        try:
            sigmas = tuple(float(sigma) for sigma in category["sigmas"])
        except (TypeError, ValueError, OverflowError):
            sigmas = ()
        if len(sigmas) != len(names) or not all(0 < sigma < 10 for sigma in sigmas):
            raise DatasetError(f"{where}: sigmas must be {len(names)} positive numbers, one per keypoint")
    elif tuple(names) == COCO_KEYPOINT_NAMES:
        sigmas = COCO_OKS_SIGMAS
    given = category.get("flip_pairs") is not None
    return tuple(names), _flip_map(names, category, where), tuple(bones), sigmas, given


def annotations_by_class(content: dict[str, Any]) -> Counter[str]:
    """How many annotations each category of a file has, by its name."""
    names = {as_id(category["id"]): category["name"] for category in content["categories"]}
    ids = (as_id(a.get("category_id")) for a in content.get("annotations", []) if isinstance(a, dict))
    return Counter(names[number] for number in ids if number in names)


def _checked_extra(
    extra: list[str],
    classes: tuple[str, ...],
    used: Mapping[str, int],
    names: tuple[str, ...],
    json_file: str,
    other_classes: OtherClasses,
) -> tuple[str, ...]:
    """Those of the categories that training doesn't know that have objects.

    Raises:
        DatasetError: there are such, and they are to be refused, or no category is known.
    """
    with_objects = tuple(category for category in extra if used.get(category))
    if not with_objects:
        return ()
    count = sum(used[category] for category in with_objects)
    told = f"it has {count} annotations of {listed(with_objects)}, which the training set does not have"
    similar = {category.casefold().strip(): category for category in classes if category not in names}
    meant = [f"{a} as {similar[key]}" for a in with_objects if (key := a.casefold().strip()) in similar]
    hint = f": write {listed(meant)}, as there" if meant else ""
    if other_classes == "refuse" or not set(classes) & set(names):
        raise DatasetError(
            f"{json_file}: {told}{hint} (categories are matched by name, ids may differ; the training set has "
            f"{listed(classes)})"
        )
    if hint:
        logger.warning("%s: %s%s", json_file, told, hint)
    return with_objects


def metadata_from(
    content: dict[str, Any],
    name: str,
    json_file: str,
    image_root: str,
    classes: Sequence[str] | None,
    other_classes: OtherClasses,
    used: Callable[[], Mapping[str, int]],
) -> DatasetMetadata:
    """What a file's categories say.

    Args:
        content: of the annotation file; its ``categories`` count.
        name, json_file, image_root: of the set.
        classes, other_classes: see :func:`zenith_det.data.load_coco_dataset`.
        used: gives the number of annotations of each category, by its name.

    Raises:
        DatasetError: they can't be used, or are not those of ``classes``.
    """
    categories: list[dict[str, Any]] = []
    for entry in content["categories"]:
        if (
            not isinstance(entry, dict)
            or as_id(entry.get("id")) is None
            or not isinstance(entry.get("name"), str)
        ):
            raise DatasetError(
                f"{json_file}: a category needs a whole number as id (of 64 bits at most) and a name, "
                f"this has not: {quote(entry)}"
            )
        if not _is_name(entry["name"]):
            raise DatasetError(
                f"{json_file}: category {entry['id']} has the name {quote(entry['name'])}: one line of "
                f"printable characters is needed, {MAX_NAME} at most"
            )
        categories.append({**entry, "id": as_id(entry["id"])})
    if not categories:
        raise DatasetError(f'{json_file}: "categories" is empty: no class to find')
    categories.sort(key=lambda category: category["id"])
    for key in ("id", "name"):
        seen: set[Any] = set()
        for category in categories:
            if category[key] in seen:
                raise DatasetError(f"{json_file}: two categories have the {key} {quote(category[key])}")
            seen.add(category[key])
    names = tuple(category["name"] for category in categories)
    order = tuple(classes) if classes is not None else names
    if extra := [category for category in names if category not in order]:
        order += _checked_extra(extra, order, used(), names, json_file, other_classes)
        categories = [category for category in categories if category["name"] in order]
    index = {category: number for number, category in enumerate(order)}
    keypoint_names, flip_map, bones, sigmas, given = _keypoints(categories, json_file)
    return DatasetMetadata(
        name=name,
        json_file=json_file,
        image_root=image_root,
        thing_classes=order,
        thing_dataset_id_to_contiguous_id={c["id"]: index[c["name"]] for c in categories},
        keypoint_names=keypoint_names,
        keypoint_flip_map=flip_map,
        keypoint_connections=bones,
        keypoint_oks_sigmas=sigmas,
        flip_pairs_given=given,
    )
