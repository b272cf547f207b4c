"""From an annotation file's categories to a dataset's metadata: classes and keypoints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from zenith_det.data.metadata import COCO_KEYPOINT_NAMES, COCO_OKS_SIGMAS, DatasetMetadata
from zenith_det.data.values import as_id
from zenith_det.errors import DatasetError, is_printable, one_line, quote

#: The longest name of a category or a keypoint, in characters.
MAX_NAME = 500
#: Keypoints of one object; sets of faces have 478.
MAX_KEYPOINTS = 1000
_LEFT_AND_RIGHT = (("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT"))
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


def metadata_from(
    content: dict[str, Any], name: str, json_file: str, image_root: str, classes: Sequence[str] | None
) -> DatasetMetadata:
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
    if set(order) != set(names):
        missing, extra = sorted(set(order) - set(names)), sorted(set(names) - set(order))
        told = [f"lacks {one_line(', '.join(missing))}"] * bool(missing)
        told += [f"has besides {one_line(', '.join(extra))}"] * bool(extra)
        raise DatasetError(
            f"{json_file}: its categories are not those of the training set: it {' and '.join(told)} "
            "(they are matched by name, ids may differ)"
        )
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
