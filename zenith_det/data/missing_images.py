"""Where images are that an annotation file's names don't find."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from zenith_det.data.image_files import check_file_name
from zenith_det.data.problems import Fault
from zenith_det.errors import quote

_TRIED = 5  # missing images that are looked for elsewhere
_FOLDERS_TRIED = 1000


def where_missing_images_are(names: Sequence[str], image_root: str) -> str:
    """Why images that are there are not found, where one of the usual mistakes explains it.

    Args:
        names: ``file_name`` of images that don't exist; a few of them are looked for.
        image_root: their folder, absolute.

    Returns:
        What was found and what to change, a line; "" where no mistake explains all that were tried.
    """
    tried = names[:: max(1, len(names) // _TRIED)][:_TRIED]
    if not tried:
        return ""
    first = tried[0]

    def are_there(changed: Iterable[str], folder: str = image_root) -> bool:
        return all(_is_below(name, folder) for name in changed)

    def told(found: str, advice: str) -> str:
        return f"{quote(first)} is there as {quote(found)}: {advice}"

    slashes = [name.replace("\\", "/") for name in tried]
    if are_there(slashes):
        return told(slashes[0], "replace backslashes in file_name")
    # file_name repeats the folder's last parts, or the folder lies beside the right one.
    folder = image_root
    for _ in range(3):
        folder = os.path.dirname(folder)
        if are_there(tried, folder):
            return f"{quote(first)} is there below {folder}: give that as the image folder"
    for change in (str.lower, str.upper, str.capitalize):
        # Of ".JPG" Python capitalizes the dot.
        other = [
            stem + extension[:1] + change(extension[1:]) for stem, extension in map(os.path.splitext, tried)
        ]
        if are_there(other):
            return told(other[0], "file_name needs the same capital letters")
    within = _subfolders(image_root)
    for folder in within:
        if are_there(tried, folder):
            return f"{quote(first)} is there below {folder}: give that as the image folder"
    found = [next((folder for folder in within if _is_below(name, folder)), None) for name in tried]
    if None not in found:
        path = os.path.relpath(os.path.join(str(found[0]), first), image_root)
        return told(path, "file_name must name the folder, too")
    bare = [name.rpartition("/")[2] for name in slashes]
    return told(bare[0], "take the folder out of file_name") if are_there(bare) else ""


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
