"""Images that are not where an annotation file says: found under another name, or the mistake named."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote

from zenith_det.data.image_files import check_file_name
from zenith_det.data.problems import Fault
from zenith_det.errors import quote

#: A name that fits a file only loosely counts where at least this share of all images does the same.
SYSTEMATIC = 0.5
_MOST_FILES = 1_000_000
_FOLDERS_TRIED = 1000
_HINT_NAMES = 2000  # missing images that a hint has to explain
_EXTENSIONS = frozenset(
    (
        ".jpg",
        ".jpeg",
        ".jpe",
        ".png",
        ".bmp",
        ".tif",
        ".tiff",
        ".webp",
        ".gif",
        ".ppm",
        ".pgm",
        ".jp2",
        ".tga",
        ".avif",
    )
)
# Folders of pictures that are no photographs, and have their names.
_NO_IMAGES = re.compile(
    r"(.*[_-])?(masks?|labels?|annotations?|seg(mentations?)?(class|object)?|depths?|thumbnails?)"
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://[^/]*")
_DRIVE = re.compile(r"[A-Za-z]:(?=[/\\])")
# Label Studio puts eight digits of a UUID before an uploaded file's name; Roboflow a hash behind it.
_UPLOAD = re.compile(r"[0-9a-f]{8}-(?=.)")
_ROBOFLOW = re.compile(
    r"(_(jpe?g|jpe|png|bmp|webp|tiff?|gif))?\.rf\.[0-9A-Za-z]{8,}(?=\.\w+\Z)", re.IGNORECASE
)
_NOT_IN_WORDS = re.compile(r"[\W_]+")


@dataclass
class FoundImages:
    """Where missing images are.

    Attributes:
        paths: name in the annotation file -> path below the image folder; no path is there twice.
        doubtful: the same for those that fit loosely, and too few to be sure of.
    """

    paths: dict[str, str] = field(default_factory=dict)
    doubtful: dict[str, str] = field(default_factory=dict)


def files_below(root: str) -> list[str]:
    """Paths of the image files below a folder, relative to it, with ``/``; hidden folders are left out."""
    found: list[str] = []
    for path, folders, files in os.walk(root):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        below = os.path.relpath(path, root).replace(os.sep, "/")
        start = "" if below == "." else f"{below}/"
        found += [start + name for name in files if os.path.splitext(name)[1].lower() in _EXTENSIONS]
        if len(found) >= _MOST_FILES:
            break
    return sorted(found)


def find_images(
    missing: Collection[str], used: Collection[str], count: int, image_root: str, files: Sequence[str]
) -> FoundImages:
    """Look for images under the names that tools give them: other slashes, folders, prefixes, extensions.

    A name and a file belong together where each is the only match of the other. Matches of the whole path, or
    of the name without an upload's prefix or hash in the same folder, always count; those in another folder or
    with another extension where :data:`SYSTEMATIC` of the images need it.

    Args:
        missing: names that are no files.
        used: names that are; their files belong to them.
        count: of all images in the annotation file.
        image_root: their folder.
        files: from :func:`files_below`.
    """
    index = _Index(files, used, image_root)
    sure: dict[str, str] = {}
    loose: dict[str, str] = {}
    for name in missing:
        match = index.match(name)
        if match is not None:
            path, is_sure = match
            (sure if is_sure else loose)[name] = path
    claims = Counter([*sure.values(), *loose.values()])
    sure = {name: path for name, path in sure.items() if claims[path] == 1}
    loose = {name: path for name, path in loose.items() if claims[path] == 1}
    if len(sure) + len(loose) >= SYSTEMATIC * count:
        return FoundImages(sure | loose)
    return FoundImages(sure, loose)


class _Index:
    """Files by what their names may be in an annotation file."""

    def __init__(self, files: Sequence[str], used: Collection[str], image_root: str) -> None:
        taken = {name.replace(os.sep, "/").casefold() for name in used}
        self.root = [part.casefold() for part in image_root.replace(os.sep, "/").split("/") if part]
        self.by_path: dict[str, list[str]] = defaultdict(list)
        self.by_base: dict[str, list[str]] = defaultdict(list)
        self.by_bare: dict[str, list[str]] = defaultdict(list)
        self.by_words: dict[str, list[str]] = defaultdict(list)
        self.by_stem: dict[str, list[str]] = defaultdict(list)
        for path in files:
            if path.casefold() in taken:
                continue
            self.by_path[path.casefold()].append(path)
            folder, _, base = path.rpartition("/")
            if folder and any(_NO_IMAGES.fullmatch(part.lower()) for part in folder.split("/")):
                continue
            self.by_base[base.casefold()].append(path)
            self.by_stem[os.path.splitext(base)[0].casefold()].append(path)
            self.by_words[_words(base)].append(path)
            for bare in _bare(base):
                self.by_bare[_words(bare)].append(path)

    def match(self, name: str) -> tuple[str, bool] | None:
        """The one file of this name, and whether there is no doubt; ``None`` where none or several fit."""
        for parts in _parts(name):
            whole = "/".join(parts).casefold()
            if found := _only(self.by_path[whole]) if whole in self.by_path else None:
                return found, True
            # The name repeats the last parts of the image folder.
            for given in range(1, len(parts)):
                if [part.casefold() for part in parts[:given]] == self.root[-given:]:
                    rest = "/".join(parts[given:]).casefold()
                    if rest in self.by_path and (found := _only(self.by_path[rest])):
                        return found, True
            folder, base = parts[:-1], parts[-1]
            same_folder = "/".join(folder).casefold()
            stem, extension = os.path.splitext(base)
            if extension.lower() not in _EXTENSIONS:
                stem, extension = base, ""
            bare_names = _bare(base)
            bare = {path for other in bare_names for path in self.by_words.get(_words(other), ())}
            bare.update(self.by_bare.get(_words(base), ()))
            stems = (stem, *(os.path.splitext(other)[0] for other in bare_names))
            alike = {path for each in stems for path in self.by_stem.get(each.casefold(), ())}
            for paths, keeps_name in (
                (self.by_base.get(base.casefold(), ()), False),
                (bare, True),
                (alike, not extension),
            ):
                if paths:
                    found = _nearest(sorted(paths), folder)
                    in_folder = found is not None and found.rpartition("/")[0].casefold() == same_folder
                    return None if found is None else (found, keeps_name and in_folder)
        return None


def _parts(name: str) -> list[list[str]]:
    """A name's folders and file, from a path of any system or a URL; percent signs as they are, and decoded."""
    if "?d=" in name or "&d=" in name:  # Label Studio's local storage
        name = re.split(r"[?&]d=", name)[-1].split("&")[0]
    elif _URL.match(name):
        name = _URL.sub("", name, count=1).split("?")[0].split("#")[0]
    ways = []
    for way in dict.fromkeys((name, unquote(name))):
        parts = [p for p in _DRIVE.sub("", way).replace("\\", "/").split("/") if p not in ("", ".", "..")]
        if parts:
            ways.append(parts)
    return ways


