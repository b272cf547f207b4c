"""One annotation file in two, by image: most to train on, some to evaluate on, with the classes in proportion."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from zenith_det.data.annotation_file import parse, read_bytes
from zenith_det.data.values import as_id
from zenith_det.errors import DatasetError
from zenith_det.files import write_whole

#: A key of the files written: which file they are parts of, and how it was split.
ORIGIN_KEY = "zenith_det_split"
# Roboflow writes several altered copies of an image under its name and a fingerprint.
_COPY = re.compile(r"\.rf\.[0-9A-Za-z_-]{8,}(?=\.\w+$)")


def split_groups(labels: Mapping[str, Counter[Any]], share: float) -> set[str]:
    """Choose groups of images to hold out, each class in its proportion as far as that goes.

    Iterative stratification (Sechidis, Tsoumakas, Vlahavas 2011): the rarest class is dealt out first. Each class stays
    in some group that is not held out. Of ties a fingerprint of the name decides, so the order of a file doesn't
    matter and the choice is always the same.

    Args:
        labels: by group, in how many of its images each class is; without objects there is none.
        share: of the groups, to hold out; one at least is, and one is not.
    """
    order = sorted(labels, key=lambda name: hashlib.blake2b(name.encode(errors="replace")).digest())
    # Groups without objects are a class of their own.
    amounts = {name: labels[name] or Counter({None: 1}) for name in order}
    having: dict[Any, list[str]] = {}
    for name in order:
        for label in amounts[name]:
            having.setdefault(label, []).append(name)
    total = {label: sum(amounts[name][label] for name in names) for label, names in having.items()}
    wanted = [{label: part * count for label, count in total.items()} for part in (share, 1 - share)]
    target = min(max(1, round(share * len(order))), len(order) - 1)
    room = [target, len(order) - target]
    held_out: set[str] = set()
    to_hold = {label: len(names) - 1 for label, names in having.items()}  # groups: not all of a class
    left = dict.fromkeys(order)
    remaining = {label: len(names) for label, names in having.items()}

    def may_hold(name: str) -> bool:
        return all(to_hold[label] > 0 for label in amounts[name] if label is not None)

    def hold(name: str) -> None:
        held_out.add(name)
        for label in amounts[name]:
            to_hold[label] -= 1

    while left:
        label = min(
            (one for one in remaining if remaining[one]), key=lambda k: (k is None, remaining[k], str(k))
        )
        for name in [name for name in having[label] if name in left]:
            need = [(wanted[part][label], room[part]) for part in (0, 1)]
            part = 0 if room[0] > 0 and need[0] > need[1] and may_hold(name) else 1
            if part == 0:
                hold(name)
            room[part] -= 1
            for own, amount in amounts[name].items():
                wanted[part][own] -= amount
                remaining[own] -= 1
            del left[name]
    # Too few where many classes are rare: those that bring most of what is still wanted.
    spare = [name for name in order if name not in held_out]
    spare.sort(key=lambda name: -sum(min(wanted[0][k], n) for k, n in amounts[name].items()))
    for only_safe in (True, False):
        for name in spare:
            if len(held_out) < target and name not in held_out and (may_hold(name) or not only_safe):
                hold(name)
        if held_out:
            break
    return held_out


def split_file(json_file: str, share: float, train_file: Path, val_file: Path) -> tuple[int, int]:
    """Write the two parts of an annotation file; all but ``images`` and ``annotations`` is in both.

    Copies of one image stay together. What belongs to no listed image stays in the first part, where the check finds
    it.

    Args:
        json_file: absolute path.
        share: of the images, for the second part; at least one image is in either.
        train_file, val_file: where to.

    Returns:
        How many images each part has.

    Raises:
        DatasetError: the file can't be read or has fewer than two images, or a part can't be written.
    """
    data = read_bytes(json_file)
    content = parse(data, json_file)
    group_of: dict[int, str] = {}
    for entry in content["images"]:
        if isinstance(entry, dict) and (number := as_id(entry.get("id"))) is not None:
            group_of[number] = _COPY.sub("", str(entry.get("file_name", number)))
    labels: dict[str, Counter[Any]] = {name: Counter() for name in group_of.values()}
    if len(labels) < 2:
        raise DatasetError(f"{json_file}: {len(labels)} images can't be split: at least 2 are needed")
    pairs = {
        (as_id(a.get("image_id")), as_id(a.get("category_id")))
        for a in content.get("annotations", [])
        if isinstance(a, dict)
    }
    for image, category in pairs:
        if image in group_of and category is not None:
            labels[group_of[image]][category] += 1
    held_out = split_groups(labels, share)
    held_out_ids = {number for number, name in group_of.items() if name in held_out}
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()

    def part(name: str, inside: bool) -> bytes:
        def belongs(entry: Any, key: str) -> bool:
            number = as_id(entry.get(key)) if isinstance(entry, dict) else None
            return (number in held_out_ids) == inside

        own = {
            "images": [e for e in content["images"] if belongs(e, "id")],
            "annotations": [e for e in content.get("annotations", []) if belongs(e, "image_id")],
            ORIGIN_KEY: {"file": json_file, "share": share, "part": name, "digest": digest},
        }
        return orjson.dumps({**content, **own}, option=orjson.OPT_NON_STR_KEYS)

    for path, name, inside in ((train_file, "train", False), (val_file, "val", True)):
        try:
            write_whole(path, part(name, inside))
        except orjson.JSONEncodeError as error:  # a number beyond 64 bits, or NaN read by Python's own parser
            raise DatasetError(f"{json_file}: can't be split: {error}") from None
    held = sum(isinstance(e, dict) and as_id(e.get("id")) in held_out_ids for e in content["images"])
    return len(content["images"]) - held, held


def origin_of(json_file: Path) -> dict[str, Any] | None:
    """What :func:`split_file` wrote down in a part; ``None`` for any other file."""
    try:
        found = orjson.loads(json_file.read_bytes()).get(ORIGIN_KEY)
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, dict) else None


def parts_of(json_file: str, share: float, folder: Path) -> tuple[Path, Path]:
    """Where the two parts are kept: names that tell the content and the share, so that no run replaces another's."""
    mark = hashlib.blake2b(read_bytes(json_file) + repr(share).encode(), digest_size=4).hexdigest()
    stem = Path(json_file).stem
    return folder / f"{stem}-{mark}-train.json", folder / f"{stem}-{mark}-val.json"


def earlier_parts(json_file: str, share: float, folder: Path) -> tuple[Path, Path] | None:
    """The parts of this file that are in a folder already, of its content then; ``None`` where there are none."""
    for train_file in sorted(folder.glob("*-train.json")):
        val_file = train_file.with_name(f"{train_file.name.removesuffix('train.json')}val.json")
        origin = origin_of(train_file)
        if origin and (origin.get("file"), origin.get("share")) == (json_file, share) and val_file.exists():
            return train_file, val_file
    return None


def told(parts: Sequence[int], share: float, json_file: str, folder: Path) -> str:
    """A line about a split."""
    return (
        f"{json_file} is split by image: {parts[0]} to train on, {parts[1]} to evaluate on ({share:.0%}), the classes "
        f"in proportion as far as that goes; the two files are in {folder}"
    )
