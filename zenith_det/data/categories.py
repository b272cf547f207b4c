"""From an annotation file's categories to a dataset's metadata: classes and keypoints."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from zenith_det.data.metadata import COCO_KEYPOINT_NAMES, COCO_OKS_SIGMAS, DatasetMetadata
from zenith_det.data.problems import NO_KEYPOINTS, DatasetReport
from zenith_det.data.sides import mirrored_pairs
from zenith_det.data.values import as_id
from zenith_det.errors import DatasetError, is_printable, listed, quote

logger = logging.getLogger(__name__)

#: The longest name of a category or a keypoint, in characters.
MAX_NAME = 500
#: Keypoints of one object; sets of faces have 478.
MAX_KEYPOINTS = 1000
#: What becomes of a set's objects of classes that are not among those of the training set.
OtherClasses = Literal["refuse", "keep"]


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
    return tuple(mirrored_pairs(names))


@dataclass
class _Keypoints:
    """What the categories declare of keypoints.

    Attributes:
        names: in the order of the annotations.
        flip_map: pairs that a mirror swaps.
        bones: pairs of 0-based indices.
        sigmas: one for each, or none.
        flips_given: the pairs are the file's own.
        fault: why none of it can be used; the rest is empty then.
        notes: (kind, reason) of what was left out or read in another way.
    """

    names: tuple[str, ...] = ()
    flip_map: tuple[tuple[str, str], ...] = ()
    bones: tuple[tuple[int, int], ...] = ()
    sigmas: tuple[float, ...] = ()
    flips_given: bool = False
    fault: str = ""
    notes: list[tuple[str, str]] = field(default_factory=list)


def _keypoints(categories: list[dict[str, Any]]) -> _Keypoints:
    """A declaration that can't be used is a fault of the keypoints alone: boxes and masks train without them."""
    declaring = [category for category in categories if category.get("keypoints")]
    if not declaring:
        return _Keypoints()
    try:
        return _declared_keypoints(declaring)
    except DatasetError as error:
        return _Keypoints(fault=str(error))


def _declared_keypoints(declaring: list[dict[str, Any]]) -> _Keypoints:
    category = declaring[0]
    where = f"category {quote(category['name'])}"
    names = category["keypoints"]
    if not isinstance(names, list) or not all(map(_is_name, names)):
        raise DatasetError(f"{where}: keypoints must be a list of names")
    if len(names) > MAX_KEYPOINTS:
        raise DatasetError(f"{where}: {len(names)} keypoints: {MAX_KEYPOINTS} at most")
    if len(set(names)) != len(names):
        raise DatasetError(f"{where}: two keypoints have the same name")
    for other in declaring[1:]:
        theirs = other["keypoints"]
        if theirs != names:
            count = len(theirs) if isinstance(theirs, list) else "other"
            raise DatasetError(
                f"{where} has {len(names)} keypoints and category {quote(other['name'])} has {count}, and one "
                'model has one list: keep "keypoints" in the categories of one of the lists, take it out of '
                "the others (their boxes and masks stay)"
            )
    found = _Keypoints(tuple(names), _flip_map(names, category, where))
    found.flips_given = category.get("flip_pairs") is not None
    found.bones = _bones(category.get("skeleton"), found, where)
    if category.get("sigmas"):
        try:
            found.sigmas = tuple(float(sigma) for sigma in category["sigmas"])
        except (TypeError, ValueError, OverflowError):
            found.sigmas = ()
        if len(found.sigmas) != len(names) or not all(0 < sigma < 10 for sigma in found.sigmas):
            raise DatasetError(f"{where}: sigmas must be {len(names)} positive numbers, one per keypoint")
    elif tuple(names) == COCO_KEYPOINT_NAMES:
        found.sigmas = COCO_OKS_SIGMAS
    return found