def _bare(base: str) -> list[str]:
    """A file's name before a tool gave it a prefix or a hash: none, or one for each way."""
    without = [_UPLOAD.sub("", base, count=1), _ROBOFLOW.sub("", base)]
    without.append(_UPLOAD.sub("", without[1], count=1))
    return [name for name in dict.fromkeys(without) if name != base]


def _words(base: str) -> str:
    """Letters and digits alone: tools replace spaces and signs; jpeg is jpg."""
    stem, extension = os.path.splitext(base.casefold())
    return (
        f"{_NOT_IN_WORDS.sub('-', stem).strip('-')}{'.jpg' if extension in ('.jpeg', '.jpe') else extension}"
    )


def _only(paths: Sequence[str]) -> str | None:
    return paths[0] if len(paths) == 1 else None


def _nearest(paths: Sequence[str], folder: Sequence[str]) -> str | None:
    """The one path whose folders end as ``folder`` does; ``None`` where several fit equally."""
    if len(paths) < 2:
        return _only(paths)

    def agreeing(path: str) -> int:
        theirs = path.split("/")[-2::-1]
        same = 0
        for a, b in zip(theirs, reversed(folder)):
            if a.casefold() != b.casefold():
                break
            same += 1
        return same

    scores = [agreeing(path) for path in paths]
    best = max(scores)
    return paths[scores.index(best)] if scores.count(best) == 1 else None


def where_missing_images_are(
    missing: Sequence[str], doubtful: dict[str, str], count: int, image_root: str
) -> str:
    """What to change so that missing images are found, where one change explains them all.

    Args:
        missing: ``file_name`` of images that don't exist.
        doubtful: of :func:`find_images`.
        count: of all images in the annotation file: another folder would have to have nearly all.
        image_root: their folder, absolute.

    Returns:
        What was found and what to change, a line; "" where nothing explains all of them.
    """
    names = list(missing)[:_HINT_NAMES]
    if not names:
        return ""
    first = names[0]
    all_of_them = "it is" if len(missing) == 1 else "all of them are"

    def have_all(folders: Iterable[str]) -> list[str]:
        return [folder for folder in folders if all(_is_below(name, folder) for name in names)]

    # file_name repeats the folder's last parts, or the folder lies beside the right one.
    parent = os.path.dirname(image_root)
    above = [parent, os.path.dirname(parent), os.path.dirname(os.path.dirname(parent))]
    nearly_all = len(missing) > 0.9 * count
    for folders in (above, _subfolders(image_root), _subfolders(parent)) if nearly_all else ():
        found = have_all(folders)
        if len(found) > 1 and folders is not above:
            told = " and ".join(found[:3])
            return f"{all_of_them} there below {told}: give the right one as the image folder"
        if found:
            return f"{all_of_them} there below {found[0]}: give that as the image folder"
    if len(doubtful) == len(missing):
        others = " and the others alike: name them" if len(missing) > 1 else ": name it"
        return f"{quote(first)} may be {quote(doubtful[first])}{others} so in file_name"
    return ""


def _is_below(name: str, folder: str) -> bool:
    try:
        return os.path.isfile(check_file_name(name, folder))
    except Fault:
        return False


def _subfolders(root: str) -> list[str]:
    """Folders below ``root``, of two levels, not too many."""
    found: list[str] = []
    for path, folders, _ in os.walk(root):
        folders.sort()
        found += [os.path.join(path, folder) for folder in folders]
        if path != root:
            folders.clear()
        if len(found) >= _FOLDERS_TRIED:
            break
    return found[:_FOLDERS_TRIED]