def _bones(skeleton: Any, found: _Keypoints, where: str) -> tuple[tuple[int, int], ...]:
    """The bones between declared keypoints, 0-based; they are for pictures alone, so a wrong one is left out."""
    count = len(found.names)
    bones = []
    for bone in skeleton if isinstance(skeleton, list) else [skeleton] if skeleton else []:
        ends = [as_id(end) for end in bone] if isinstance(bone, list) else []
        bones.append((bone, ends[0] if len(ends) == 2 else None, ends[1] if len(ends) == 2 else None))
    numbers = [end for _, start, last in bones for end in (start, last) if end is not None]
    first = 1
    if 0 in numbers and min(numbers) == 0 and max(numbers) < count:
        first = 0
        found.notes.append(("skeleton from 0", f"{where}: skeleton counts keypoints from 0, COCO's from 1"))
    kept = []
    for bone, start, end in bones:
        if (
            start is None
            or end is None
            or not (first <= start < count + first and first <= end < count + first)
        ):
            found.notes.append(
                (
                    "bone left out",
                    f"{where}: skeleton has {quote(bone)}, not two of the keypoints 1 to {count}",
                )
            )
        else:
            kept.append((start - first, end - first))
    return tuple(kept)


def clean_categories(
    content: dict[str, Any], json_file: str, report: DatasetReport
) -> tuple[list[dict[str, Any]], dict[int, int]]:
    """The file's categories, by id, each id and each name once.

    Args:
        content: of the annotation file.
        json_file: for messages.
        report: takes what was repaired.

    Returns:
        The categories, and ids that became part of another category -> that one's id.

    Raises:
        DatasetError: an entry is no category, or two can't be told apart.
    """
    by_id: dict[int, dict[str, Any]] = {}
    for entry in content["categories"]:
        category = _category(entry, json_file, report)
        known = by_id.setdefault(category["id"], category)
        if known is category:
            continue
        if known["name"] != category["name"]:
            raise DatasetError(
                f"{json_file}: two categories have the id {category['id']}: {quote(known['name'])} and "
                f"{quote(category['name'])}; which one an annotation means can't be known: give each its own id"
            )
        report.add("repeated category", "filled", f"category {category['id']} is listed again: taken once")
        by_id[category["id"]] = _united(known, category)
    if not by_id:
        raise DatasetError(f'{json_file}: "categories" is empty: no class to find')
    by_name: dict[str, list[dict[str, Any]]] = {}
    for _, category in sorted(by_id.items()):
        by_name.setdefault(category["name"], []).append(category)
    aliases: dict[int, int] = {}
    categories = []
    uses: Counter[int | None] | None = None
    for twins in by_name.values():
        if len(twins) > 1 and uses is None:
            annotations = (a for a in content.get("annotations", []) if isinstance(a, dict))
            uses = Counter(as_id(a.get("category_id")) for a in annotations)
        category = twins[0] if uses is None or len(twins) == 1 else _one_of(twins, uses, json_file, report)
        categories.append(category)
        aliases |= {twin["id"]: category["id"] for twin in twins if twin["id"] != category["id"]}
    return sorted(categories, key=lambda category: category["id"]), aliases


def _category(entry: Any, json_file: str, report: DatasetReport) -> dict[str, Any]:
    number = as_id(entry.get("id")) if isinstance(entry, dict) else None
    name = entry.get("name") if number is not None else None
    if type(name) in (int, float):
        name = str(name)
    if number is None or not isinstance(name, str):
        raise DatasetError(
            f"{json_file}: a category needs a whole number as id (of 64 bits at most) and a name, "
            f"this has not: {quote(entry)}"
        )
    if not _is_name(name):
        raise DatasetError(
            f"{json_file}: category {number} has the name {quote(name)}: one line of "
            f"printable characters is needed, {MAX_NAME} at most"
        )
    if isinstance(entry["id"], str):
        report.add("number as text", "filled", f"category {quote(name)}: id: read as a number")
    if name != name.strip():
        report.add("spaces around a category's name", "filled", f"{quote(name)}: taken off")
    return {**entry, "id": number, "name": name.strip()}


def _united(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The first, with the keypoints of the second where it declares none."""
    return first if first.get("keypoints") else {**second, **{k: v for k, v in first.items() if v}}


def _one_of(
    twins: list[dict[str, Any]], uses: Mapping[int | None, int], json_file: str, report: DatasetReport
) -> dict[str, Any]:
    """One category for several of the same name."""
    name = quote(twins[0]["name"])
    used = [twin for twin in twins if uses.get(twin["id"], 0)]
    counted = ", ".join(f"{twin['id']} ({uses.get(twin['id'], 0)} annotations)" for twin in twins)
    if len(used) < 2:
        kept = used[0] if used else twins[0]
        for twin in twins:
            if twin is not kept:
                reason = (
                    f"category {twin['id']} has the name {name} of category {kept['id']}, and no annotation"
                )
                report.add("unused twin of a category", "filled", f"{reason}: left out")
    else:
        kept = used[0]
        groups = {_supercategory(twin) for twin in used}
        if len(groups) > 1:
            told = " and ".join(quote(group or "none") for group in sorted(groups))
            raise DatasetError(
                f"{json_file}: the categories {counted} are all named {name}, under the supercategories {told}: "
                "rename them if they are different classes, else give all annotations one of the ids"
            )
        report.add(
            "categories of one name", "filled", f"the categories {counted} are named {name}: read as one"
        )
    for twin in twins:
        kept = {**_united(kept, twin), "id": kept["id"]}
    return kept


def _supercategory(category: dict[str, Any]) -> str:
    """ "" where it says nothing: exporters write "none", or the category's own name."""
    value = category.get("supercategory")
    told = value.strip() if isinstance(value, str) else ""
    return "" if told.lower() in ("none", "null", "object", category["name"].lower()) else told


def annotations_by_class(
    content: dict[str, Any], categories: Sequence[dict[str, Any]], aliases: Mapping[int, int]
) -> Counter[str]:
    """How many annotations each category of a file has, by its name; see :func:`clean_categories`."""
    names: dict[int | None, str] = {category["id"]: category["name"] for category in categories}
    names |= {alias: names[category_id] for alias, category_id in aliases.items()}
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
    categories: Sequence[dict[str, Any]],
    name: str,
    json_file: str,
    image_root: str,
    classes: Sequence[str] | None,
    other_classes: OtherClasses,
    used: Callable[[], Mapping[str, int]],
    report: DatasetReport | None = None,
) -> DatasetMetadata:
    """The metadata of a set with these categories.

    Args:
        categories: from :func:`clean_categories`.
        name, json_file, image_root: of the set.
        classes, other_classes: see :func:`zenith_det.data.load_coco_dataset`.
        used: gives the number of annotations of each category, by its name.
        report: takes what was found about keypoints.

    Raises:
        DatasetError: they are not those of ``classes``.
    """
    names = tuple(category["name"] for category in categories)
    order = tuple(classes) if classes is not None else names
    if extra := [category for category in names if category not in order]:
        order += _checked_extra(extra, order, used(), names, json_file, other_classes)
        categories = [category for category in categories if category["name"] in order]
    index = {category: number for number, category in enumerate(order)}
    keypoints = _keypoints(list(categories))
    if report is not None:
        for kind, reason in keypoints.notes:
            report.add(kind, "kept", reason)
        if keypoints.fault:
            report.add(NO_KEYPOINTS, "kept", keypoints.fault)
    return DatasetMetadata(
        name=name,
        json_file=json_file,
        image_root=image_root,
        thing_classes=order,
        thing_dataset_id_to_contiguous_id={c["id"]: index[c["name"]] for c in categories},
        keypoint_names=keypoints.names,
        keypoint_flip_map=keypoints.flip_map,
        keypoint_connections=keypoints.bones,
        keypoint_oks_sigmas=keypoints.sigmas,
        flip_pairs_given=keypoints.flips_given,
        keypoint_fault=keypoints.fault,
    )
